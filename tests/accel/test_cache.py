"""Caches on the tiny model and the embedded host: what users report as broken elsewhere, case by case."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from rectiflow.accel.cache.binding import RUN, attach, detach
from rectiflow.accel.cache.forecast import Ladder
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded import sampling_function
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES
from rectiflow.samplers.solvers import sample_rf_solver

TARGETS = ("output", "last_block", "block_delta")
PROMPT = "noto cat on blue"
STEPS = 8


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())


def ladders_alive() -> int:
    gc.collect()
    return sum(type(found) is Ladder and bool(found.factors) for found in gc.get_objects())


class Calls:
    """Counts calls that reach the network, from inside the cache."""

    def __init__(self, fail_at: int = -1, error: type[BaseException] = RuntimeError):
        self.made, self.fail_at, self.error = 0, fail_at, error

    def __call__(self, executor, *args, **kwargs):
        if self.made == self.fail_at:
            raise self.error("at this call")
        self.made += 1
        return executor(*args, **kwargs)

    def on(self, model):
        watched = model.clone()
        watched.add_wrapper_with_key("diffusion_model", "calls", self)
        return watched


@pytest.mark.parametrize("target", TARGETS)
def test_no_op_settings_are_bit_identical_and_keep_nothing(tiny, cached, target):
    noise = tiny.noise([1])
    plain = tiny.sample(PROMPT, noise, steps=STEPS)
    for limits in ({"interval": 1}, {"interval": 3, "warmup_steps": 99}, {"interval": 3, "start": 0.5, "end": 0.5}):
        model, log = cached(target, **limits)
        assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=model), plain)
        assert log.last.hit_ratio == 0.0 and log.last.full_visits == STEPS
    model, log = cached(target, interval=1)
    tiny.sample(PROMPT, noise, steps=STEPS, model=model)
    assert log.last.peak_bytes == 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_forecast_at_its_own_step_is_the_computed_value(tiny, cached, target):
    """Two evaluations at one x and sigma: what the second puts back is what the first captured."""
    from rectiflow.host import KSAMPLER, CFGGuider

    def twice(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma in sigmas[:-1]:
            denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
        return denoised

    noise, found = tiny.noise([3]), []
    model, log = cached(target, interval=2, warmup_steps=0, tail_steps=0)
    for m in (model, tiny.model):
        guider = CFGGuider(m)
        guider.set_conds(tiny.conditioning(PROMPT), tiny.conditioning(""))
        guider.set_cfg(3.0)
        with torch.inference_mode():
            drawn = guider.sample(noise, torch.zeros_like(noise), KSAMPLER(twice, {}), torch.tensor([0.7] * 3), disable_pbar=True, seed=0)
        found.append(drawn)
    assert log.last.hit_ratio == 0.5 and distance(found[1], 0.7 * noise) > 0.1
    # block_delta takes a difference and adds it again; output divides by sigma and multiplies: a few roundings of float32.
    torch.testing.assert_close(found[0], found[1], atol=0 if target == "last_block" else 2e-5, rtol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pattern", [[True] * 99, [True, False, False, True] * 30], ids=["split", "changing"])
def test_split_conditions_give_what_joined_ones_give(precise, cached, split, target, pattern):
    noise = precise.noise([1, 2, 3])
    prompts = [PROMPT, "noto fox on green", "twemoji rocket on black"]
    model, log = cached(target, interval=3, model=precise.model)
    joined = precise.sample(prompts, noise, steps=STEPS, model=model)
    split(pattern)
    apart = precise.sample(prompts, noise, steps=STEPS, model=model)
    torch.testing.assert_close(apart, joined, atol=1e-5, rtol=0)
    first, second = ([(visit.decision, visit.u) for visit in run.visits] for run in log.runs)
    assert first == second and log.runs[0].hit_ratio == log.runs[1].hit_ratio == 4 / 8
    assert log.runs[1].calls > log.runs[0].calls


@pytest.mark.parametrize("target", TARGETS)
def test_pictures_of_a_batch_do_not_mix(precise, cached, target):
    """Three prompts in one batch under guidance: each picture is what it is alone."""
    prompts = [PROMPT, "noto fox on green", "twemoji rocket on black"]
    model, _ = cached(target, interval=3, model=precise.model)
    together = precise.sample(prompts, precise.noise([1, 2, 3]), steps=STEPS, model=model)
    for i, prompt in enumerate(prompts):
        alone = precise.sample(prompt, precise.noise([i + 1]), steps=STEPS, model=model)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target, blocks", [("output", ""), ("last_block", ""), ("block_delta", "double:1-, single"), ("block_delta", "")])
def test_skipped_visits_make_the_calls_they_should(tiny, cached, target, blocks):
    """No network call at target output; with block targets the forward runs, without the blocks of the range."""
    calls, model = Calls(), None
    model, log = cached(target, interval=3, blocks=blocks, model=calls.on(tiny.model))
    blocks_run = []
    for module in (*tiny.model.model.diffusion_model.double_blocks, *tiny.model.model.diffusion_model.single_blocks):
        blocks_run.append(module.register_forward_hook(lambda *a: executed.append(1)))
    executed: list[int] = []
    try:
        tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    finally:
        for handle in blocks_run:
            handle.remove()
    assert log.last.full_visits == 4 and log.last.calls_made == 4
    assert calls.made == (4 if target == "output" else 8)
    outside = 1 if blocks else 0
    assert len(executed) == 4 * len(blocks_run) + (0 if target == "output" else 4 * outside)


@pytest.mark.parametrize("target", TARGETS)
def test_a_host_that_writes_into_what_it_is_given_corrupts_nothing(tiny, cached, target):
    """The incident: blocks and hosts add to tensors in place, and a cache that keeps those very tensors returns rubbish."""

    def scribbling_wrapper(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        kept = out.clone()
        out.add_(1e3)
        return kept

    def scribbling_patch(args, extra):
        out = extra["original_block"](args)
        handed_on = {name: value.clone() for name, value in out.items()}
        for value in out.values():
            value.add_(1e3)
        return handed_on

    noisy = tiny.model.clone()
    noisy.add_wrapper_with_key("apply_model", "scribble", scribbling_wrapper)
    for kind, i in (("double_block", 0), ("single_block", 0)):
        noisy.set_model_patch_replace(scribbling_patch, "dit", kind, i)
    noise = tiny.noise([5])
    clean, _ = cached(target, interval=3)
    dirty, log = cached(target, interval=3, model=noisy)
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=dirty), tiny.sample(PROMPT, noise, steps=STEPS, model=clean))
    assert (log.last.bypassed_patches > 0) is (target != "output")


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_model_run_twice_and_in_other_sizes_gives_the_same(tiny, cached, target):
    model, log = cached(target, interval=3)
    small, large = tiny.noise([1]), tiny.noise([2], (96, 64))
    first = tiny.sample(PROMPT, small, steps=STEPS, model=model)
    tiny.sample(PROMPT, large, steps=STEPS, model=model)
    assert torch.equal(tiny.sample(PROMPT, small, steps=STEPS, model=model), first)
    assert [run.full_visits for run in log.runs] == [4, 4, 4] and ladders_alive() == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_failure_at_any_call_leaves_nothing_behind(tiny, cached, at, error):
    calls = Calls(at, error)
    model, log = cached("last_block", interval=3, model=calls.on(tiny.model))
    options = repr(sorted(model.model_options["transformer_options"]))
    with pytest.raises(error, match="at this call"):
        tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    assert not log.last.finished and "did not finish" in log.last.text()
    assert ladders_alive() == 0
    assert repr(sorted(model.model_options["transformer_options"])) == options and RUN not in options
    calls.fail_at = -1
    fresh, _ = cached("last_block", interval=3)
    again = tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    assert torch.equal(again, tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=fresh))


def test_bypass_and_cache_off_give_the_plain_picture(tiny, cached):
    """A bypassed node hands on the model it was given, which must not have been touched."""
    noise = tiny.noise([1])
    plain = tiny.sample(PROMPT, noise, steps=STEPS)
    model, _ = cached("output", interval=4)
    assert distance(tiny.sample(PROMPT, noise, steps=STEPS, model=model), plain) > 0
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS), plain)
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=detach(model)), plain)
    (off,) = NODES["RectiflowCacheOff"]().execute(model=model)
    assert attach(off, CachePlan(TaylorSeer()), None, "test") is not off  # free for another cache


def test_a_new_keyword_in_the_hosts_call_passes_through(tiny, cached):
    """The incident: a core that hands one more argument to the model breaks wrappers that spell the arguments out."""
    seen = []

    def newer_host(executor, *args, **kwargs):
        return executor(*args, **kwargs, invented_later=7)

    def taker(executor, *args, **kwargs):
        seen.append(kwargs.pop("invented_later"))
        return executor(*args, **kwargs)

    model, _ = cached("last_block", interval=3)
    newer = model.clone()
    # The engine's own wrapper moves to the front of those on the patcher; what a core does itself lies outside it.
    for kind, wrapper in (("outer_sample", newer_host), ("outer_sample", taker)):
        newer.add_wrapper_with_key(kind, wrapper.__name__, wrapper)
    newer.wrappers["outer_sample"] = {
        name: newer.wrappers["outer_sample"][name] for name in ("newer_host", "rectiflow_cache", "taker")
    }
    noise = tiny.noise([1])
    expected = tiny.sample(PROMPT, noise, steps=STEPS, model=model)
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=newer), expected) and seen == [7]
    base = tiny.model.model
    original = base.apply_model
    try:
        base.apply_model = lambda x, t, **kwargs: original(x, t, **kwargs, invented_later=torch.ones(len(x)))
        assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=model), expected)
    finally:
        del base.apply_model


@pytest.mark.parametrize("target", TARGETS)
def test_solvers_with_two_evaluations_a_step(tiny, cached, target):
    """Heun meets each sigma twice and RF-Solver stands between steps: finite, counted in visits, identical with interval 1."""
    from rectiflow.host import KSAMPLER, CFGGuider, sampler_object

    noise = tiny.noise([1])
    steps = 6
    sigmas = torch.linspace(1, 0, steps + 1)
    for sampler in (sampler_object("heun"), KSAMPLER(sample_rf_solver, {})):

        def run(model, sampler=sampler):
            guider = CFGGuider(model)
            guider.set_conds(tiny.conditioning(PROMPT), tiny.conditioning(""))
            guider.set_cfg(3.0)
            with torch.inference_mode():
                return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)

        plain = run(tiny.model)
        off, log = cached(target, interval=1)
        assert torch.equal(run(off), plain)
        evaluations = len(log.last.visits)
        assert evaluations in (2 * steps - 1, 2 * steps)
        model, log = cached(target, interval=2)
        assert distance(run(model), plain) < 0.25
        assert len(log.last.visits) == evaluations and 0.2 < log.last.hit_ratio < 0.5


@pytest.mark.parametrize("target", TARGETS)
def test_rising_schedules_and_parts_of_one(tiny, cached, target):
    """Inversion and a split sampler: each part is a run of its own and stays close to the uncached one."""
    from rectiflow.samplers.inversion import InvertSampler

    picture = tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS)
    for sampler, sigmas in ((InvertSampler("euler", {}, False), torch.linspace(0, 1, 13)), (None, torch.linspace(0.6, 0.1, 11))):
        from rectiflow.host import CFGGuider, sampler_object

        model, log = cached(target, interval=2)
        found = []
        for m in (model, tiny.model):
            guider = CFGGuider(m)
            guider.set_conds(tiny.conditioning(PROMPT), tiny.conditioning(""))
            with torch.inference_mode():
                found.append(guider.sample(tiny.noise([2]), picture, sampler or sampler_object("euler"), sigmas, disable_pbar=True, seed=0))
        assert distance(*found) < 0.2 and log.last.hit_ratio > 0.3


def test_two_caches_on_one_model_are_refused(tiny, cached):
    model, _ = cached()
    with pytest.raises(NodeInputError, match="input 'model' got 'a model with a cache'.*Cache Off"):
        cached(model=model)


def test_two_clones_with_different_caches_share_nothing(tiny, cached):
    noise = tiny.noise([1])
    (a, log_a), (b, log_b) = cached("output", interval=2), cached("last_block", interval=4)
    alone = [tiny.sample(PROMPT, noise, steps=STEPS, model=m) for m in (a, b)]
    turns = [tiny.sample(PROMPT, noise, steps=STEPS, model=m) for m in (b, a)]
    assert torch.equal(turns[0], alone[1]) and torch.equal(turns[1], alone[0])
    assert (len(log_a.runs), len(log_b.runs)) == (2, 2)


def test_the_memory_cap_lowers_the_order_and_bytes_are_what_is_kept(tiny, cached):
    noise = tiny.noise([1])
    tokens = 8 * 8 * tiny.model.model.diffusion_model.hidden_size * 4
    free, log = cached(order=2, interval=3)
    tiny.sample(PROMPT, noise, steps=STEPS, model=free)
    assert (log.last.peak_bytes, log.last.order) == (2 * 3 * tokens, 2)  # two conditions, three factors each
    capped, log = cached(order=2, interval=3, cap=4 * tokens)
    order_1, _ = cached(order=1, interval=3)
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=capped), tiny.sample(PROMPT, noise, steps=STEPS, model=order_1))
    assert (log.last.peak_bytes, log.last.order) == (4 * tokens, 1) and "memory cap" in log.last.text()
    tight, log = cached(order=2, interval=3, cap=tokens)
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=tight), tiny.sample(PROMPT, noise, steps=STEPS))
    assert log.last.order == -1 and log.last.hit_ratio == 0 and "no gain" in log.last.text()


def test_values_that_are_no_numbers_are_not_kept(tiny, cached):
    broken = tiny.model.clone()

    def patch(args, extra):
        out = extra["original_block"](args)
        return {name: value * float("nan") for name, value in out.items()}

    broken.set_model_patch_replace(patch, "dit", "double_block", 0)
    model, log = cached(interval=3, model=broken)
    tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    assert log.last.hit_ratio == 0 and "not a finite number at sigma 1" in log.last.text()


def test_another_block_patch_in_the_same_visit_has_a_history_of_its_own(tiny, cached):
    """A third call at the same sigma with the same uuid and a left-out block, as skipped-layer guidance makes it."""

    def skip_block(args, extra):
        return {"img": args["img"]}

    def third_call(args):
        options = sampling_function.merge_nested_dicts(args["model_options"], {"transformer_options": {}})
        options["transformer_options"]["patches_replace"] = {"dit": {("single_block", 1): skip_block}}
        (weak,) = sampling_function.calc_cond_batch(args["model"], [args["conds"][0]], args["input"], args["sigma"], options)
        return [args["conds_out"][0] + 0.5 * (args["conds_out"][0] - weak), args["conds_out"][1]]

    guided = tiny.model.clone()
    guided.model_options["sampler_pre_cfg_function"] = [third_call]
    model, log = cached("last_block", interval=2, model=guided)
    near = tiny.sample(PROMPT, tiny.noise([1]), steps=12, model=model)
    assert distance(near, tiny.sample(PROMPT, tiny.noise([1]), steps=12, model=guided)) < 0.25
    assert len(log.last.visits) == 12 and all(visit.full + visit.forecast == 3 for visit in log.last.visits)


@pytest.mark.parametrize("axis", ["sigma", "step"])
def test_a_velocity_that_is_a_polynomial_is_forecast_exactly(tiny, axis):
    """The host's model answers v = 1 + 2σ − 3σ² (on even steps the same in u): order 2 loses nothing, order 1 and 0 do."""

    def parabola(executor, *args, **kwargs):
        x, sigma = args[0], float(args[1][0])
        return x - sigma * (1 + 2 * sigma - 3 * sigma**2)

    known = tiny.model.clone()
    known.add_wrapper_with_key("apply_model", "parabola", parabola)
    sigmas = torch.linspace(1, 0, 21)
    plain = tiny.sample(PROMPT, tiny.noise([1]), model=known, sigmas=sigmas, cfg=1.0)
    errors = []
    for order in range(3):
        plan = CachePlan(TaylorSeer(order, "newton", axis, 4), "output", Limits(3, 1))
        log = CacheLog()
        errors.append(distance(tiny.sample(PROMPT, tiny.noise([1]), model=attach(known, plan, log, "test"), sigmas=sigmas, cfg=1.0), plain))
        assert log.last.hit_ratio > 0.5
    # x − σ·v and back at float32 with σ down to 0.05, over 12 forecasts.
    assert errors[2] < 1e-5 and errors[0] > errors[1] > 1e-3


@pytest.mark.parametrize("inputs, says", [
    ({"start": 0.8, "end": 0.2}, "start_percent"), ({"blocks": "double:0, single:1", "target": "block_delta"}, "without gaps"),
    ({"blocks": "nonsense", "target": "block_delta"}, "blocks"), ({"target": "condition"}, "granularity"),
    ({"warmup_steps": -1}, "warmup_steps"),
])  # fmt: skip
def test_bad_input_is_named(cached, inputs, says):
    with pytest.raises(NodeInputError, match=says):
        cached(**inputs)


def test_the_report_says_what_happened(tiny):
    numbers = {"interval": 3, "order": 1, "warmup_steps": 2, "tail_steps": 1, "start_percent": 0.0, "end_percent": 1.0}
    model, log = NODES["RectiflowTaylorForecastCache"]().execute(
        model=tiny.model, granularity="last_block", basis="newton", axis="step", **numbers
    )
    report = NODES["RectiflowCacheReport"]()
    with pytest.raises(NodeInputError, match="a cache that has not run"):
        report.execute(report=log, after=None)
    tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    text, raw, ratio, calls = report.execute(report=log, after=None)
    assert "visits: FF··F··F" in text and "2 warm-up, 1 interval, 1 tail" in text
    data = json.loads(raw)
    assert (ratio, calls) == (data["hit_ratio"], 4) == (0.5, data["calls_made"])
    assert [visit["decision"] for visit in data["visits"]].count("forecast") == 4
    assert data["seconds"] >= data["seconds_full"] > data["seconds_forecast"] > 0
    few, log = NODES["RectiflowIntervalCache"]().execute(
        model=tiny.model, interval=2, warmup_steps=9, tail_steps=1, granularity="output", start_percent=0.0, end_percent=1.0
    )
    tiny.sample(PROMPT, tiny.noise([1]), steps=4, model=few)
    assert "no gain" in log.last.text()
