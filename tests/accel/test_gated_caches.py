"""Gated caches on the tiny model: the incidents that users report of such caches elsewhere, for every rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from rectiflow.accel.cache.binding import RUN, attach
from rectiflow.accel.cache.confidence import ConfidenceGatedTaylor
from rectiflow.accel.cache.first_block import FirstBlockGate
from rectiflow.accel.cache.input_change import InputChangeGate
from rectiflow.accel.cache.magnitude import MagnitudeRule
from rectiflow.accel.cache.modulated import ModulatedInputGate
from rectiflow.accel.cache.policy import Action, Choice, Limits, Policy
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.errors import NodeInputError
from rectiflow.families.modulation import modulated_input
from rectiflow.host.embedded import sampling_function
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES
from rectiflow.tests.accel.test_cache import Calls, distance, ladders_alive

PROMPT = "noto cat on blue"
PROMPTS = [PROMPT, "noto fox on green", "twemoji rocket on black"]
STEPS = 8
# Thresholds at which each rule skips some of eight steps and not all.
RULES = {
    "confidence": (ConfidenceGatedTaylor(threshold=0.15), "last_block"),
    "first_block": (FirstBlockGate(threshold=0.6), "block_delta"),
    "modulated_input": (ModulatedInputGate(threshold=0.6), "block_delta"),
    "input_change": (InputChangeGate(threshold=0.5), "output"),
    "input_change x": (InputChangeGate(threshold=0.5), "output_delta"),
    "magnitude": (MagnitudeRule(threshold=0.1, ratios=(1.04,) * STEPS), "block_delta"),
}
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


@pytest.fixture
def gated(tiny):
    """gated(rule, …): (MODEL, CacheLog) with a warm-up of two steps."""

    def make(rule, model=None, limits=None, **changed):
        policy, target = RULES[rule]
        log = CacheLog()
        return attach(model or tiny.model, CachePlan(replace(policy, **changed), target, limits or Limits(2, 1)), log, "test"), log

    return make


def decisions(record) -> str:
    return "".join("F" if visit.decision == "full" else "." for visit in record.visits)


@EVERY_RULE
def test_threshold_0_is_bit_identical_and_keeps_nothing(tiny, gated, rule):
    model, log = gated(rule, threshold=0.0)
    noise = tiny.noise([1])
    assert torch.equal(tiny.sample(PROMPT, noise, steps=4, model=model), tiny.sample(PROMPT, noise, steps=4))
    assert (log.last.hit_ratio, log.last.peak_bytes) == (0.0, 0)


@EVERY_RULE
def test_a_huge_threshold_skips_all_but_warm_up_and_tail(tiny, gated, rule):
    model, log = gated(rule, threshold=1e9)
    tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    assert decisions(log.last) == "FF.....F"


@EVERY_RULE
def test_a_step_that_stands_still_is_skipped_without_a_trace(tiny, gated, rule):
    """The same sigma again: every sign says that nothing changed, and what is put back is what was captured."""
    sigmas = torch.tensor([0.7, 0.7, 0.7, 0.7, 0.7])
    noise = tiny.noise([3])
    model, log = gated(rule, limits=Limits(0, 0), **({"ratios": (1.0,)} if rule == "magnitude" else {}))
    both = [tiny.sample(PROMPT, noise, model=m, sigmas=sigmas) for m in (model, tiny.model)]
    # With an input that stands still there is no rate to measure; that rule computes.
    assert decisions(log.last) == ("FFFF" if rule.startswith("input") else "F...")
    # Differences that are added again, and a division by sigma: a few roundings of float32.
    torch.testing.assert_close(*both, atol=2e-5, rtol=0)


@pytest.fixture
def order_of_calls(monkeypatch):
    """order_of_calls(pattern, reverse): which conditions share a call, and in what order the host hands them over."""
    joined, batches = sampling_function._choose_batch, sampling_function._calc_cond_batch

    def install(pattern, reverse=False):
        turns = iter(pattern)
        turned = slice(None, None, -1 if reverse else 1)
        monkeypatch.setattr(sampling_function, "_choose_batch", lambda *a: joined(*a)[: 1 if next(turns, pattern[-1]) else None])
        monkeypatch.setattr(sampling_function, "_calc_cond_batch", lambda model, conds, *a: batches(model, conds[turned], *a)[turned])

    return install


@EVERY_RULE
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reversed"])
def test_split_conditions_decide_and_give_what_joined_ones_do(precise, gated, order_of_calls, rule, reverse):
    """Three prompts in a batch under guidance; conditions in one call, in two, and changing between the two."""
    noise = precise.noise([1, 2, 3])
    model, log = gated(rule, model=precise.model)
    found = []
    for pattern in ([False], [True], [True, False, False, True] * 30):
        order_of_calls(pattern, reverse)
        found.append(precise.sample(PROMPTS, noise, steps=STEPS, model=model))
    assert decisions(log.runs[0]) == decisions(log.runs[1]) == decisions(log.runs[2]) and 0 < log.runs[0].hit_ratio < 0.8
    assert log.runs[1].calls == 2 * log.runs[0].calls
    for apart in found[1:]:
        torch.testing.assert_close(apart, found[0], atol=1e-5, rtol=0)


@dataclass(frozen=True)
class Replay(Policy):
    """Decisions of another run."""

    mask: str = ""

    def decide(self, visit):
        return Choice(Action.SKIP if self.mask[visit.index] == "." else Action.FULL, "replay")

    def line(self):
        return "replay"


def test_pictures_of_a_batch_under_guidance_do_not_mix(precise, gated):
    """Elsewhere each condition's difference is added to the whole batch; here a picture is what it is alone with the same steps skipped."""
    model, log = gated("input_change x", model=precise.model)
    together = precise.sample(PROMPTS, precise.noise([1, 2, 3]), steps=STEPS, model=model)
    mask = decisions(log.last)
    assert "." in mask
    for i, prompt in enumerate(PROMPTS):
        replayed = attach(precise.model, CachePlan(Replay(mask=mask), "output_delta"), CacheLog(), "test")
        alone = precise.sample(prompt, precise.noise([i + 1]), steps=STEPS, model=replayed)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


@EVERY_RULE
def test_a_host_that_writes_into_what_it_is_given_corrupts_nothing(tiny, gated, rule):
    def scribbling_wrapper(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        kept = out.clone()
        out.add_(1e3)
        return kept

    def scribbling_patch(args, extra):
        out = extra["original_block"](args)
        handed_on = {name: value.clone() for name, value in out.items()}
        for value in (*out.values(), args["img"]):
            value.add_(1e3)
        return handed_on

    noisy = tiny.model.clone()
    noisy.add_wrapper_with_key("apply_model", "scribble", scribbling_wrapper)
    for kind, i in (("double_block", 0), ("single_block", 0)):
        noisy.set_model_patch_replace(scribbling_patch, "dit", kind, i)
    noise = tiny.noise([5])
    (clean, clean_log), (dirty, log) = gated(rule), gated(rule, model=noisy)
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=dirty), tiny.sample(PROMPT, noise, steps=STEPS, model=clean))
    assert decisions(log.last) == decisions(clean_log.last) and "." in decisions(log.last)


@EVERY_RULE
def test_the_same_model_run_twice_in_other_sizes_and_after_a_failure(tiny, gated, rule):
    calls = Calls()
    model, log = gated(rule, model=calls.on(tiny.model))
    noise = tiny.noise([1])
    first = tiny.sample(PROMPT, noise, steps=STEPS, model=model)
    tiny.sample(PROMPT, tiny.noise([2], (96, 64)), steps=4, model=model)
    calls.made, calls.fail_at = 0, 3
    with pytest.raises(RuntimeError, match="at this call"):
        tiny.sample(PROMPT, noise, steps=STEPS, model=model)
    assert ladders_alive() == 0 and RUN not in model.model_options["transformer_options"]
    calls.fail_at = -1
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=model), first)
    assert decisions(log.runs[0]) == decisions(log.runs[-1]) and not log.runs[2].finished


def test_a_new_keyword_in_the_hosts_call_passes_through_a_gate(tiny, gated):
    model, _ = gated("confidence")
    noise = tiny.noise([1])
    expected = tiny.sample(PROMPT, noise, steps=STEPS, model=model)
    base = tiny.model.model
    original = base.apply_model
    try:
        base.apply_model = lambda x, t, **kwargs: original(x, t, **kwargs, invented_later=torch.ones(len(x)))
        assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=model), expected)
    finally:
        del base.apply_model


@pytest.mark.parametrize("rule, alone", [("confidence", 1), ("first_block", 1), ("modulated_input", 0)])
def test_an_accepted_step_runs_the_blocks_it_should(tiny, gated, rule, alone):
    executed: list[int] = []
    transformer = tiny.model.model.diffusion_model
    modules = (*transformer.double_blocks, *transformer.single_blocks)
    handles = [module.register_forward_hook(lambda *a: executed.append(1)) for module in modules]
    model, log = gated(rule, threshold=1e9)
    try:
        tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    finally:
        for handle in handles:
            handle.remove()
    assert len(executed) == 3 * len(modules) + 5 * alone and log.last.calls_made == 3


def test_a_value_that_is_no_number_is_not_kept_and_opens_no_gate(tiny, gated):
    def patch(args, extra):
        return {name: value * float("nan") for name, value in extra["original_block"](args).items()}

    broken = tiny.model.clone()
    broken.set_model_patch_replace(patch, "dit", "double_block", 0)
    for rule in ("confidence", "first_block"):
        model, log = gated(rule, model=broken, threshold=1e9)
        tiny.sample(PROMPT, tiny.noise([1]), steps=4, model=model)
        assert log.last.hit_ratio == 0 and "not a finite number" in log.last.text()


def test_the_modulated_input_is_what_the_first_attention_reads(tiny):
    """Caught at the layer that makes queries, keys and values of it."""
    transformer = tiny.model.model.diffusion_model
    read, block = modulated_input(transformer, "test"), transformer.double_blocks[0]
    pairs, ours = [], []

    def patch(args, extra):
        ours.append(read(args))
        return extra["original_block"](args)

    handle = block.img_attn.qkv.register_forward_pre_hook(lambda module, args: pairs.append(args[0]))
    model = tiny.model.clone()
    model.set_model_patch_replace(patch, "dit", "double_block", 0)
    try:
        tiny.sample(PROMPT, tiny.noise([1]), steps=2, model=model)
    finally:
        handle.remove()
    assert len(pairs) == len(ours) == 2
    for theirs, mine in zip(pairs, ours):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_most_in_a_row_and_second_evaluations_hold_for_every_policy(tiny, gated):
    model, log = gated("confidence", threshold=1e9, limits=Limits(2, 1, max_consecutive=2))
    tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    assert decisions(log.last) == "FF..F..F"
    model, log = gated("input_change", threshold=1e9, limits=Limits(2, 1, solver_rule="first_only"))
    tiny.sample(PROMPT, tiny.noise([1]), steps=6, model=model, sampler="heun")
    reasons = [visit.reason for visit in log.last.visits[5:9]]
    assert reasons == ["second evaluation", "little change"] * 2


LIMITS = {"start_percent": 0.0, "end_percent": 1.0}


def test_a_calibrated_curve_drives_the_rules_that_need_one(tiny):
    noise = tiny.noise([1, 2])
    model, log = NODES["RectiflowReuseCalibrate"]().execute(model=tiny.model)
    plain = tiny.sample(PROMPTS[:2], noise, steps=STEPS)
    latent = tiny.sample(PROMPTS[:2], noise, steps=STEPS, model=model)
    assert torch.equal(latent, plain) and log.last.full_visits == STEPS
    curves = NODES["RectiflowReuseCurve"]().execute(report=log, after=latent, degree=2)
    assert [len(curve.split(", ")) for curve in curves] == [STEPS, 3] and curves[0].startswith("1, ")
    for rule, threshold, curve in zip(("magnitude", "modulated_input"), (0.15, 0.3), curves):
        widgets = {"threshold": threshold, "max_consecutive": 3, "warmup_steps": 1, "tail_steps": 1, "forecast_order": 0, **LIMITS}
        cached, report = NODES["RectiflowReuseCache"]().execute(model=tiny.model, rule=rule, curve=curve, **widgets)
        near = tiny.sample(PROMPTS[:2], noise, steps=STEPS, model=cached)
        assert 0 < report.last.hit_ratio < 1 and distance(near, plain) < 0.5


def test_what_cannot_be_is_refused_by_name(tiny):
    node = NODES["RectiflowReuseCache"]()
    widgets = {"threshold": 0.1, "max_consecutive": 3, "warmup_steps": 1, "tail_steps": 1, "forecast_order": 0, **LIMITS}
    with pytest.raises(NodeInputError, match="Reuse Cache.*'curve' got 'none'.*Reuse Calibrate"):
        node.execute(model=tiny.model, rule="magnitude", curve="", **widgets)
    with pytest.raises(NodeInputError, match="'curve' got '2 numbers'.*first_block"):
        node.execute(model=tiny.model, rule="first_block", curve="1, 2", **widgets)
    with pytest.raises(NodeInputError, match="granularity.*first block"):
        attach(tiny.model, CachePlan(FirstBlockGate(), "output"), CacheLog(), "test")
    with pytest.raises(NodeInputError, match="Reuse Curve.*'report'.*without measured ratios"):
        NODES["RectiflowReuseCurve"]().execute(report=CacheLog(), after=None, degree=2)


def test_gate_calibrate_tells_what_each_threshold_would_accept(tiny):
    model, log = NODES["RectiflowGateCalibrate"]().execute(
        model=tiny.model, thresholds="0.01, 0.1, 1", last_order=1, first_order=1, warmup_steps=2, gate="hidden", gate_reduce="mean"
    )
    noise = tiny.noise([1])
    assert torch.equal(tiny.sample(PROMPT, noise, steps=STEPS, model=model), tiny.sample(PROMPT, noise, steps=STEPS))
    found = log.last.findings
    assert list(found["accepted"]) == ["0.01", "0.1", "1"] and found["accepted"]["1"] == len(found["errors"]) == STEPS - 2
    assert "accepted: {'0.01': " in log.last.text()
