"""Ancestral samplers: a deterministic step below the next noise level, then fresh noise up to it.

On a flow the step and the noise keep x = (1 − sigma)·x0 + sigma·noise, see common.get_flow_ancestral_step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .common import Denoiser, NoiseSampler, get_ancestral_step, get_flow_ancestral_step, is_flow, to_d


@torch.no_grad()
def sample_euler_ancestral(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Euler to sigma_down, then noise."""
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    flow = is_flow(model)
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        if sigmas[i + 1] == 0:
            x = denoised
        elif flow:
            down, scale, renoise = get_flow_ancestral_step(sigmas[i], sigmas[i + 1], eta)
            x = down / sigmas[i] * x + (1 - down / sigmas[i]) * denoised
            if eta > 0:
                x = scale * x + noise(sigmas[i], sigmas[i + 1]) * s_noise * renoise
        else:
            down, up = get_ancestral_step(sigmas[i], sigmas[i + 1], eta)
            x = x + to_d(x, sigmas[i], denoised) * (down - sigmas[i]) + noise(sigmas[i], sigmas[i + 1]) * s_noise * up
    return x


@torch.no_grad()
def sample_dpm_2_ancestral(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """DPM-Solver-2's midpoint step to sigma_down, then noise."""
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    flow = is_flow(model)
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        if flow:
            down, scale, renoise = get_flow_ancestral_step(sigmas[i], sigmas[i + 1], eta)
        else:
            down, renoise = get_ancestral_step(sigmas[i], sigmas[i + 1], eta)
            scale = 1.0
        d = to_d(x, sigmas[i], denoised)
        if down == 0:
            x = x + d * (down - sigmas[i])
        else:
            middle = sigmas[i].log().lerp(down.log(), 0.5).exp()
            x_2 = x + d * (middle - sigmas[i])
            x = x + to_d(x_2, middle, denoise(x_2, middle)) * (down - sigmas[i])
            x = scale * x + noise(sigmas[i], sigmas[i + 1]) * s_noise * renoise
    return x


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095) to sigma_down, then noise: the prediction at the middle in lambda carries x."""
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    step = _flow_2s_step if is_flow(model) else _ve_2s_step
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            x = step(denoise, x, denoised, sigmas[i], sigmas[i + 1], eta, s_noise, noise)
    return x


def _ve_2s_step(denoise, x, denoised, sigma, sigma_next, eta, s_noise, noise) -> torch.Tensor:
    """With lambda = −log sigma."""
    down, up = get_ancestral_step(sigma, sigma_next, eta)
    if down == 0:
        x = denoised
    else:
        h = sigma.log() - down.log()
        middle = (sigma.log() - h / 2).exp()
        x_2 = middle / sigma * x - (-h / 2).expm1() * denoised
        x = down / sigma * x - (-h).expm1() * denoise(x_2, middle)
    return x + noise(sigma, sigma_next) * s_noise * up


def _flow_2s_step(denoise, x, denoised, sigma, sigma_next, eta, s_noise, noise) -> torch.Tensor:
    """With lambda = log((1 − sigma)/sigma); from sigma = 1, where lambda is −inf, the middle is taken just below 1."""
    down, scale, renoise = get_flow_ancestral_step(sigma, sigma_next, eta)
    if sigma == 1.0:
        middle = 0.9999
    else:
        lambda_from, lambda_down = ((1 - sigma) / sigma).log(), ((1 - down) / down).log()
        middle = 1 / ((lambda_from + (lambda_down - lambda_from) / 2).exp() + 1)
    x_2 = middle / sigma * x + (1 - middle / sigma) * denoised
    x = down / sigma * x + (1 - down / sigma) * denoise(x_2, middle)
    return scale * x + noise(sigma, sigma_next) * s_noise * renoise if eta > 0 else x
