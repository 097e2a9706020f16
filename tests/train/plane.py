"""Flows on a plane: a small network as the trainer's trainee and a solver's model, eight Gaussians on a ring, distances of point clouds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from rectiflow.samplers.pairs import FlowPairs, make_pairs
from rectiflow.samplers.solvers import sample_euler, sample_midpoint
from rectiflow.samplers.straightness import PathRecord, sample_recorded, straightness
from rectiflow.train.config import TrainConfig
from rectiflow.train.densities import Density
from rectiflow.train.loop import Batch, Trainer
from rectiflow.train.optim import Optim
from rectiflow.train.targets import Target
from torch import nn

POINTS = 4096


def eight_gaussians(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(count, 2, generator=generator)


class RingFlow:
    """The exact flow of eight_gaussians, as a solver's model: denoised = E[x0 | x_σ] of a mixture in closed form.

    Of a part at m with spread τ: x_σ ~ N((1 − σ)m, V), V = (1 − σ)²τ² + σ², and E[x0] = m + τ²(1 − σ)/V·(x_σ − (1 − σ)m).
    """

    def __init__(self, only: int | None = None):
        angle = torch.arange(8) * (math.pi / 4)
        middles = 2 * torch.stack([angle.cos(), angle.sin()], 1)
        self.middles = middles if only is None else middles[only : only + 1]

    def velocity(self, x, sigma, cond=None):
        return (x - self(x, sigma)) / sigma.clamp(min=1e-4).reshape(-1, 1)

    def __call__(self, x, sigma, **extra):
        s = sigma.reshape(-1, 1, 1).to(x)
        spread = 0.1**2
        variance = (1 - s) ** 2 * spread + s**2  # (b, 1, 1)
        away = x[:, None] - (1 - s) * self.middles  # (b, k, 2)
        share = torch.softmax(-(away.square().sum(2, keepdim=True) / (2 * variance)), dim=1)
        return (share * (self.middles + spread * (1 - s) / variance * away)).sum(1)


class Points:
    """Examples from a table: points of the plane and, for reflow, the noise of each."""

    def __init__(self, points: torch.Tensor, noise: torch.Tensor | None = None):
        self.points, self.noise, self.fingerprint = points, noise, str(float(points.sum()))

    def buckets(self):
        return [list(range(len(self.points)))]

    def batch(self, rows, draws) -> Batch:
        return Batch(self.points[rows], [None] * len(rows), noise=None if self.noise is None else self.noise[rows])


class Plane(nn.Module):
    """A velocity field on the plane, three hidden layers of `width`; called as a solver calls a model it answers `denoised`."""

    def __init__(self, width: int = 96, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(5, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, 2))

    def describe(self):
        return {"model": "plane"}

    def params(self):
        return dict(self.named_parameters())

    def velocity(self, x, sigma, cond=None):
        s = sigma.reshape(-1, 1).float()
        return self.body(torch.cat([x, s, (math.pi * s).sin(), (math.pi * s).cos()], 1))

    def forward(self, x, sigma, **extra):
        return x - sigma.reshape(-1, 1) * self.velocity(x, sigma)


def train(model: Plane, data: Points, target: Target, steps: int, lr: float, *, teacher: Plane | None = None, **changed) -> Trainer:
    """Adam without decay, uniform sigma as reflow asks, 512 points a step."""
    optim = Optim(kind="adam", lr=lr, warmup=20, weight_decay=0.0)
    settings = {"batch": 512, "ema": 0.0, "validate_every": 0, "save_every": 0, **changed}
    config = TrainConfig(steps=steps, target=target, optim=optim, density=Density("uniform"), dropout=0.0, **settings)
    trainer = Trainer(model, data, config, teacher=teacher)
    trainer.run()
    return trainer


def falling(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1)


def normal(seed: int, count: int = POINTS) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def drawn(model: Callable, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Where `steps` Euler steps from `noise` end."""
    return sample_euler(model, noise, falling(steps), disable=True)


def pairs_of(model: Callable, count: int = POINTS, seed: int = 100) -> FlowPairs:
    """Pairs of noise and end by the midpoint rule in 20 steps."""

    def end(noise: torch.Tensor, first_seed: int) -> torch.Tensor:
        return sample_midpoint(model, noise, falling(20), disable=True)

    clean, seeds = (torch.cat(parts) for parts in zip(*make_pairs(end, torch.zeros(1, 2), count, count, seed)))
    return FlowPairs(clean, seeds, {})


def paired(pairs: FlowPairs) -> Points:
    return Points(pairs.clean, pairs.noise())


def bend(model: Callable, noise: torch.Tensor) -> float:
    """S of the model's paths."""
    record = PathRecord()
    sample_recorded(model, noise, falling(20), disable=True, record=record)
    return straightness(record).value


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over 64 directions of the distance of sorted projections, equal numbers of points."""
    angle = torch.arange(64) * (math.pi / 64)
    ways = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ ways).sort(0).values - (b @ ways).sort(0).values).square().mean().sqrt())


def mmd(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared maximum mean discrepancy under Gaussian kernels of widths 0.25, 0.5, 1 and 2, unbiased."""

    def kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        squares = torch.cdist(one, other).square()
        return sum(torch.exp(-squares / (2 * width**2)) for width in (0.25, 0.5, 1.0, 2.0))

    def within(one: torch.Tensor) -> torch.Tensor:
        between = kernel(one, one)
        return (between.sum() - between.diagonal().sum()) / (len(one) * (len(one) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())
