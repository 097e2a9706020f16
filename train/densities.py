"""How often a training step sees each sigma: a density of samplers/densities.py, drawn so that a step's numbers are spread.

Each sigma comes from one uniform number through the density's quantile function. `stratified` takes one of these from each of b equal
parts of [0, 1] in a step of b: the law of every single number stays, the mean over a step varies less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import input_error
from ..samplers.densities import DENSITIES, TimestepDensity

__all__ = ["DENSITIES", "Density"]


@dataclass(frozen=True)
class Density:
    """A density of sigma.

    Args:
        kind, mean, std, mode_scale, a, shift: of samplers.densities.TimestepDensity.
        low, high: what is drawn is mapped linearly from [0, 1] to here.
        stratified: one number from each of b equal parts of [0, 1] in a batch of b.
    """

    kind: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    a: float = 4.0
    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0
    stratified: bool = True

    def __post_init__(self):
        self.law()
        if not 0.0 <= self.low < self.high <= 1.0:
            raise input_error("Timestep Density", "low", (self.low, self.high), "0 ≤ low < high ≤ 1", "Correct the numbers.")

    def law(self) -> TimestepDensity:
        """The density on all of (0, 1)."""
        return TimestepDensity(self.kind, self.mean, self.std, self.mode_scale, self.a, self.shift)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Sigmas (count,), fp32 on the CPU, in an order that says nothing about their size."""
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        if self.stratified and count > 1:
            u = (torch.randperm(count, generator=generator) + u) / count
        return self.quantile(u).float()

    def quantile(self, u: Tensor) -> Tensor:
        """u in [0, 1] → sigma, float64, increasing in u."""
        return self.low + (self.high - self.low) * self.law().quantile(u.double()).clamp(0.0, 1.0)

    def describe(self) -> str:
        parts = {
            "logit_normal": f"logit-normal({self.mean:g}, {self.std:g})", "mode": f"mode({self.mode_scale:g})",
            "u_shaped": f"u-shaped(a {self.a:g})",
        }  # fmt: skip
        text = parts.get(self.kind, self.kind)
        text += f", shift {self.shift:g}" if self.shift != 1.0 else ""
        return text + (f", {self.low:g} to {self.high:g}" if (self.low, self.high) != (0.0, 1.0) else "")
