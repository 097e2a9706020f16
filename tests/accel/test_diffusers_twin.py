"""The tiny model in diffusers is the same function, so that caches built on diffusers can be measured on these weights (bench/peers.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES

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
