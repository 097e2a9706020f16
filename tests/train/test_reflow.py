"""Reflow on a plane with the project's own trainer, pairs and straightness: "Flow Straight and Fast", arXiv 2209.03003."""

from __future__ import annotations

import math

import torch
from rectiflow.samplers.pairs import FlowPairs, make_pairs
from rectiflow.samplers.solvers import sample_euler, sample_midpoint
from rectiflow.samplers.straightness import PathRecord, sample_recorded, straightness
from rectiflow.train.config import TrainConfig
from rectiflow.train.loop import Batch, Trainer
from rectiflow.train.optim import Optim
from rectiflow.train.targets import Target
from torch import nn

PAIRS = 4096


def eight_gaussians(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(count, 2, generator=generator)


class Points:
    """Examples from a table: points of the plane and, for reflow, the noise of each."""

    def __init__(self, points: torch.Tensor, noise: torch.Tensor | None = None):
        self.points, self.noise, self.fingerprint = points, noise, str(float(points.sum()))

    def buckets(self):
        return [list(range(len(self.points)))]

    def batch(self, rows, draws) -> Batch:
        return Batch(self.points[rows], [None] * len(rows), noise=None if self.noise is None else self.noise[rows])


class Plane(nn.Module):
    """A velocity field on the plane; called as a solver calls a model it answers `denoised`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def describe(self):
        return {"model": "plane"}

    def params(self):
        return dict(self.named_parameters())

    def velocity(self, x, sigma, cond=None):
        s = sigma.reshape(-1, 1).float()
        return self.body(torch.cat([x, s, (math.pi * s).sin(), (math.pi * s).cos()], 1))

    def forward(self, x, sigma, **extra):
        return x - sigma.reshape(-1, 1) * self.velocity(x, sigma)


def falling(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1)


def train(model: Plane, data: Points, target: str, steps: int, lr: float) -> None:
    optim = Optim(kind="adam", lr=lr, warmup=20, weight_decay=0.0)
    config = TrainConfig(steps=steps, batch=512, target=Target(target), optim=optim, ema=0.0, dropout=0.0, validate_every=0, save_every=0)
    Trainer(model, data, config).run()


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over 64 directions of the distance of sorted projections, equal numbers of points."""
    angle = torch.arange(64) * (math.pi / 64)
    ways = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ ways).sort(0).values - (b @ ways).sort(0).values).square().mean().sqrt())


def judged(model: Plane) -> tuple[float, float, float]:
    """S, and the distance to the data after one Euler step and after a hundred."""
    noise = torch.randn(PAIRS, 2, generator=torch.Generator().manual_seed(5))
    truth, record = eight_gaussians(PAIRS, 6), PathRecord()
    sample_recorded(model, noise, falling(20), disable=True, record=record)
    one, many = (sample_euler(model, noise, falling(n), disable=True) for n in (1, 100))
    return straightness(record).value, sliced_wasserstein(one, truth), sliced_wasserstein(many, truth)


def test_reflow_straightens_a_flow_and_keeps_what_it_draws():
    """S and the error of one step fall at least threefold; a hundred steps err at most 20 % more, as the paper's page asks."""
    model = Plane()
    train(model, Points(eight_gaussians(16384, 1)), "velocity", 1200, 3e-3)
    bent = judged(model)

    def end(noise: torch.Tensor, seed: int) -> torch.Tensor:
        return sample_midpoint(model, noise, falling(20), disable=True)

    clean, seeds = (torch.cat(parts) for parts in zip(*make_pairs(end, torch.zeros(1, 2), PAIRS, PAIRS, 100)))
    pairs = FlowPairs(clean, seeds, {})
    train(model, Points(pairs.clean, pairs.noise()), "reflow_pairs", 1200, 2e-3)
    straight = judged(model)
    print("S, one step, hundred steps:", bent, straight)
    assert straight[0] < bent[0] / 3 and straight[1] < bent[1] / 3
    assert straight[2] < 1.2 * bent[2]
