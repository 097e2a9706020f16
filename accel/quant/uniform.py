"""Uniform grids: what other quantisers are held against, the 8-bit weights of W8A8, and the activations of every mode."""

from __future__ import annotations

import torch

__all__ = ["clipped_grid", "clipped_range", "int8_rows", "int_tokens", "min_max_grid"]

CLIPS = tuple(1 - 0.02 * i for i in range(36))
TINY = 1e-12


def _grid(w: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    step = ((high - low) / ((1 << bits) - 1)).clamp_min(TINY)
    return ((w - low) / step).round().clamp(0, (1 << bits) - 1) * step + low


def min_max_grid(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """ŵ of 2^bits equal steps from the least to the largest weight of each row."""
    w = weight.float()
    return _grid(w, w.amin(1, keepdim=True), w.amax(1, keepdim=True), bits)


def clipped_grid(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """ŵ of `min_max_grid` with both ends drawn in by the share that leaves the least squared error in each row."""
    w = weight.float()
    low, step = clipped_range(w, bits)
    return ((w - low) / step).round().clamp(0, (1 << bits) - 1) * step + low


def clipped_range(w: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, step) of `clipped_grid`, each (n, 1)."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    best, least = torch.ones_like(low), torch.full_like(low, float("inf"))
    for clip in CLIPS:
        error = (_grid(w, clip * low, clip * high, bits) - w).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, clip, best), torch.minimum(error, least)
    return best * low, (best * (high - low) / ((1 << bits) - 1)).clamp_min(TINY)


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (n, k) → (codes int8 (n, k), scale float32 (n,)): symmetric, the largest weight of a row is ±127. ŵ = code·scale."""
    w = weight.float()
    scale = (w.abs().amax(1) / 127).clamp_min(TINY)
    return (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def int_tokens(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations x (…, k) → (codes int8 in −2^(bits−1) … 2^(bits−1) − 1, scale float32 (…, 1)): symmetric, Δ = max|x| of a token over
    the largest code. x̂ = code·scale.
    """
    top = (1 << (bits - 1)) - 1
    scale = (x.abs().amax(-1, keepdim=True).float() / top).clamp_min(TINY)
    return (x.float() / scale).round().clamp(-top - 1, top).to(torch.int8), scale
