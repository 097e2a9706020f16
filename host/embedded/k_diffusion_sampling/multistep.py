"""Linear multistep solvers: the slope d = dx/dsigma is remembered and extrapolated.

lms: exact integrals of the interpolating polynomial (Adams-Bashforth on uneven steps). ipndm, ipndm_v: improved PNDM (Zhang & Chen 2023,
arXiv:2204.13902) with fixed and with step-dependent coefficients. deis: DEIS (same paper), tAB form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .common import Denoiser, to_d


def _lagrange_integral(nodes: np.ndarray, j: int, start: float, end: float) -> float:
    """The integral over [start, end] of the polynomial that is 1 at nodes[j] and 0 at the others (Gauss-Legendre, exact)."""
    points, weights = np.polynomial.legendre.leggauss(len(nodes))
    tau = (end - start) / 2 * points + (end + start) / 2
    others = np.delete(nodes, j)
    values = np.prod([(tau - node) / (nodes[j] - node) for node in others], axis=0) * np.ones_like(tau)
    return float((end - start) / 2 * (weights * values).sum())


@torch.no_grad()
def sample_lms(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, order: int = 4,
) -> torch.Tensor:  # fmt: skip
    """x ← x + ∫ P(sigma) dsigma, P through the last `order` slopes."""
    denoise = Denoiser(model, x, extra_args, callback)
    levels = sigmas.detach().cpu().double().numpy()
    slopes: list[torch.Tensor] = []  # newest first
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        slopes = [to_d(x, sigmas[i], denoised), *slopes[: order - 1]]
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            nodes = levels[i::-1][: len(slopes)]
            weights = [_lagrange_integral(nodes, j, levels[i], levels[i + 1]) for j in range(len(slopes))]
            x = x + sum(weight * slope for weight, slope in zip(weights, slopes))
    return x


def _multistep(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None, callback: Callable | None, max_order: int,
    weights_of: Callable[[int, int], list],
) -> torch.Tensor:  # fmt: skip
    """x ← x + sum of weights_of(i, order) times the slopes, newest first; a step to 0 takes denoised."""
    denoise = Denoiser(model, x, extra_args, callback)
    slopes: list[torch.Tensor] = []
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        denoise.report(i, x, sigmas[i], denoised)
        slopes = [to_d(x, sigmas[i], denoised), *slopes[: max_order - 1]]
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            x = x + sum(weight * slope for weight, slope in zip(weights_of(i, len(slopes)), slopes))
    return x


ADAMS_BASHFORTH = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@torch.no_grad()
def sample_ipndm(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, max_order: int = 4,
) -> torch.Tensor:  # fmt: skip
    """Adams-Bashforth with the coefficients of even steps."""

    def weights_of(i: int, order: int) -> list:
        return [(sigmas[i + 1] - sigmas[i]) * coefficient for coefficient in ADAMS_BASHFORTH[order]]

    return _multistep(model, x, sigmas, extra_args, callback, max_order, weights_of)


def _uneven_coefficients(h: list[Any]) -> list[Any]:
    """Slope coefficients for steps h = [this, last, …]; on even steps those of Adams-Bashforth.

    They are those of the authors' published code (zju-pi/diff-sampler), whose third-order term multiplies the step ratio inside the
    bracket, where the exact integral has it outside.
    """
    if len(h) == 1:
        return [1.0]
    ratio = h[0] / h[1]
    if len(h) == 2:
        return [1 + ratio / 2, -ratio / 2]
    two, three = h[0] + h[1], h[1] + h[2]
    third = (1 - h[0] / (3 * two) * (h[0] * two) / (h[1] * three)) / 2
    back = h[1] / h[2]
    if len(h) == 3:
        return [1 + ratio / 2 + third, -ratio / 2 - (1 + back) * third, third * back]
    fourth = (1 - h[0] / (3 * two)) / 2 + (1 - h[0] / (2 * two)) * h[0] / (6 * (two + h[2]))
    fourth = fourth * (h[0] * two * (two + h[2])) / (h[1] * three * (three + h[3]))
    chain = h[1] * three / (h[2] * (h[2] + h[3]))
    return [
        1 + ratio / 2 + third + fourth,
        -ratio / 2 - (1 + back) * third - (1 + back + chain) * fourth,
        third * back + (back + chain * (1 + h[2] / h[3])) * fourth,
        -fourth * chain * h[1] / h[2],
    ]


@torch.no_grad()
def sample_ipndm_v(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, max_order: int = 4,
) -> torch.Tensor:  # fmt: skip
    """Adams-Bashforth with coefficients for uneven steps."""

    def weights_of(i: int, order: int) -> list:
        steps = [sigmas[i + 1 - k] - sigmas[i - k] for k in range(order)]
        return [steps[0] * coefficient for coefficient in _uneven_coefficients(steps)]

    return _multistep(model, x, sigmas, extra_args, callback, max_order, weights_of)


DEIS_POINTS = 10000  # of the rectangle rule below


def _deis_time(sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(t, beta_0, beta_1): times of the VP process with linear beta that runs from sigma 0.002 at t = 1e-3 to 80 at t = 1."""
    first, last = (torch.tensor(sigma).pow(2).add(1).log() for sigma in (0.002, 80.0))
    beta_d = 2 * (first / 1e-3 - last) / (1e-3 - 1)
    beta_min = last - 0.5 * beta_d
    sigmas = sigmas.detach().cpu()
    t = ((beta_min**2 + 2 * beta_d * (sigmas**2 + 1).log()).sqrt() - beta_min) / beta_d
    return t, beta_min, beta_d + beta_min


def _deis_weights(t: torch.Tensor, i: int, order: int, beta_0: torch.Tensor, beta_1: torch.Tensor) -> list[torch.Tensor]:
    """Integrals over [t_i, t_{i+1}] of dsigma/dt-like weight times the Lagrange polynomials through the last `order` times."""
    tau = torch.linspace(t[i], t[i + 1], DEIS_POINTS)
    alpha = torch.exp(-0.5 * tau**2 * (beta_1 - beta_0) - tau * beta_0)
    weight = 0.5 * (tau * (beta_1 - beta_0) + beta_0) / torch.sqrt(alpha * (1 - alpha))
    nodes = [t[i - k] for k in range(order)]
    integrals = []
    for j, node in enumerate(nodes):
        polynomial = math.prod((tau - other) / (node - other) for k, other in enumerate(nodes) if k != j)
        integrals.append(torch.sum(weight * polynomial) * (t[i + 1] - t[i]) / DEIS_POINTS)
    return integrals


@torch.no_grad()
def sample_deis(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, max_order: int = 3,
) -> torch.Tensor:  # fmt: skip
    """Slopes extrapolated by polynomials in the VP time, integrated numerically; the first step is Euler's."""
    t, beta_0, beta_1 = _deis_time(sigmas)

    def weights_of(i: int, order: int) -> list:
        if order == 1:
            return [sigmas[i + 1] - sigmas[i]]
        return [weight.to(x.device) for weight in _deis_weights(t, i, order, beta_0, beta_1)]

    return _multistep(model, x, sigmas, extra_args, callback, max_order, weights_of)
