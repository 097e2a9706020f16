"""CFG++ (Chung et al. 2024, arXiv:2406.08070): step towards the guided prediction, renoise along the unconditional one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .common import Denoiser, NoiseSampler, get_ancestral_step, patched_model_sampling, signal_level, to_d


@torch.no_grad()
def sample_euler_ancestral_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """x' = alpha'·denoised + sigma_down·eps_uncond + noise; the ancestral split is made in sigma/alpha."""
    denoise = Denoiser(model, x, extra_args, callback)
    denoise.record_uncond()
    noise = denoise.noise_sampler(x, noise_sampler)
    model_sampling = patched_model_sampling(model)
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            alpha, alpha_next = signal_level(sigmas[i], model_sampling), signal_level(sigmas[i + 1], model_sampling)
            eps = to_d(x, sigmas[i], alpha * denoise.uncond_denoised)
            down, up = get_ancestral_step(sigmas[i] / alpha, sigmas[i + 1] / alpha_next, eta)
            x = alpha_next * denoised + alpha_next * down * eps
            if eta > 0 and s_noise > 0:
                x = x + alpha_next * noise(sigmas[i], sigmas[i + 1]) * s_noise * up
    return x


@torch.no_grad()
def sample_euler_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """The deterministic form."""
    return sample_euler_ancestral_cfg_pp(model, x, sigmas, extra_args, callback, disable, eta=0.0, s_noise=0.0)


@torch.no_grad()
def sample_dpmpp_2s_ancestral_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """DPM-Solver++(2S) in t = −log sigma, from x + (denoised − uncond), which makes the renoising unconditional."""
    denoise = Denoiser(model, x, extra_args, callback)
    denoise.record_uncond()
    noise = denoise.noise_sampler(x, noise_sampler)
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        down, up = get_ancestral_step(sigmas[i], sigmas[i + 1], eta)
        if down == 0:
            x = denoised + to_d(x, sigmas[i], denoise.uncond_denoised) * down
        else:
            h = sigmas[i].log() - down.log()
            middle = (sigmas[i].log() - h / 2).exp()
            x_2 = middle / sigmas[i] * (x + (denoised - denoise.uncond_denoised)) - (-h / 2).expm1() * denoised
            denoised_2 = denoise(x_2, middle)
            x = down / sigmas[i] * (x + (denoised - denoise.uncond_denoised)) - (-h).expm1() * denoised_2
        if sigmas[i + 1] > 0:
            x = x + noise(sigmas[i], sigmas[i + 1]) * s_noise * up
    return x


@torch.no_grad()
def sample_dpmpp_2m_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """DPM-Solver++(2M) in t = −log sigma: x' = denoised + e^(−h)·(x − uncond) + the second-order term over the last prediction."""
    denoise = Denoiser(model, x, extra_args, callback)
    denoise.record_uncond()
    last_uncond = None
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        h = sigmas[i].log() - sigmas[i + 1].log()
        mixed = -torch.exp(-h) * denoise.uncond_denoised
        if last_uncond is not None and sigmas[i + 1] != 0:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            mixed = mixed - torch.expm1(-h) * (1 / (2 * r)) * (denoised - last_uncond)
        x = denoised + mixed + torch.exp(-h) * x
        last_uncond = denoise.uncond_denoised
    return x
