"""Uniform against logit-normal(0, 1) on a small MMDiT: `python bench/train_densities.py`; writes bench/results/train_densities.csv.

Toy set: 16×16 pictures of one coloured disc or square on white, drawn anew from a seed. Each density trains the same network for the same
steps from the same seeds; its average is sampled by 5 and 50 Euler steps and compared with pictures that nobody trained on, by the sliced
Wasserstein distance (256 directions). The floor is that distance between two sets of real pictures.
"""

from __future__ import annotations

import argparse
import time

import torch
from small_flow import Table, drawn, small_flow
from table import write_table

SIDE, HIDDEN, BATCH, PICTURES, JUDGED = 16, 64, 32, 8192, 512
DENSITIES = {"uniform": {"kind": "uniform"}, "logit-normal(0, 1)": {"kind": "logit_normal"}}


def shapes(count: int, seed: int) -> torch.Tensor:
    """(count, 3, 16, 16) in −1…1."""
    draw = torch.Generator().manual_seed(seed)
    centre = 4 + 8 * torch.rand((count, 2, 1, 1), generator=draw)
    radius = 2 + 2 * torch.rand((count, 1, 1), generator=draw)
    colour = torch.rand((count, 3, 1, 1), generator=draw) * 1.6 - 1.0
    square = torch.rand((count, 1, 1), generator=draw) < 0.5
    place = torch.arange(SIDE) + 0.5
    y, x = (place[:, None] - centre[:, 0]).abs(), (place[None] - centre[:, 1]).abs()  # (count, side, 1), (count, 1, side)
    away = torch.where(square, torch.maximum(y.expand(-1, SIDE, SIDE), x.expand(-1, SIDE, SIDE)), (y**2 + x**2).sqrt())
    inside = (radius + 0.5 - away).clamp(0.0, 1.0)[:, None]  # a soft edge of one pixel
    return inside * colour + (1.0 - inside)


def sliced(a: torch.Tensor, b: torch.Tensor) -> float:
    ways = torch.nn.functional.normalize(torch.randn((a[0].numel(), 256), generator=torch.Generator().manual_seed(0)), dim=0)
    projected = ((each.flatten(1) @ ways).sort(0).values for each in (a, b))
    first, second = projected
    return float((first - second).square().mean().sqrt())


def main() -> None:
    from rectiflow.train.config import TrainConfig
    from rectiflow.train.densities import Density
    from rectiflow.train.loop import Trainer
    from rectiflow.train.optim import Optim

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    truth = shapes(JUDGED, 1)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))
    floor = sliced(shapes(JUDGED, 3), truth)
    rows = []
    for seed in range(given.seeds):
        for name, density in DENSITIES.items():
            model = small_flow(3, HIDDEN, seed)
            config = TrainConfig(
                steps=given.steps, batch=BATCH, seed=seed, density=Density(**density), optim=Optim(lr=3e-3, warmup=50), ema=0.99,
                dropout=0.0, validate_every=given.steps, save_every=0,
            )  # fmt: skip
            started = time.process_time()
            trainer = Trainer(model, Table(shapes(PICTURES, seed + 10)), config)
            trainer.run()
            seconds = time.process_time() - started
            with trainer.averaged():
                found = [sliced(drawn(model, noise, steps), truth) for steps in (5, 50)]
            error = trainer.history.best().mean
            rows.append((name, seed, given.steps, *(f"{value:.4f}" for value in (*found, floor, error)), f"{seconds:.0f}"))
            print(*rows[-1], flush=True)
    header = ("density", "seed", "steps", "distance_5_steps", "distance_50_steps", "floor", "velocity_error", "processor_seconds")
    write_table("train_densities", header, rows)


if __name__ == "__main__":
    main()
