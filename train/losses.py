"""How far the velocity is from its target, one number a picture.

    mse            mean of d² over the elements, d = v − target
    pseudo_huber   (sqrt(‖d‖² + c²) − c) / n with c = c_scale·n over n elements   (Lee et al. 2024, rf++: c_scale 0.00054)
    huber          mean of the Huber function of each element, quadratic up to `delta`
    huber_wavelet  a Huber function of the clean latent's Haar bands, with a weight of its own; wavelet_loss.py      (UltraFlux)
Weights over sigma: none, sigma2 (σ²: the error of the denoised latent, which the core's trainer uses), inverse (1/σ, at most
`largest_weight`), min_snr (min(snr, 5)/snr·σ², snr = ((1 − σ)/σ)²; Hang et al. 2023 in its velocity form).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import input_error
from .wavelet_loss import HuberWavelet

__all__ = ["KINDS", "WEIGHTINGS", "Loss"]

KINDS = ("mse", "pseudo_huber", "huber", "huber_wavelet")
WEIGHTINGS = ("none", "sigma2", "inverse", "min_snr")
MIN_SNR_GAMMA = 5.0


@dataclass(frozen=True)
class Loss:
    """kind, weighting: see the head of this file. c_scale: of pseudo_huber; delta: of huber; largest_weight: of inverse.

    c_min, c_max, snr_gamma, beta, alpha: of huber_wavelet, whose own weight over sigma is times that of `weighting`.
    """

    kind: str = "mse"
    weighting: str = "none"
    c_scale: float = 0.00054
    delta: float = 1.0
    largest_weight: float = 1000.0
    c_min: float = 0.2
    c_max: float = 1.0
    snr_gamma: float = 5.0
    beta: float = 0.0
    alpha: float = 0.5

    def __post_init__(self):
        for name, allowed in (("kind", KINDS), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in allowed:
                raise input_error("Train Loss", name, getattr(self, name), ", ".join(allowed), "Choose one of these.")
        for name in ("c_scale", "delta", "largest_weight"):
            if not 0.0 < getattr(self, name) <= 1e6:
                raise input_error("Train Loss", name, getattr(self, name), "above 0, at most 1000000", "Correct the number.")
        self.wavelet()  # refuses what it cannot use, whatever the kind

    def wavelet(self) -> HuberWavelet:
        """The settings of huber_wavelet."""
        return HuberWavelet(self.c_min, self.c_max, self.snr_gamma, self.beta, self.alpha)

    def each(self, difference: Tensor, sigma: Tensor, weight: Tensor | None = None) -> Tensor:
        """(b, …) → (b,), before the weight over sigma. sigma: (b,). weight: broadcastable to `difference`, such as a mask."""
        difference = difference.float()
        if self.kind == "huber_wavelet":
            return self.wavelet().each(difference, sigma, weight)
        count = difference[0].numel()
        if self.kind == "pseudo_huber":
            squares = difference.square() if weight is None else difference.square() * weight
            c = self.c_scale * count
            return ((squares.flatten(1).sum(1) + c * c).sqrt() - c) / count
        if self.kind == "huber":
            size = difference.abs()
            elements = torch.where(size <= self.delta, 0.5 * size.square(), self.delta * (size - 0.5 * self.delta))
        else:
            elements = difference.square()
        return (elements if weight is None else elements * weight).flatten(1).mean(1)

    def over_sigma(self, sigma: Tensor) -> Tensor:
        """The weight of each picture (b,)."""
        chosen = self._chosen_weight(sigma)
        return chosen * self.wavelet().over_sigma(sigma).to(chosen) if self.kind == "huber_wavelet" else chosen

    def _chosen_weight(self, sigma: Tensor) -> Tensor:
        if self.weighting == "sigma2":
            return sigma.square()
        if self.weighting == "inverse":
            return 1.0 / sigma.clamp(min=1.0 / self.largest_weight)
        if self.weighting == "min_snr":
            data = (1.0 - sigma).square()  # min(snr, γ)/snr · σ² without the division by zero at σ = 0 and σ = 1
            return torch.minimum(sigma.square(), MIN_SNR_GAMMA * sigma.square().square() / data.clamp(min=1e-12))
        return torch.ones_like(sigma)
