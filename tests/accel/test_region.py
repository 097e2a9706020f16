"""Whole runs under RAS, on toy transformers and on the tiny model."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from rectiflow.accel.cache.binding import attach as attach_cache
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.accel.region.binding import RUN, attach, detach
from rectiflow.accel.region.kv_cache import KVStore
from rectiflow.accel.region.plan import RegionPlan
from rectiflow.accel.region.report import RegionLog
from rectiflow.accel.region.run import RegionRun
from rectiflow.errors import NodeInputError
from rectiflow.tests.accel.region_toys import FAMILIES, conditioning, noise, sample, toy, with_ras
from rectiflow.tests.models.small_models import random

PROMPT = "noto cat on blue"


@pytest.fixture(scope="module")
def toys():
    return {family: toy(family) for family in FAMILIES}


def phases(log: RegionLog) -> str:
    return "".join(visit.phase[0] for visit in log.last.visits)


# Off is off ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("off", [{"ratio": 1.0}, {"start": 99}, {"start": 0, "end": 0}], ids=str)
def test_ratio_one_and_phase_off_are_bit_identical(toys, family, off):
    """Done 1: no gather, no store, the same bits."""
    model, log = with_ras(toys[family], **off)
    x = noise(2)
    assert torch.equal(sample(model, x), sample(toys[family], x))
    assert log.last.share == 1.0 and log.last.kv_bytes == 0 and log.last.finished


def test_dense_steps_of_a_run_are_bit_identical(toys):
    """Storing keys and values changes nothing: up to the first step over part of the tokens the latents are the same bits."""
    seen = {}
    for name, model in (("ras", with_ras(toys["flux"], start=4)[0]), ("plain", toys["flux"])):
        latents = seen[name] = []
        sample(model, noise(), callback=lambda step, x0, x, total, kept=latents: kept.append(x.clone()))
    assert all(torch.equal(a, b) for a, b in zip(seen["ras"][:5], seen["plain"][:5]))
    assert not torch.equal(seen["ras"][7], seen["plain"][7])


def test_taking_it_off_restores_the_model(toys):
    model, log = with_ras(toys["lumina2"])
    x = noise()
    assert torch.equal(sample(detach(model), x), sample(toys["lumina2"], x)) and log.last is None


# What a run does -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(6, 8), (7, 11), (10, 4)])
def test_phases_and_tokens_follow_the_plan(toys, family, size):
    model, log = with_ras(toys[family], ratio=0.25, start=2, resets=(5,), end=7)
    out = sample(model, noise(2, size))
    n = -(-size[0] // 2) * -(-size[1] // 2)
    assert phases(log) == "ddaaadad" and out.isfinite().all() and log.last.tokens == n
    assert [visit.tokens for visit in log.last.visits] == [n if phase == "d" else n - int(0.75 * n) for phase in "ddaaadad"]
    counts, active = log.last.counts()
    assert active == 4 and counts.shape == (2, n) and counts.sum() == 2 * 4 * (n - int(0.75 * n))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", [[True] * 99, [True, False, False, True] * 30], ids=["split", "changing"])
def test_split_conditions_give_what_joined_ones_give(toys, split, family, pattern):
    model, log = with_ras(toys[family])
    x = noise(2)
    joined = sample(model, x)
    split(pattern)
    apart = sample(model, x)
    # Rows of another batch size add up in another order; a random network under guidance enlarges that over six steps.
    torch.testing.assert_close(apart, joined, atol=2e-3, rtol=1e-3)
    assert log.runs[0].share == log.runs[1].share < 1.0 and not log.last.notes


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_a_batch_choose_their_own_tokens(toys, family):
    model, log = with_ras(toys[family], ratio=0.4)
    x = noise(3)
    together = sample(model, x)
    masks = log.last.masks[0][1]
    assert not torch.equal(masks[0], masks[1])
    for i in range(3):
        alone = sample(model, x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-3, rtol=1e-3)


def test_texts_of_two_lengths(toys):
    """Conditions whose texts differ in length; the host may repeat the shorter one when it joins them."""
    model, log = with_ras(toys["flux"])
    assert sample(model, noise(), tokens=(10, 5)).isfinite().all() and phases(log) == "ddaaaaaa"


def test_interrupt_and_another_size_right_after(toys):
    """Done 7: the run that was stopped leaves no run, no store and no history behind, and the next one is what a fresh model gives."""

    def alive() -> int:
        gc.collect()
        return sum(type(found) in (RegionRun, KVStore) for found in gc.get_objects())

    model, log = with_ras(toys["flux"])

    def stop(step, x0, x, total):
        if step == 4:
            raise KeyboardInterrupt

    before = alive()
    with pytest.raises(KeyboardInterrupt):
        sample(model, noise(), callback=stop)
    assert alive() == before and not log.last.finished and RUN not in model.model_options["transformer_options"]
    other = noise(2, (10, 6), seed=8)
    assert torch.equal(sample(model, other), sample(with_ras(toy("flux"))[0], other)) and log.last.finished


def test_two_runs_in_one_process_are_the_same(toys):
    model, log = with_ras(toys["sd3"], starvation=1.0)
    first = sample(model, noise())
    assert torch.equal(sample(model, noise()), first) and torch.equal(log.runs[0].counts()[0], log.runs[1].counts()[0])


@pytest.mark.parametrize("sampler, steps", [("heun", 6), ("dpm_2", 6), ("dpmpp_2m", 8), ("euler_ancestral", 8)])
def test_solvers_with_other_evaluations(toys, sampler, steps):
    """Every evaluation of a step shares its tokens: D counts once a step, and the set is the same at both evaluations."""
    model, log = with_ras(toys["flux"], start=2)
    assert sample(model, noise(), steps=steps, sampler=sampler).isfinite().all()
    by_step: dict[int, set] = {}
    for visit in log.last.visits:
        by_step.setdefault(visit.step, set()).add((visit.phase, visit.tokens))
    assert all(len(found) == 1 for found in by_step.values()), by_step
    assert [step for step, _ in log.last.masks] == [step for step in by_step if step >= 2]


def test_heun_freezes_the_set_within_a_step(toys):
    """The second evaluation of a step stands on the sigma of the next step's first one: the same tokens as in its own step's first."""
    model, log = with_ras(toys["flux"], start=2)
    sample(model, noise(), steps=5, sampler="heun")
    assert [visit.step for visit in log.last.visits] == [0, 1, 1, 1, 2, 2, 3, 3, 4]
    assert phases(log) == "ddddaaaaa"


def test_two_evaluations_give_tokens_left_out_one_velocity():
    """v(x, sigma) seen by the solver: equal at both evaluations where a token is left out, so its derivative term is zero."""
    model, log = with_ras(toy("flux"), start=2)
    seen = []

    def watch(executor, x, timestep, *args, **kwargs):
        out = executor(x, timestep, *args, **kwargs)
        seen.append((x - out) / timestep.reshape(-1, 1, 1, 1))
        return out

    watched = model.clone()
    watched.wrappers["predict_noise"] = {"watch": [watch], **watched.wrappers["predict_noise"]}
    sample(watched, noise(), steps=5, sampler="heun", cfg=1.0)
    same = seen[4] == seen[5]
    mask = dict(log.last.masks)[2].reshape(1, 1, 3, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).expand_as(same)
    close = (seen[4] - seen[5]).abs() < 1e-5  # x and denoised are subtracted and added again
    assert close[~mask].all() and not close[mask].all()


# Sets ------------------------------------------------------------------------------------------------------------------------


def test_dropped_tokens_are_counted_once_a_step(toys):
    """Done 4, on a run: what the next choice sees of D is the number of steps in which a token was left out."""
    model, log = with_ras(toys["flux"], ratio=0.5, starvation=0.7, resets=(4,))
    counted = []
    grown = RegionRun.finish

    def finish(self, *args):
        grown(self, *args)
        counted.append(self.left.clone())

    RegionRun.finish = finish
    try:
        sample(model, noise(), sampler="heun")
    finally:
        RegionRun.finish = grown
    counts, active = log.last.counts()
    assert torch.equal(counted[-1], active - counts) and active == 5


def test_region_mask_keeps_its_tokens_computed(toys):
    mask = torch.zeros(1, 48, 64)
    mask[:, :16, :32] = 1.0
    model, log = with_ras(toys["sd3"], ratio=0.5, always=mask)
    sample(model, noise())
    inside = torch.zeros(3, 4, dtype=torch.bool)
    inside[:1, :2] = True
    for _, active in log.last.masks:
        assert active[0, inside.flatten()].all() and active.sum() == 6


def test_a_mask_over_everything_computes_everything(toys):
    """As ratio 1, but through the gather: the bits may differ by the order of sums."""
    model, log = with_ras(toys["flux"], always=torch.ones(1, 6, 8))
    torch.testing.assert_close(sample(model, noise()), sample(toys["flux"], noise()), atol=2e-3, rtol=1e-3)
    assert log.last.share == 1.0


def test_inpainting_leaves_out_what_is_wholly_outside(toys):
    mask = torch.zeros(1, 1, 6, 8)
    mask[..., 2:5, 3:] = 1.0  # cuts tokens of the second column and the last row
    model, log = with_ras(toys["flux"], ratio=0.5)
    latent = random(1, 16, 6, 8, seed=77)
    out = sample(model, noise(), mask=mask, latent=latent)
    outside = mask.expand_as(out) == 0
    torch.testing.assert_close(out[outside], latent[outside])
    for _, active in log.last.masks:
        grid = active.reshape(3, 4)
        assert not grid[0].any() and not grid[1:, 0].any()
        assert grid[1, 1] and grid[2, 1:].all()


def test_squares_of_tokens_are_chosen_together(toys):
    model, log = with_ras(toys["flux"], ratio=0.4, cell=2, starvation=0.5)
    sample(model, noise(1, (8, 12)))
    for _, active in log.last.masks:
        squares = active.reshape(2, 2, 3, 2).permute(0, 2, 1, 3).reshape(6, 4)
        assert (squares.all(dim=1) | ~squares.any(dim=1)).all()


@pytest.mark.parametrize("focus", ["low_std", "high_std", "reference"])
@pytest.mark.parametrize("metric", ["std", "l2norm", "random", "change"])
def test_every_metric_and_focus_runs(toys, focus, metric):
    model, log = with_ras(toys["flux"], focus=focus, metric=metric, high_ratio=0.3)
    first = sample(model, noise(2))
    assert torch.equal(sample(model, noise(2)), first) and phases(log) == "ddaaaaaa"


@pytest.mark.parametrize("focus", ["low_std", "high_std", "reference"])
def test_change_computes_the_tokens_that_move_whatever_focus_says(toys, focus):
    """The network's answer is replaced: the velocity moves in three tokens a picture, others in each, and stays elsewhere."""
    moving = torch.zeros(2, 12, dtype=torch.bool)
    moving[0, [1, 6, 11]] = moving[1, [0, 5, 7]] = True
    slope = moving.reshape(2, 1, 3, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).float()

    def moved(executor, x, t, *args, **kwargs):
        executor(x, t, *args, **kwargs)
        return x - t.square().reshape(-1, 1, 1, 1) * slope.repeat(x.shape[0] // 2, 1, 1, 1)

    model, log = with_ras(toys["flux"].clone(), ratio=0.25, metric="change", focus=focus, starvation=0.0)
    model.add_wrapper_with_key("apply_model", "moved", moved)
    sample(model, noise(2))
    assert len(log.last.masks) == 6 and all(torch.equal(mask, moving) for _, mask in log.last.masks)
    assert "change, starvation" in log.last.text()


# The velocity of tokens left out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1])
def test_order_one_is_exact_where_the_velocity_is_linear_in_sigma(toys, order):
    """The network's answer is replaced by a velocity linear in sigma: order 1 loses nothing, order 0 does."""
    slope, offset = random(1, 16, 6, 8, seed=41), random(1, 16, 6, 8, seed=42)

    def linear(executor, x, t, *args, **kwargs):
        executor(x, t, *args, **kwargs)
        return x - t.reshape(-1, 1, 1, 1) * (offset + slope * t.reshape(-1, 1, 1, 1))

    base = toys["flux"].clone()
    model, log = with_ras(base, ratio=0.25, order=order)
    for one in (model, base):
        one.add_wrapper_with_key("apply_model", "linear", linear)
    error = (sample(model, noise(), cfg=1.0) - sample(base, noise(), cfg=1.0)).abs().max()
    assert (error < 1e-4) if order else (error > 0.05)
    assert phases(log) == "ddaaaaaa"


# With a cache around it ------------------------------------------------------------------------------------------------------


def cached(model, target="output", interval=2, warmup=3, log=None):
    log = CacheLog() if log is None else log
    return attach_cache(model, CachePlan(IntervalReuse(interval=interval), target, Limits(warmup, 0)), log, "test"), log


@pytest.mark.parametrize("ras_first", [True, False])
def test_a_cache_stands_outside(toys, ras_first):
    """A step the cache answers changes nothing here: no token is counted, and no call reaches the network."""
    if ras_first:
        model, log = with_ras(toys["flux"])
        model, cache = cached(model)
    else:
        model, cache = cached(toys["flux"])
        model, log = with_ras(model)
    out = sample(model, noise())
    ours = [visit.phase for visit in log.last.visits]
    theirs = [visit.decision for visit in cache.last.visits]
    assert [phase == "skipped" for phase in ours] == [decision == "forecast" for decision in theirs]
    assert "skipped" in ours and "active" in ours and out.isfinite().all()
    assert len(log.last.masks) == ours.count("active")


def test_a_reset_that_a_cache_skips_is_made_up_for(toys):
    model, log = with_ras(toys["flux"], resets=(4,))
    model, _ = cached(model, interval=2, warmup=4)
    sample(model, noise())
    reasons = [(visit.step, visit.phase, visit.reason) for visit in log.last.visits]
    assert reasons[4][1] == "skipped" and reasons[5][1:] == ("dense", "reset of a skipped step"), reasons
    assert reasons[7][1] == "active"


@pytest.mark.parametrize("target", ["last_block", "block_delta"])
def test_caches_of_tokens_are_refused_by_name(toys, target):
    model, _ = cached(with_ras(toys["flux"])[0], target)
    with pytest.raises(NodeInputError, match="granularity.*output"):
        sample(model, noise())


# Bad input -------------------------------------------------------------------------------------------------------------------


def test_keys_and_values_over_the_cap_are_refused_before_they_are_taken(toys):
    model, log = with_ras(toys["flux"], cap=1 << 10)
    with pytest.raises(NodeInputError, match="MiB of keys and values.*kv_cache to none"):
        sample(model, noise())
    assert log.last.kv_bytes == 0
    model, log = with_ras(toys["flux"], cap=1 << 20)
    sample(model, noise())
    assert log.last.kv_bytes == 2 * 2 * 4 * 12 * 64 * 4  # K and V, two conditions, four layers, 12 tokens of 64 in fp32


def test_a_second_one_and_other_families_are_refused(toys):
    model, _ = with_ras(toys["flux"])
    with pytest.raises(NodeInputError, match="without it"):
        with_ras(model)

    class UNet(torch.nn.Module):
        pass

    class Holder:
        wrappers: dict = {}

        @staticmethod
        def get_model_object(name):
            return UNet()

    with pytest.raises(NodeInputError, match="UNet.*Flux, Chroma, SD3, Lumina 2.*cache node"):
        attach(Holder(), RegionPlan(), RegionLog(), "node")


@pytest.mark.parametrize("wrong, match", [
    ({"cell": 5}, "cell"), ({"always": torch.ones(1, 64, 48)}, "region_mask"), ({"always": torch.ones(3, 6, 8)}, "region_mask"),
])  # fmt: skip
def test_what_does_not_fit_this_size_is_refused_when_it_is_known(toys, wrong, match):
    model, _ = with_ras(toys["flux"], **wrong)
    with pytest.raises(NodeInputError, match=match):
        sample(model, noise())


def test_areas_of_conditions_are_computed_whole(toys):
    """A condition with an area comes as a call of another size."""
    model, log = with_ras(toys["flux"])
    areas = conditioning(5)
    areas[0][1]["area"] = (4, 4, 0, 0)
    whole = conditioning(7)
    positive = [areas[0], whole[0]]
    sample(model, noise(), positive=positive)
    assert any("area" in note for note in log.last.notes)


# The report and the preview --------------------------------------------------------------------------------------------------


def test_the_report_says_what_happened(toys):
    model, log = with_ras(toys["flux"], resets=(5,))
    sample(model, noise(2))
    text, plain = log.last.text(), json.loads(log.json())
    assert "RAS 0.5 from step 2" in text and "5: 12 (reset)" in text and "keys and values kept" in text
    assert [visit["tokens"] for visit in plain["visits"]] == [12, 12, 6, 6, 6, 12, 6, 6] and plain["tokens"] == 12
    model, log = with_ras(toys["flux"], start=50)
    sample(model, noise())
    assert any("no gain" in note for note in log.last.notes)


def test_the_preview_dims_tokens_left_out_and_ends_with_the_picture(toys):
    shown, plain = [], []
    model, log = with_ras(toys["flux"], overlay=True)
    sample(model, noise(), callback=lambda step, x0, x, total: shown.append((step, x0.clone())))
    sample(with_ras(toys["flux"], overlay=False)[0], noise(), callback=lambda step, x0, x, total: plain.append((step, x0.clone())))
    masks = dict(log.last.masks)
    for (step, seen), (_, x0) in zip(shown, plain):
        if step in masks and step < 7:
            left = ~masks[step].reshape(1, 1, 3, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).expand_as(x0)
            assert torch.equal(seen[~left], x0[~left]) and torch.equal(seen[left], 0.35 * x0[left])
        else:
            assert torch.equal(seen, x0)
    assert torch.equal(shown[-1][1], plain[-1][1])


# On a trained model ----------------------------------------------------------------------------------------------------------


def test_more_tokens_and_more_resets_mean_less_error(tiny):
    """Done 5: eight seeds, error to the dense run, averaged."""
    x = tiny.noise(range(1, 9))
    prompts = [PROMPT] * 8
    dense = tiny.sample(prompts, x, steps=8, cfg=1.0)

    def error(**changed) -> float:
        model, _ = with_ras(tiny.model, start=2, **changed)
        return float((tiny.sample(prompts, x, steps=8, cfg=1.0, model=model) - dense).square().mean().sqrt())

    errors = [error(ratio=ratio) for ratio in (0.125, 0.25, 0.5, 0.75, 1.0)]
    assert errors[-1] == 0.0 and errors == sorted(errors, reverse=True), errors
    assert error(ratio=0.25, resets=(5,)) <= errors[1]


def test_change_finds_tokens_that_std_does_not(tiny):
    """The same tokens a step, whatever turns std takes: four seeds, error to the dense run, each of them."""
    x = tiny.noise(range(1, 5))
    prompts = [PROMPT] * 4
    dense = tiny.sample(prompts, x, steps=20, cfg=1.0)

    def errors(**changed) -> torch.Tensor:
        model, _ = with_ras(tiny.model, start=4, ratio=0.25, **changed)
        return (tiny.sample(prompts, x, steps=20, cfg=1.0, model=model) - dense).flatten(1).norm(dim=1)

    ours = errors(metric="change", starvation=0.0)
    for focus in ("low_std", "high_std"):
        assert (ours < errors(metric="std", focus=focus, starvation=1.0)).all()
