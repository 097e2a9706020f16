"""The tiny model in diffusers is the same function, so that caches built on diffusers can be measured on these weights (bench/peers.py)."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.first_block import FirstBlockGate
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host import calculate_sigmas

pytest.importorskip("diffusers", reason="pip install diffusers==0.42.1, which the bench of peers needs too")
BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def both():
    """(our transformer, its twin in diffusers, text, pooled)"""
    sys.path.insert(0, str(BENCH))
    try:
        from diffusers_flux import DiffusersFlux, diffusers_twin
    finally:
        sys.path.remove(str(BENCH))
    model, clip, _ = NODES["RectiflowLoadTiny"]().execute()
    ours = model.get_model_object("diffusion_model").float()
    tokens, extra = clip.encode_from_tokens_scheduled(clip.tokenize("noto cat on blue"))[0]
    return ours, DiffusersFlux(diffusers_twin(ours.state_dict(), (8, 28, 28))), tokens, extra["pooled_output"]


@pytest.mark.parametrize("sigma", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_velocities_are_equal(both, sigma, size):
    """float32 on both sides: what is left is the order of sums, about 3e-6 of values up to 4."""
    ours, twin, text, pooled = both
    x = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(0))
    text, pooled = text.repeat(2, 1, 1), pooled.repeat(2, 1)
    with torch.inference_mode():
        expected = ours(x, torch.full((2,), sigma), text, pooled)
        found = twin.velocity(x, sigma, text, pooled)
    assert (found - expected).abs().max() < 1e-4


def test_a_missing_tensor_is_not_filled(both):
    from diffusers_flux import diffusers_twin

    state = both[0].state_dict()
    state.pop("double_blocks.1.img_mod.lin.bias")
    with pytest.raises(RuntimeError, match="transformer_blocks.1.norm1.linear.bias"):
        diffusers_twin(state, (8, 28, 28))


@contextmanager
def in_diffusers(transformer: torch.nn.Module, threshold: float, steps: int):
    """diffusers' first-block cache on the twin, inside; gives the name of the cache context that calls are made under."""
    from diffusers import FirstBlockCacheConfig

    transformer.enable_cache(FirstBlockCacheConfig(threshold))
    try:
        yield "cond"
    finally:
        transformer._reset_stateful_cache()
        transformer.disable_cache()


@contextmanager
def in_cache_dit(transformer: torch.nn.Module, threshold: float, steps: int):
    """cache-dit's DBCache after the first block, inside; it knows no contexts."""
    cache_dit = pytest.importorskip("cache_dit", reason="pip install cache-dit==1.5.3")
    from cache_dit.caching.block_adapters import BlockAdapterRegister

    config = cache_dit.DBCacheConfig(
        num_inference_steps=steps, enable_separate_cfg=False, Fn_compute_blocks=1, Bn_compute_blocks=0,
        residual_diff_threshold=threshold, max_warmup_steps=1,
    )  # fmt: skip
    adapter = cache_dit.enable_cache(BlockAdapterRegister.get_adapter(transformer, has_separate_cfg=False), cache_config=config)
    try:
        yield None
    finally:
        cache_dit.disable_cache(adapter)


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("cached", [in_diffusers, in_cache_dit])
def test_our_first_block_gate_skips_the_steps_that_others_skip(both, tiny, cached, threshold):
    """One condition, one picture: with more, they decide for each condition apart and on a mean over the batch, ours for all at once."""
    twin, steps, noise, log = both[1], 28, tiny.noise([1]), CacheLog()
    middle, theirs = [], []  # calls of the second block; whether a step made one
    sigmas, x = calculate_sigmas(tiny.model.get_model_object("model_sampling"), "simple", steps).tolist(), noise
    with cached(twin.transformer, threshold, steps) as branch, torch.inference_mode():
        hook = twin.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *_: middle.append(True))
        try:
            for sigma, following in zip(sigmas, sigmas[1:]):
                before = len(middle)
                x = x + (following - sigma) * twin.velocity(x, sigma, *both[2:], branch=branch)
                theirs.append(len(middle) > before)
        finally:
            hook.remove()

    model = attach(tiny.model, CachePlan(FirstBlockGate(threshold=threshold), "block_delta", Limits(1, 0)), log, "test")
    latent = tiny.sample("noto cat on blue", noise, steps=steps, cfg=1.0, model=model)
    ours = [visit.decision == "full" for visit in log.last.visits]
    assert ours == theirs
    assert all(ours) == (threshold == 0.05)  # at 28 steps no first block comes nearer than that
    torch.testing.assert_close(latent, x, atol=1e-4, rtol=0)  # float32: rounding comes to 7e-6
