"""Multistep solvers that extrapolate the prediction: DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095), RES (Zhang et al. 2023,
arXiv:2308.02157) and gradient estimation (Permenter & Yuan 2024, arXiv:2306.04848)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .common import Denoiser, NoiseSampler, get_ancestral_step, to_d


@torch.no_grad()
def sample_dpmpp_2m(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """x' = e^(−h)·x + (1 − e^(−h))·D, h the step in −log sigma, D the prediction extrapolated half a step (not in the first and last)."""
    denoise = Denoiser(model, x, extra_args, callback)
    last = None
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        t, t_next = sigmas[i].log().neg(), sigmas[i + 1].log().neg()
        h = t_next - t
        prediction = denoised
        if last is not None and sigmas[i + 1] != 0:
            r = (t - sigmas[i - 1].log().neg()) / h
            prediction = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * last
        x = (t_next.neg().exp() / t.neg().exp()) * x - (-h).expm1() * prediction
        last = denoised
    return x


def _res_multistep(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None, callback: Callable | None, s_noise: float,
    noise_sampler: NoiseSampler | None, eta: float, cfg_pp: bool,
) -> torch.Tensor:  # fmt: skip
    """x' = e^(−h)·x + h·(b1·D + b2·D_last), b2 = phi_2(−h)/c2, b1 = phi_1(−h) − b2, c2 = where the last prediction lies in steps of h.

    With CFG++ the predictions are the unconditional ones and x is first moved by (denoised − uncond).
    """
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    if cfg_pp:
        denoise.record_uncond()
    last, last_down = None, None
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        down, up = get_ancestral_step(sigmas[i], sigmas[i + 1], eta)
        prediction = denoise.uncond_denoised if cfg_pp else denoised
        if down == 0 or last is None:
            d = to_d(x, sigmas[i], prediction)
            x = denoised + d * down if cfg_pp else x + d * (down - sigmas[i])
        else:
            t, t_next = sigmas[i].log().neg(), down.log().neg()
            h = t_next - t
            c2 = (sigmas[i - 1].log().neg() - last_down.log().neg()) / h
            phi_1 = torch.expm1(-h) / -h
            phi_2 = (phi_1 - 1.0) / -h
            b1, b2 = torch.nan_to_num(phi_1 - phi_2 / c2), torch.nan_to_num(phi_2 / c2)
            x = x + (denoised - prediction) if cfg_pp else x
            x = h.neg().exp() * x + h * (b1 * prediction + b2 * last)
        if sigmas[i + 1] > 0 and eta:
            x = x + noise(sigmas[i], sigmas[i + 1]) * s_noise * up
        last, last_down = prediction, down
    return x


@torch.no_grad()
def sample_res_multistep(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Second-order RES multistep."""
    return _res_multistep(model, x, sigmas, extra_args, callback, s_noise, noise_sampler, eta=0.0, cfg_pp=False)


@torch.no_grad()
def sample_res_multistep_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """RES multistep with CFG++."""
    return _res_multistep(model, x, sigmas, extra_args, callback, s_noise, noise_sampler, eta=0.0, cfg_pp=True)


@torch.no_grad()
def sample_res_multistep_ancestral(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """RES multistep with ancestral noise."""
    return _res_multistep(model, x, sigmas, extra_args, callback, s_noise, noise_sampler, eta, cfg_pp=False)


@torch.no_grad()
def sample_res_multistep_ancestral_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """RES multistep with ancestral noise and CFG++."""
    return _res_multistep(model, x, sigmas, extra_args, callback, s_noise, noise_sampler, eta, cfg_pp=True)


@torch.no_grad()
def sample_gradient_estimation(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, ge_gamma: float = 2.0, cfg_pp: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Euler with d replaced by d + (gamma − 1)·(d − d_last); with CFG++ the slope is the unconditional one, taken from denoised."""
    denoise = Denoiser(model, x, extra_args, callback)
    if cfg_pp:
        denoise.record_uncond()
    last_d = None
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        d = to_d(x, sigmas[i], denoise.uncond_denoised if cfg_pp else denoised)
        h = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            x = denoised + d * sigmas[i + 1] if cfg_pp else x + d * h
            if last_d is not None:
                x = x + (ge_gamma - 1) * (d - last_d) * h
        last_d = d
    return x


@torch.no_grad()
def sample_gradient_estimation_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, ge_gamma: float = 2.0,
) -> torch.Tensor:  # fmt: skip
    return sample_gradient_estimation(model, x, sigmas, extra_args, callback, disable, ge_gamma=ge_gamma, cfg_pp=True)
