"""How often a training step sees each sigma.

Densities on [0, 1], sigma = 1 is noise; u is uniform:
    uniform       sigma = u
    logit_normal  sigma = sigmoid(mean + std·n), n normal                           (Esser et al. 2024, eq. 19)
    mode          sigma = 1 − u − s·(cos²(πu/2) − 1 + u), −1 ≤ s ≤ 2/(π − 2)         (Esser et al. 2024, eq. 20)
    cosmap        sigma = 1 − 1/(tan(πu/2) + 1), density 2/(π(1 − 2σ + 2σ²))         (Esser et al. 2024, eq. 21)
    u_shaped      density a(e^{aσ} + e^{a(1−σ)}) / (2(e^a − 1)), least at ½           (Lee et al. 2024, rf++)
and, after any of them, the resolution shift sigma ← α·sigma / (1 + (α − 1)·sigma).

Each is drawn through one uniform number a picture, so that `stratified` can spread a step's numbers evenly over [0, 1]: the
density of every single number stays, the mean over a step varies less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import input_error

__all__ = ["KINDS", "MODE_LIMITS", "Density"]

KINDS = ("uniform", "logit_normal", "mode", "cosmap", "u_shaped")
MODE_LIMITS = (-1.0, 2.0 / (math.pi - 2.0))  # outside the map from u to sigma turns back


@dataclass(frozen=True)
class Density:
    """A density of sigma.

    Args:
        kind: one of KINDS. mean, std: of logit_normal (mean above 0 favours noise). mode_scale: s of mode. a: of u_shaped, 0 is uniform.
        shift: α, 1 for none. low, high: what is drawn is mapped linearly from [0, 1] to here.
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
        if self.kind not in KINDS:
            raise input_error("Timestep Density", "kind", self.kind, ", ".join(KINDS), "Choose one of these.")
        low, high = MODE_LIMITS
        checks = (
            ("mean", abs(self.mean) <= 10.0, "-10 to 10"),
            ("std", 0.01 <= self.std <= 10.0, "0.01 to 10"),
            ("mode_scale", low <= self.mode_scale <= high, f"{low:g} to {high:.3f}, where the map from u to sigma is monotone"),
            ("a", 0.0 <= self.a <= 20.0, "0 to 20"),
            ("shift", 0.01 <= self.shift <= 100.0, "0.01 to 100"),
            ("low", 0.0 <= self.low < self.high <= 1.0, "0 ≤ low < high ≤ 1"),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise input_error("Timestep Density", name, getattr(self, name), allowed, "Correct the number.")

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Sigmas (count,), fp32 on the CPU, in an order that says nothing about their size."""
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        if self.stratified and count > 1:
            u = (torch.randperm(count, generator=generator) + u) / count
        return self.quantile(u).float()

    def quantile(self, u: Tensor) -> Tensor:
        """u in [0, 1] → sigma; increasing in u for every kind, float64 inside."""
        u = u.double()
        if self.kind == "logit_normal":
            tiny = torch.finfo(torch.float64).eps
            sigma = torch.sigmoid(self.mean + self.std * math.sqrt(2.0) * torch.erfinv((2.0 * u - 1.0).clamp(tiny - 1.0, 1.0 - tiny)))
        elif self.kind == "mode":
            v = 1.0 - u  # the published map falls with u; the mirrored draw has the same law
            sigma = 1.0 - v - self.mode_scale * (torch.cos(0.5 * math.pi * v) ** 2 - 1.0 + v)
        elif self.kind == "cosmap":
            sine, cosine = torch.sin(0.5 * math.pi * u), torch.cos(0.5 * math.pi * u)
            sigma = sine / (sine + cosine)  # 1 − 1/(tan + 1) without the pole of tan at u = 1
        elif self.kind == "u_shaped" and self.a > 1e-6:
            sigma = self._u_shaped(u)
        else:
            sigma = u
        sigma = self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)
        return self.low + (self.high - self.low) * sigma.clamp(0.0, 1.0)

    def _u_shaped(self, u: Tensor) -> Tensor:
        """The inverse of F(σ) = ½ + sinh(a(σ − ½)) / (2·sinh(a/2)), the integral of the density."""
        return 0.5 + torch.asinh((2.0 * u - 1.0) * math.sinh(0.5 * self.a)) / self.a

    def describe(self) -> str:
        parts = {
            "logit_normal": f"logit-normal({self.mean:g}, {self.std:g})", "mode": f"mode({self.mode_scale:g})",
            "u_shaped": f"u-shaped(a {self.a:g})",
        }  # fmt: skip
        text = parts.get(self.kind, self.kind)
        text += f", shift {self.shift:g}" if self.shift != 1.0 else ""
        return text + (f", {self.low:g} to {self.high:g}" if (self.low, self.high) != (0.0, 1.0) else "")
