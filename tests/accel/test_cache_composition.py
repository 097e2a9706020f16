"""Caches together with what else a graph does to a run: conditions that come and go, masks, storage, failures at every call."""

from __future__ import annotations

import gc

import pytest
import torch
from rectiflow.accel.cache.binding import RUN, attach
from rectiflow.accel.cache.forecast import Ladder
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.store import StoreOptions
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host import CFGGuider, sampler_object

PROMPT = "noto cat on blue"
TARGETS = ("output", "last_block", "block_delta")


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())


def draw(tiny, model, positive, steps=8):
    noise = tiny.noise([1])
    guider = CFGGuider(model)
    guider.set_conds(positive, tiny.conditioning(""))
    guider.set_cfg(3.0)
    with torch.inference_mode():
        return guider.sample(
            noise, torch.zeros_like(noise), sampler_object("euler"), torch.linspace(1, 0, steps + 1), disable_pbar=True, seed=0
        )


def test_a_failure_at_every_call_index_leaves_a_clean_state(tiny):
    """Four steps, a call each: the run stops at any of them, and the next run is what a fresh model draws."""
    state = {"made": 0, "fail_at": -1}

    def failing(executor, *args, **kwargs):
        state["made"] += 1
        if state["made"] == state["fail_at"] + 1:
            raise RuntimeError("at this call")
        return executor(*args, **kwargs)

    watched = tiny.model.clone()
    watched.add_wrapper_with_key("diffusion_model", "failing", failing)
    model = attach(watched, CachePlan(IntervalReuse(interval=2), "last_block", Limits()), CacheLog(), "test")
    noise = tiny.noise([1])
    expected = tiny.sample(PROMPT, noise, steps=4, model=model)
    for fail_at in range(4):
        state.update(made=0, fail_at=fail_at)
        with pytest.raises(RuntimeError, match="at this call"):
            tiny.sample(PROMPT, noise, steps=4, model=model)
        gc.collect()
        assert not any(type(found) is Ladder and found.factors for found in gc.get_objects())
        assert RUN not in model.model_options["transformer_options"]
    state["fail_at"] = -1
    assert torch.equal(tiny.sample(PROMPT, noise, steps=4, model=model), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_conditions_with_areas_and_time_ranges_have_histories_of_their_own(tiny, target):
    """One prompt on the left half, another that begins in the middle of the run: it is computed when it comes, and joins then."""
    whole, left, late = (tiny.conditioning(text)[0] for text in (PROMPT, "noto fox on green", "twemoji rocket on black"))
    left = [left[0], {**left[1], "area": (16, 8, 0, 0), "strength": 1.0, "set_area_to_bounds": False}]
    late = [late[0], {**late[1], "start_percent": 0.5, "end_percent": 1.0}]
    off = attach(tiny.model, CachePlan(IntervalReuse(interval=1), target), CacheLog(), "test")
    positive = [whole, left, late]
    plain = draw(tiny, tiny.model, positive)
    assert torch.equal(draw(tiny, off, positive), plain)
    log = CacheLog()
    cached = attach(tiny.model, CachePlan(IntervalReuse(interval=2), target, Limits(2, 1)), log, "test")
    near = draw(tiny, cached, positive)
    counts = [visit.full + visit.forecast for visit in log.last.visits]
    assert (min(counts), max(counts)) == (4, 5), "two prompts and, for each area, the empty one; then three prompts"
    assert bool(torch.isfinite(near).all()) and distance(near, plain) < 0.3 and log.last.hit_ratio > 0.2


@pytest.mark.parametrize("target", TARGETS)
def test_inpainting_keeps_the_picture_outside_the_mask(tiny, cached, target):
    picture = tiny.sample(PROMPT, tiny.noise([1]), steps=8)
    mask = torch.zeros(1, 1, *picture.shape[2:])
    mask[..., 8:] = 1.0
    model, log = cached(target, interval=2)
    painted = tiny.sample("noto fox on green", tiny.noise([2]), steps=8, model=model, latent=picture, mask=mask)
    torch.testing.assert_close(painted[..., :8], picture[..., :8], atol=1e-5, rtol=0)
    assert log.last.hit_ratio > 0.2 and distance(painted[..., 8:], picture[..., 8:]) > 0.1


@pytest.mark.parametrize("dtype, worst", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_half_precision_on_the_cpu_halves_the_bytes_and_rounds(tiny, dtype, worst):
    noise, found, logs = tiny.noise([1]), [], []
    for store in (StoreOptions(), StoreOptions(dtype, "cpu")):
        logs.append(CacheLog())
        plan = CachePlan(IntervalReuse(interval=3), "last_block", Limits(1, 1), store)
        found.append(tiny.sample(PROMPT, noise, steps=8, model=attach(tiny.model, plan, logs[-1], "test")))
    assert logs[0].last.peak_bytes == 2 * logs[1].last.peak_bytes
    assert 0 < distance(found[1], found[0]) < worst


def test_the_last_block_forecast_holds_order_plus_one_token_tensors_a_condition(tiny, cached):
    tokens = 8 * 8 * tiny.model.model.diffusion_model.hidden_size * 4
    for order in range(4):
        model, log = cached("last_block", interval=2, order=order)
        tiny.sample(PROMPT, tiny.noise([1]), steps=12, model=model)
        assert log.last.peak_bytes == 2 * (order + 1) * tokens
