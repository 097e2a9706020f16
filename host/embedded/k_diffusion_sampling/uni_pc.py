"""UniPC (Zhao et al. 2023, arXiv:2302.04867): unified predictor and corrector of order up to 3, data prediction, multistep.

It runs on y = x/sqrt(1 + sigma²), whose alpha-bar is 1/(1 + sigma²), with lambda = log(alpha/std). A last sigma of 0 is solved to 0.001.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .common import Denoiser

LAST_SIGMA = 0.001


def _log_alpha(sigma: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.log(1 / (sigma * sigma + 1))


def _std(sigma: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(1.0 - torch.exp(2.0 * _log_alpha(sigma)))


def _lambda(sigma: torch.Tensor) -> torch.Tensor:
    return _log_alpha(sigma) - 0.5 * torch.log(1.0 - torch.exp(2.0 * _log_alpha(sigma)))


def _system(ratios: list[torch.Tensor], h: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R and b of the order conditions R·rho = b (the paper's theorem 3.1): rows r^(k−1), values k!·h·phi_{k+1}(h)/B(h)."""
    nodes = torch.stack([*ratios, torch.ones_like(h)])
    rows, values = [], []
    phi, factorial = torch.expm1(h) / h - 1, 1
    for k in range(1, len(nodes) + 1):
        rows.append(nodes ** (k - 1))
        values.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    return torch.stack(rows), torch.stack(values)


class _History:
    """Past noise levels and predictions, oldest first."""

    def __init__(self, sigma: torch.Tensor, prediction: torch.Tensor):
        self.sigmas, self.predictions = [sigma], [prediction]

    def push(self, sigma: torch.Tensor, prediction: torch.Tensor) -> None:
        self.sigmas = [*self.sigmas[-2:], sigma]
        self.predictions = [*self.predictions[-2:], prediction]


def _update(y: torch.Tensor, history: _History, sigma: torch.Tensor, order: int, variant: str, evaluate: Callable | None):
    """Predict y at `sigma`; with `evaluate` also correct it. Returns (y, prediction at the predicted y or None)."""
    before, prediction = history.sigmas[-1], history.predictions[-1]
    h = _lambda(sigma) - _lambda(before)
    scale = -h if variant == "bh1" else torch.expm1(-h)
    ratios = [(_lambda(history.sigmas[-k]) - _lambda(before)) / h for k in range(2, order + 1)]
    slopes = [(history.predictions[-k] - prediction) / ratio for k, ratio in zip(range(2, order + 1), ratios)]
    rows, values = _system(ratios, -h, scale)
    alpha = torch.exp(_log_alpha(sigma))
    base = _std(sigma) / _std(before) * y - alpha * torch.expm1(-h) * prediction

    if order == 2:
        weights = [0.5]  # the paper's simplification for the second order
    else:
        weights = torch.linalg.solve(rows[:-1, :-1], values[:-1]) if order > 2 else []
    predicted = base - alpha * scale * sum(weight * slope for weight, slope in zip(weights, slopes))
    if evaluate is None:
        return predicted, None
    ahead = evaluate(predicted, sigma)
    weights = torch.linalg.solve(rows, values) if order > 1 else [0.5]
    total = sum(weight * slope for weight, slope in zip(weights, [*slopes, ahead - prediction]))
    return base - alpha * scale * total, ahead


def _sample(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None, callback: Callable | None, variant: str):
    denoise = Denoiser(model, x, extra_args, callback)
    levels = sigmas.clone()
    if levels[-1] == 0:
        levels[-1] = LAST_SIGMA
    steps = len(levels) - 1
    if steps < 1:
        return x
    max_order = min(3, max(1, steps - 1))

    def evaluate(y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        # denoised itself would do on paper; through eps it carries the same rounding of 1 − alpha² as the steps that use it.
        scaled = y * (sigma**2 + 1) ** 0.5
        eps = (scaled - denoise(scaled, sigma)) / sigma
        return (y - _std(sigma) * eps) / torch.exp(_log_alpha(sigma))

    y = x / torch.sqrt(1.0 + levels[0] ** 2)
    history = _History(levels[0], evaluate(y, levels[0]))
    for k in range(1, steps + 1):
        order = min(max_order, k, steps + 1 - k)  # low orders where history is short and, for stability, at the end
        y, prediction = _update(y, history, levels[k], order, variant, evaluate if k < steps else None)
        denoise.report(k - 1, y, levels[k - 1], history.predictions[-1])
        if prediction is not None:
            history.push(levels[k], prediction)
    return y / torch.exp(_log_alpha(levels[-1]))


@torch.no_grad()
def sample_uni_pc(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """UniPC with B(h) = h."""
    return _sample(model, x, sigmas, extra_args, callback, "bh1")


@torch.no_grad()
def sample_uni_pc_bh2(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """UniPC with B(h) = e^h − 1."""
    return _sample(model, x, sigmas, extra_args, callback, "bh2")
