"""Analytic flows: exact velocity, exact end points, and the model a solver calls. Convention as everywhere: x = (1 − s)·x0 + s·noise.

Each flow offers `velocity(x, s)` on `(n, d)` states and is itself the model: `flow(x, sigma_rows)` returns `denoised` and counts.
"""

from __future__ import annotations

import torch

__all__ = ["GaussianFlow", "MixtureFlow", "StraightFlow", "fitted_order", "rmse", "rk4_reference"]


class _Flow:
    calls = 0

    def velocity(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra) -> torch.Tensor:
        self.calls += 1
        s = sigma.reshape(-1, *[1] * (x.ndim - 1))
        return x - s * self.velocity(x, s)


class GaussianFlow(_Flow):
    """Data N(mean, sd²) in every coordinate. The flow map is affine: noise z goes to mean + sd·z."""

    def __init__(self, mean: float = 0.7, sd: float = 0.5):
        self.mean, self.sd = mean, sd

    def velocity(self, x, s):
        variance = ((1 - s) * self.sd) ** 2 + s**2
        return (s - (1 - s) * self.sd**2) / variance * (x - (1 - s) * self.mean) - self.mean

    def clean(self, noise):
        return self.mean + self.sd * noise


class MixtureFlow(_Flow):
    """Four isotropic Gaussians in R^16: means from N(0, I), sd 0.3, weights .4 .3 .2 .1 (rf-solver-edit, "Flow F")."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.means = torch.randn(4, 16, generator=generator, dtype=torch.float64)  # (k, d)
        self.weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        self.sd = 0.3
        self.generator = generator

    def velocity(self, x, s):
        means, weights = self.means.to(x), self.weights.to(x)
        variance = ((1 - s) * self.sd) ** 2 + s**2  # () or (n, 1)
        offset = x[:, None, :] - (1 - s)[..., None] * means if isinstance(s, torch.Tensor) and s.ndim else x[:, None, :] - (1 - s) * means
        share = torch.softmax(torch.log(weights) - (offset**2).sum(-1) / (2 * variance), dim=1)  # (n, k)
        slope = (s - (1 - s) * self.sd**2) / variance
        return slope * torch.einsum("nk,nkd->nd", share, offset) - share @ means

    def data(self, count: int) -> torch.Tensor:
        which = torch.multinomial(self.weights, count, replacement=True, generator=self.generator)
        return self.means[which] + self.sd * torch.randn(count, 16, generator=self.generator, dtype=torch.float64)

    def noise(self, count: int) -> torch.Tensor:
        return torch.randn(count, 16, generator=self.generator, dtype=torch.float64)


class StraightFlow(_Flow):
    """The reflowed ideal: each row travels from its noise to its data on a line, v = noise − data everywhere."""

    def __init__(self, data: torch.Tensor, noise: torch.Tensor):
        self.difference = noise - data

    def velocity(self, x, s):
        return self.difference.to(x).expand_as(x)


def rk4_reference(flow: _Flow, x: torch.Tensor, start: float, end: float, steps: int = 2000) -> torch.Tensor:
    """The end point by classical Runge-Kutta on the exact velocity, independent of the code under test."""
    h = (end - start) / steps
    for i in range(steps):
        s = torch.tensor(start + h * i, dtype=x.dtype)
        k1 = flow.velocity(x, s)
        k2 = flow.velocity(x + h / 2 * k1, s + h / 2)
        k3 = flow.velocity(x + h / 2 * k2, s + h / 2)
        k4 = flow.velocity(x + h * k3, s + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b) ** 2).mean().sqrt())


def fitted_order(steps: list[int], errors: list[float]) -> float:
    """Minus the least-squares slope of log error over log steps."""
    x = torch.log(torch.tensor(steps, dtype=torch.float64))
    y = torch.log(torch.tensor(errors, dtype=torch.float64))
    x = x - x.mean()
    return -float((x * y).sum() / (x * x).sum())
