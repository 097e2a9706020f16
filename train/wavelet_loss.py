"""UltraFlux's SNR-aware Huber wavelet loss ("UltraFlux", arXiv 2511.18050), on our velocity v = noise − x0 at sigma t.

    ẑ − z = −t·(v_θ − v)                                     the error of the clean latent that the answer implies
    R = W(ẑ) − W(z)                                          in the bands of one Haar level, samplers/haar.py
    ρ_c(r) = c²(sqrt(1 + (r/c)²) − 1)                        r²/2 while small, c·|r| when large
    c(t) = c_min + (c_max − c_min)·(min(SNR, γ)/γ)^α         SNR = ((1 − t)/t)²: at high noise single errors count less
    w(t) = t/(1 − t)·min(SNR, γ)^β
    L = w(t)·mean ρ_c(t)(R)
As c → ∞ with β = 0 this is t³/(2(1 − t))·mean (v_θ − v)²: flow matching up to a weight over t that the paper does not name.

Ours: (1 − t)/t is kept at or above 1/`LARGEST`, since w has no value at t = 1 where β < ½; for β = ½ w is 1 there without it. ρ is written
r²/(1 + sqrt(1 + (r/c)²)), the same number without the difference of two near ones. γ, β and α are not published: 5, 0 and ½ are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import input_error
from ..samplers.haar import haar_split

__all__ = ["HuberWavelet"]

LARGEST = 1000.0  # of t/(1 − t): reached at t = .999
RANGES = {"c_min": (0.001, 1e6), "c_max": (0.001, 1e6), "snr_gamma": (0.1, 100.0), "beta": (0.0, 1.0), "alpha": (0.0, 1.0)}


@dataclass(frozen=True)
class HuberWavelet:
    """The loss at its settings, named as in the head of this file; c_min ≤ c_max."""

    c_min: float = 0.2
    c_max: float = 1.0
    snr_gamma: float = 5.0
    beta: float = 0.0
    alpha: float = 0.5

    def __post_init__(self):
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise input_error("Train Loss", name, getattr(self, name), f"{low:g} to {high:g}", "Correct the number.")
        if self.c_min > self.c_max:
            raise input_error("Train Loss", "c_min", self.c_min, f"at most c_max, {self.c_max:g}", "Exchange the two.")

    def each(self, difference: Tensor, sigma: Tensor, weight: Tensor | None = None) -> Tensor:
        """mean ρ_c(t)(R), one number a picture `(b,)`, without w(t).

        Args:
            difference: v_θ − v, `(b, c, h, w)` or `(b, c, t, h, w)`, fp32. sigma: t, `(b,)`.
            weight: of cells, broadcastable to `difference`, such as a mask; a band's number has the mean of its four cells.
        Raises: NodeInputError for latents without two sides of even length.
        """
        t = sigma.to(difference).view(-1, *[1] * (difference.ndim - 1))
        residual = torch.cat(haar_split(t * difference, "Train Loss"), dim=1)
        c = self.threshold(sigma).to(difference).view_as(t)
        rho = residual.square() / (1.0 + (1.0 + (residual / c).square()).sqrt())
        if weight is not None:
            cells = 0.5 * haar_split(weight.to(difference).expand_as(difference), "Train Loss")[0]
            rho = rho * torch.cat([cells] * 4, dim=1)
        return rho.flatten(1).mean(1)

    def over_sigma(self, sigma: Tensor) -> Tensor:
        """w(t) of each picture `(b,)`."""
        root = _root_snr(sigma)
        return root.clamp(max=self.snr_gamma**0.5) ** (2.0 * self.beta) / root

    def threshold(self, sigma: Tensor) -> Tensor:
        """c(t) of each picture `(b,)`, from c_min at t = 1 to c_max where SNR ≥ γ."""
        share = (_root_snr(sigma).square() / self.snr_gamma).clamp(max=1.0)
        return self.c_min + (self.c_max - self.c_min) * share**self.alpha


def _root_snr(sigma: Tensor) -> Tensor:
    """(1 − t)/t between 1/LARGEST and 1/the smallest sigma that has an inverse in fp32."""
    sigma = sigma.float()
    return ((1.0 - sigma) / sigma.clamp(min=1e-12)).clamp(min=1.0 / LARGEST)
