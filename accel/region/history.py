"""What each token's velocity was when it was last computed, and what it is taken to be at another sigma.

"Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389, repeats the last velocity (order 0). Order 1 and 2 continue it by
divided differences in sigma through the last two or three computed values of that very token, whose sigmas differ from token to token:

    v(σ) = v₁ + (v₁ − v₀)/(σ₁ − σ₀)·(σ − σ₁)          exact for a velocity linear in sigma
"""

from __future__ import annotations

import torch

__all__ = ["VelocityHistory"]

SAME_SIGMA = 1e-6  # two evaluations at one sigma replace each other: a slope between them would divide by nothing


class VelocityHistory:
    """One condition's last `order` + 1 computed velocities of every latent cell, the latest first.

    values: (b, c, *shape) in float32; sigmas: (b, 1, *shape), NaN where a cell has no such value yet.
    """

    def __init__(self, order: int):
        self.order = order
        self.values: list[torch.Tensor] = []
        self.sigmas: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.values, *self.sigmas))

    def update(self, v: torch.Tensor, sigma: float, computed: torch.Tensor | None) -> None:
        """Take v (b, c, *shape) where `computed` (b, 1, *shape) is True, everywhere for None."""
        if not self.values:
            self.values = [v.clone()]
            self.sigmas = [torch.full_like(v[:, :1], sigma)]
            return
        everywhere = torch.ones_like(self.sigmas[0], dtype=torch.bool) if computed is None else computed
        moved = everywhere & ((self.sigmas[0] - sigma).abs() > SAME_SIGMA)  # here older values step back by one
        if self.order and len(self.values) <= self.order:
            self.values.append(torch.zeros_like(v))
            self.sigmas.append(torch.full_like(self.sigmas[0], torch.nan))
        for place in range(len(self.values) - 1, 0, -1):
            self.values[place] = torch.where(moved, self.values[place - 1], self.values[place])
            self.sigmas[place] = torch.where(moved, self.sigmas[place - 1], self.sigmas[place])
        self.values[0] = torch.where(everywhere, v, self.values[0])
        self.sigmas[0] = self.sigmas[0].masked_fill(everywhere, sigma)

    def predict(self, sigma: float) -> torch.Tensor:
        """Newton's form through the values a cell has: (b, c, *shape) in float32, a tensor of its own."""
        total = self.values[0].clone()
        if len(self.values) > 1:
            slope = (self.values[0] - self.values[1]) / (self.sigmas[0] - self.sigmas[1])
            known = self.sigmas[1].isfinite()
            step = sigma - self.sigmas[0]
            total += torch.where(known, slope * step, 0.0)
        if len(self.values) > 2:
            before = (self.values[1] - self.values[2]) / (self.sigmas[1] - self.sigmas[2])
            bend = (slope - before) / (self.sigmas[0] - self.sigmas[2])
            known = known & self.sigmas[2].isfinite()
            total += torch.where(known, bend * step * (sigma - self.sigmas[1]), 0.0)
        return total
