"""Single-step solvers of dx/dsigma = (x − denoised)/sigma: Karras et al. 2022 (arXiv:2206.00364), algorithm 2, and Heun++2
(Li et al. 2023, arXiv:2310.11417's repository, which weighs slopes by sigma)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .common import Denoiser, churned, to_d


@torch.no_grad()
def sample_euler(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """x ← x + h·d, d = (x − denoised)/sigma."""
    denoise = Denoiser(model, x, extra_args, callback)
    for i in range(len(sigmas) - 1):
        x, sigma = churned(x, sigmas[i], len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
        denoised = denoise(x, sigma)
        denoise.report(i, x, sigmas[i], denoised, sigma)
        x = x + to_d(x, sigma, denoised) * (sigmas[i + 1] - sigma)
    return x


@torch.no_grad()
def sample_heun(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """x ← x + h·(d + d')/2 with d' at the Euler point; a step to 0 is Euler's."""
    denoise = Denoiser(model, x, extra_args, callback)
    for i in range(len(sigmas) - 1):
        x, sigma = churned(x, sigmas[i], len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
        denoised = denoise(x, sigma)
        denoise.report(i, x, sigmas[i], denoised, sigma)
        d, h = to_d(x, sigma, denoised), sigmas[i + 1] - sigma
        if sigmas[i + 1] != 0:
            x_2 = x + d * h
            d = (d + to_d(x_2, sigmas[i + 1], denoise(x_2, sigmas[i + 1]))) / 2
        x = x + d * h
    return x


@torch.no_grad()
def sample_dpm_2(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """x ← x + h·d' with d' at the geometric middle of the two sigmas (DPM-Solver-2's point); a step to 0 is Euler's."""
    denoise = Denoiser(model, x, extra_args, callback)
    for i in range(len(sigmas) - 1):
        x, sigma = churned(x, sigmas[i], len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
        denoised = denoise(x, sigma)
        denoise.report(i, x, sigmas[i], denoised, sigma)
        d = to_d(x, sigma, denoised)
        if sigmas[i + 1] != 0:
            middle = sigma.log().lerp(sigmas[i + 1].log(), 0.5).exp()
            x_2 = x + d * (middle - sigma)
            d = to_d(x_2, middle, denoise(x_2, middle))
        x = x + d * (sigmas[i + 1] - sigma)
    return x


@torch.no_grad()
def sample_heunpp2(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Slopes at one, two or three points ahead, the later ones weighed by sigma/(n·sigma_0); the last step is Euler's."""
    denoise = Denoiser(model, x, extra_args, callback)
    end = sigmas[-1]
    for i in range(len(sigmas) - 1):
        x, sigma = churned(x, sigmas[i], len(sigmas) - 1, s_churn, s_tmin, s_tmax, s_noise)
        denoised = denoise(x, sigma)
        denoise.report(i, x, sigmas[i], denoised, sigma)
        slopes = [to_d(x, sigma, denoised)]
        ahead, level = x, sigma
        points = 1 if sigmas[i + 1] == end else 2 if sigmas[i + 2] == end else 3
        for following in sigmas[i + 1 : i + points]:
            ahead = ahead + slopes[-1] * (following - level)
            level = following
            slopes.append(to_d(ahead, level, denoise(ahead, level)))
        weights = [following / (points * sigmas[0]) for following in sigmas[i + 1 : i + points]]
        d = slopes[0] * (1 - sum(weights)) + sum(weight * slope for weight, slope in zip(weights, slopes[1:]))
        x = x + d * (sigmas[i + 1] - sigma)
    return x
