"""The outputs of attention and MLP as the paper keeps them: exact at their own step, no module runs in a skip, nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.errors import NodeInputError
from rectiflow.families.arch import arch_spec
from rectiflow.families.gated import gated_modules
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES
from rectiflow.tests.accel.region_toys import noise, sample, toy

FAMILIES = ("flux", "sd3")
# Flux: 2 double blocks with 4 outputs, 2 single ones. SD3: 4 blocks with 4; the first has a second attention, the last no text.
OUTPUTS = {"flux": 2 * 4 + 2, "sd3": 4 * 4 + 1 - 2}
STEPS = 10


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    made = toy(request.param)
    made.family = request.param
    return made


def cached(model, interval=2, order=1, warmup=2, tail=1):
    log = CacheLog()
    return attach(model, CachePlan(TaylorSeer(order, interval=interval), "modules", Limits(warmup, tail)), log, "test"), log


def streams(model):
    network = model.get_model_object("diffusion_model")
    return gated_modules(network, arch_spec(network), "test")


def hooks_left(model) -> int:
    return sum(len(module._forward_hooks) for module in model.get_model_object("diffusion_model").modules())


class Counted:
    """Calls of the attention and MLP layers of a network, by a hook of the test's own."""

    def __init__(self, model):
        self.calls = 0
        found = [module for block in streams(model).values() for stream in block for module in stream.modules]
        self.handles = [module.register_forward_hook(self.count) for module in found]

    def count(self, *_):
        self.calls += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def test_every_output_of_attention_and_mlp_is_found(model):
    assert sum(len(stream.modules) for block in streams(model).values() for stream in block) == OUTPUTS[model.family]


def test_interval_one_is_bit_identical_and_keeps_nothing(model):
    off, log = cached(model, interval=1)
    assert torch.equal(sample(off, noise(), steps=STEPS), sample(model, noise(), steps=STEPS)) and log.last.peak_bytes == 0


def test_outputs_put_back_at_their_own_step_give_the_computed_answer(model):
    still = torch.tensor([0.7] * 5)
    near, log = cached(model, interval=4, warmup=0, tail=0)
    # A gate times an output is added in two roundings here, in one by the host's fused addition.
    torch.testing.assert_close(sample(near, noise(2), sigmas=still), sample(model, noise(2), sigmas=still), atol=2e-5, rtol=1e-5)
    assert log.last.hit_ratio == 0.75


def test_skipped_visits_call_no_attention_and_no_mlp_and_bytes_are_what_is_kept(model):
    near, log = cached(model, interval=3, order=2)
    with Counted(model) as counted:
        latent = sample(near, noise(), steps=STEPS)
    full = log.last.full_visits
    assert full == 5 and counted.calls == full * OUTPUTS[model.family] and torch.isfinite(latent).all()
    # (order + 1) factors of every output, for two conditions: 12 image and 5 text tokens, 64 wide, float32.
    tokens = {"flux": 2 * 2 * (12 + 5) + 2 * 17, "sd3": 4 * 2 * 12 + 12 + 3 * 2 * 5}[model.family]
    assert log.last.peak_bytes == 2 * 3 * tokens * 64 * 4
    assert hooks_left(model) == 0


def test_a_failure_in_a_computed_call_takes_the_hooks_off(model):
    def failing(executor, *args, **kwargs):
        executor(*args, **kwargs)
        raise RuntimeError("after the call")

    broken = model.clone()
    broken.add_wrapper_with_key("apply_model", "failing", failing)
    near, log = cached(broken)
    with pytest.raises(RuntimeError, match="after the call"):
        sample(near, noise(), steps=STEPS)
    assert hooks_left(model) == 0 and not log.last.finished


def test_modulation_follows_the_step_that_a_repeated_block_would_miss(model):
    """At order 0 the gates of the step are made anew: nearer to the computed run than a repeated offset, on eight seeds."""
    start = noise(8, seed=40)
    plain, errors = sample(model, start, steps=20), {}
    for target in ("modules", "last_block"):
        near = attach(model, CachePlan(TaylorSeer(0, interval=3), target, Limits(2, 1)), CacheLog(), "test")
        errors[target] = float((sample(near, start, steps=20) - plain).flatten(1).norm(dim=1).mean())
    assert 0 < errors["modules"] < errors["last_block"]


@pytest.mark.parametrize("target", ["modules", "block_delta"])
def test_texts_of_unlike_length_that_share_a_call_only_sometimes(monkeypatch, target):
    """Joined they are repeated to one length, alone they keep their own: history of another length is dropped, nothing breaks."""
    from rectiflow.host.embedded import sampling_function

    model = toy("flux")
    plan = CachePlan(TaylorSeer(1, interval=3), target, Limits(2, 1), blocks="double" if target == "block_delta" else "")
    log = CacheLog()
    near, lengths = attach(model, plan, log, "test"), (5, 10)
    joined = sample(near, noise(), steps=STEPS, tokens=lengths)
    choose, turns = sampling_function._choose_batch, iter([False, True, True, False] * 20)
    monkeypatch.setattr(sampling_function, "_choose_batch", lambda *given: choose(*given)[:1] if next(turns) else choose(*given))
    mixed = sample(near, noise(), steps=STEPS, tokens=lengths)
    assert torch.isfinite(mixed).all() and log.last.finished
    assert float((mixed - joined).norm() / joined.norm()) < 0.2


def test_a_block_that_another_patch_leaves_out_stays_out():
    model = toy("flux")
    without = model.clone()
    without.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 1)
    still = torch.tensor([0.7] * 4)
    near, log = cached(without, interval=3, warmup=0, tail=0)
    torch.testing.assert_close(sample(near, noise(), sigmas=still), sample(without, noise(), sigmas=still), atol=2e-5, rtol=1e-5)
    assert log.last.bypassed_patches > 0 and log.last.hit_ratio > 0.5


def test_other_families_are_refused_by_name():
    with pytest.raises(NodeInputError, match="modules, with a model of NextDiT.*modules with Flux and SD3.*last_block or block_delta"):
        cached(toy("lumina2"))


def test_the_node_offers_it():
    settings = {"interval": 3, "order": 1, "warmup_steps": 2, "tail_steps": 1, "basis": "newton", "axis": "step"}
    model = toy("flux")
    near, log = NODES["RectiflowTaylorForecastCache"]().execute(
        model=model, granularity="modules", start_percent=0.0, end_percent=1.0, **settings
    )
    sample(near, noise(), steps=STEPS)
    assert log.last.target == "modules" and log.last.hit_ratio == 0.5
