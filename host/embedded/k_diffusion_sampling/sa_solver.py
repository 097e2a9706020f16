"""SA-Solver (Xue et al. 2023, arXiv:2309.05019): stochastic Adams predictor and corrector in lambda = log(alpha/sigma).

With c = 1 + tau², x' = sigma'/sigma·e^(−tau²h)·x + alpha'·c·∫ e^(c(lambda − lambda'))·P(lambda) dlambda + noise, P the polynomial through
past predictions (eqs. 15 and 18).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .common import Denoiser, NoiseSampler, offset_first_sigma_for_snr, patched_model_sampling, sigma_to_half_log_snr


def _exponential_moments(start: torch.Tensor, end: torch.Tensor, count: int, c: float) -> torch.Tensor:
    """c·∫ e^(c(s − end))·s^p ds from start to end for p = 0 … count − 1, by parts: M_p = [s^p·e^(c(s − end))] − p/c·M_{p−1}."""
    decay = (-c * (end - start)).exp()
    moments = [1 - decay]
    for p in range(1, count):
        moments.append(end**p - start**p * decay - p / c * moments[-1])
    return torch.stack(moments)


def _adams_weights(sigma_next: Any, nodes: torch.Tensor, start: torch.Tensor, end: torch.Tensor, tau: float) -> torch.Tensor:
    """alpha'·c·∫ e^(c(lambda − end))·L_i(lambda) dlambda for the Lagrange polynomials over `nodes` (k,)."""
    moments = _exponential_moments(start, end, len(nodes), 1 + tau**2)
    powers = torch.vander(nodes, len(nodes), increasing=True).T
    return sigma_next * end.exp() * torch.linalg.solve(powers, moments)


def tau_interval(start_sigma: float, end_sigma: float, eta: float = 1.0) -> Callable[[Any], float]:
    """tau = eta between the two noise levels, 0 (no noise) outside."""
    return lambda sigma: eta if eta > 0 and start_sigma >= float(sigma) >= end_sigma else 0.0


@torch.no_grad()
def sample_sa_solver(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, tau_func: Callable[[Any], float] | None = None, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, predictor_order: int = 3, corrector_order: int = 4, use_pece: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Predict, evaluate, correct; with `use_pece` evaluate the corrected state again. Orders fall near a last sigma of 0."""
    if len(sigmas) <= 1:
        return x
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    model_sampling = patched_model_sampling(model)
    sigmas = offset_first_sigma_for_snr(sigmas, model_sampling)
    lambdas = sigma_to_half_log_snr(sigmas, model_sampling)
    if tau_func is None:
        tau_func = tau_interval(model_sampling.percent_to_sigma(0.2), model_sampling.percent_to_sigma(0.8))
    ends_at_zero = sigmas[-1] == 0
    predictions: list[torch.Tensor] = []
    predicted, tau, fresh = x, 0.0, 0.0

    def adams(x: torch.Tensor, i: int, newest: int, order: int) -> torch.Tensor:
        """From sigma_i to sigma_{i+1} with the polynomial through `order` predictions up to the one at `newest`."""
        weights = _adams_weights(sigmas[i + 1], lambdas[newest - order + 1 : newest + 1], lambdas[i], lambdas[i + 1], tau)
        h = lambdas[i + 1] - lambdas[i]
        decayed = sigmas[i + 1] / sigmas[i] * (-(tau**2) * h).exp() * x
        return decayed + torch.tensordot(torch.stack(predictions[-order:], dim=1), weights, dims=([1], [0]))

    for i in range(len(sigmas) - 1):
        denoised = denoise(predicted, sigmas[i])
        denoise.report(i, predicted, sigmas[i], denoised)
        predictions = [*predictions, denoised][-max(predictor_order, corrector_order) :]
        order, correct_order = min(predictor_order, len(predictions)), min(corrector_order, len(predictions))
        if i == 0 or (sigmas[i + 1] == 0 and not use_pece):
            correct_order = 0
        if ends_at_zero:
            order, correct_order = min(order, len(sigmas) - 2 - i), min(correct_order, len(sigmas) - 1 - i)
        if correct_order == 0:
            x = predicted
        else:
            x = adams(x, i - 1, i, correct_order)
            if tau > 0 and s_noise > 0:
                x = x + fresh
            if use_pece:
                denoised = denoise(x, sigmas[i])
                predictions[-1] = denoised
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            tau = tau_func(sigmas[i + 1])
            predicted = adams(x, i, i, order)
            if tau > 0 and s_noise > 0:
                amount = (-2 * tau**2 * (lambdas[i + 1] - lambdas[i])).expm1().neg().sqrt()
                fresh = noise(sigmas[i], sigmas[i + 1]) * sigmas[i + 1] * amount * s_noise
                predicted = predicted + fresh
    return x


@torch.no_grad()
def sample_sa_solver_pece(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, tau_func: Callable[[Any], float] | None = None, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, predictor_order: int = 3, corrector_order: int = 4,
) -> torch.Tensor:  # fmt: skip
    """Predict, evaluate, correct, evaluate."""
    return sample_sa_solver(
        model, x, sigmas, extra_args, callback, disable, tau_func, s_noise, noise_sampler, predictor_order, corrector_order, use_pece=True
    )
