"""Samplers that renew noise each step: DDPM, LCM, ER-SDE (Cui et al. 2023, arXiv:2309.06169), SEEDS (Gonzalez et al. 2023,
arXiv:2305.14267).

The last two work in lambda = log(alpha/sigma), so they hold for flows as for variance-exploding models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .common import (
    Denoiser,
    NoiseSampler,
    half_log_snr_to_sigma,
    offset_first_sigma_for_snr,
    patched_model_sampling,
    run_model_sampling,
    sigma_to_half_log_snr,
)


@torch.no_grad()
def sample_ddpm(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """The posterior step of Ho et al. 2020 (eq. 7) on y = x/sqrt(1 + sigma²), whose alpha-bar is 1/(1 + sigma²)."""
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    for i in range(len(sigmas) - 1):
        sigma, following = sigmas[i], sigmas[i + 1]
        denoised = denoise(x, sigma)
        denoise.report(i, x, sigma, denoised)
        alpha_bar, alpha_bar_next = 1 / (sigma**2 + 1), 1 / (following**2 + 1)
        alpha = alpha_bar / alpha_bar_next
        eps = (x - denoised) / sigma
        y = x / torch.sqrt(1.0 + sigma**2)
        y = (1.0 / alpha).sqrt() * (y - (1 - alpha) * eps / (1 - alpha_bar).sqrt())
        if following > 0:
            y = y + ((1 - alpha) * (1.0 - alpha_bar_next) / (1.0 - alpha_bar)).sqrt() * noise(sigma, following)
        x = y * torch.sqrt(1.0 + following**2)
    return x


@torch.no_grad()
def sample_lcm(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378): denoise, then noise afresh to the next level."""
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        x = denoised
        if sigmas[i + 1] > 0:
            x = run_model_sampling(model).noise_scaling(sigmas[i + 1], noise(sigmas[i], sigmas[i + 1]), x)
    return x


def er_noise_scale(ratio: torch.Tensor) -> torch.Tensor:
    """The paper's ER-SDE-5 noise scaling of sigma/alpha."""
    return ratio * ((ratio**0.3).exp() + 10.0)


@torch.no_grad()
def sample_er_sde(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    noise_scaler: Callable[[torch.Tensor], torch.Tensor] | None = None, max_stage: int = 3,
) -> torch.Tensor:  # fmt: skip
    """ER-SDE-Solver-3 in u = sigma/alpha: first-order step with r = s(u')/s(u), then terms of the first and second difference of
    denoised, whose integrals of 1/s and u/s are sums over 200 points."""
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    scale = noise_scaler or er_noise_scale
    points = torch.arange(200, dtype=torch.float32, device=x.device)
    model_sampling = patched_model_sampling(model)
    sigmas = offset_first_sigma_for_snr(sigmas, model_sampling)
    u = sigma_to_half_log_snr(sigmas, model_sampling).neg().exp()  # (n + 1,)
    last, last_slope = None, None
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        if sigmas[i + 1] == 0:
            x = denoised
            continue
        alpha, alpha_next = sigmas[i] / u[i], sigmas[i + 1] / u[i + 1]
        r = scale(u[i + 1]) / scale(u[i])
        x = alpha_next / alpha * r * x + alpha_next * (1 - r) * denoised
        if last is not None and max_stage >= 2:
            h = u[i + 1] - u[i]
            spacing = -h / 200.0
            inside = u[i + 1] + points * spacing
            slope = (denoised - last) / (u[i] - u[i - 1])
            x = x + alpha_next * (h + torch.sum(1 / scale(inside)) * spacing * scale(u[i + 1])) * slope
            if last_slope is not None and max_stage >= 3:
                curvature = (slope - last_slope) / ((u[i] - u[i - 2]) / 2)
                integral = torch.sum((inside - u[i]) / scale(inside)) * spacing
                x = x + alpha_next * (h**2 / 2 + integral * scale(u[i + 1])) * curvature
            last_slope = slope
        if s_noise > 0:
            fresh = (u[i + 1] ** 2 - u[i] ** 2 * r**2).sqrt().nan_to_num(nan=0.0)
            x = x + alpha_next * noise(sigmas[i], sigmas[i + 1]) * s_noise * fresh
        last = denoised
    return x


def _h_phi_1(h: torch.Tensor) -> torch.Tensor:
    return torch.expm1(h)


def _h_phi_2(h: torch.Tensor) -> torch.Tensor:
    return (torch.expm1(h) - h) / h


class _SeedsStep:
    """One SDE step from sigma to sigma' in lambda, with noise that is shared between its inner points."""

    def __init__(self, sigma: torch.Tensor, sigma_next: torch.Tensor, model_sampling: Any, eta: float, s_noise: float, noise: NoiseSampler):
        self.sigma, self.eta, self.s_noise, self.noise, self.model_sampling = sigma, eta, s_noise, noise, model_sampling
        self.start, self.end = (sigma_to_half_log_snr(level, model_sampling) for level in (sigma, sigma_next))
        self.sigma_next = sigma_next
        self.h = self.end - self.start
        self.h_eta = self.h * (eta + 1)
        self.fresh: torch.Tensor | None = None
        self.reached = 0.0
        self.level = sigma

    def sigma_at(self, r: float) -> torch.Tensor:
        return self.sigma_next if r == 1 else half_log_snr_to_sigma(torch.lerp(self.start, self.end, r), self.model_sampling)

    def advance(self, x: torch.Tensor, r: float, drift: torch.Tensor) -> torch.Tensor:
        """x at the share r of the step: decayed x, minus alpha times `drift`, plus the noise gathered so far."""
        sigma_r = self.sigma_at(r)
        half_log_snr = self.end if r == 1 else torch.lerp(self.start, self.end, r)
        moved = sigma_r / self.sigma * (-r * self.h * self.eta).exp() * x - sigma_r * half_log_snr.exp() * drift
        if self.eta > 0 and self.s_noise > 0:
            decay = (self.reached - r) * self.h * self.eta
            fresh = decay.mul(2).expm1().neg().sqrt() * self.noise(self.level, sigma_r)
            self.fresh = fresh if self.fresh is None else self.fresh * decay.exp() + fresh
            moved = moved + self.fresh * sigma_r * self.s_noise
            self.reached, self.level = r, sigma_r
        return moved


def _seeds(model, x, sigmas, extra_args, callback, eta, s_noise, noise_sampler, step) -> torch.Tensor:
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    model_sampling = patched_model_sampling(model)
    sigmas = offset_first_sigma_for_snr(sigmas, model_sampling)
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            x = step(denoise, x, denoised, _SeedsStep(sigmas[i], sigmas[i + 1], model_sampling, eta, s_noise, noise))
    return x


@torch.no_grad()
def sample_seeds_2(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, r: float = 0.5,
) -> torch.Tensor:  # fmt: skip
    """SEEDS with one inner point at the share r of the step in lambda."""

    def step(denoise: Denoiser, x: torch.Tensor, denoised: torch.Tensor, span: _SeedsStep) -> torch.Tensor:
        x_2 = span.advance(x, r, _h_phi_1(-r * span.h_eta) * denoised)
        mixed = torch.lerp(denoised, denoise(x_2, span.sigma_at(r)), 1 / (2 * r))
        return span.advance(x, 1, _h_phi_1(-span.h_eta) * mixed)

    return _seeds(model, x, sigmas, extra_args, callback, eta, s_noise, noise_sampler, step)


@torch.no_grad()
def sample_seeds_3(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    r_1: float = 1 / 3, r_2: float = 2 / 3,
) -> torch.Tensor:  # fmt: skip
    """SEEDS with two inner points."""

    def step(denoise: Denoiser, x: torch.Tensor, denoised: torch.Tensor, span: _SeedsStep) -> torch.Tensor:
        x_2 = span.advance(x, r_1, _h_phi_1(-r_1 * span.h_eta) * denoised)
        denoised_2 = denoise(x_2, span.sigma_at(r_1))
        weight = r_2 / r_1 * _h_phi_2(-r_2 * span.h_eta)
        x_3 = span.advance(x, r_2, (_h_phi_1(-r_2 * span.h_eta) - weight) * denoised + weight * denoised_2)
        weight = _h_phi_2(-span.h_eta) / r_2
        drift = (_h_phi_1(-span.h_eta) - weight) * denoised + weight * denoise(x_3, span.sigma_at(r_2))
        return span.advance(x, 1, drift)

    return _seeds(model, x, sigmas, extra_args, callback, eta, s_noise, noise_sampler, step)
