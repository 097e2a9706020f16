"""Eight pictures by heart: `python bench/train_overfit.py`; writes bench/results/train_overfit.csv.

The small MMDiT of bench/small_flow.py learns eight shapes (bench/train_densities.py) on one thread, for at most so many seconds of it. Then
64 noises are drawn by 20 Euler steps. A flow of eight points that is learnt exactly ends at one of them from every noise, at each from an
eighth of the noises: told are the PSNR to the nearest of the eight (pictures are −1…1) and how many of the eight were reached.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from small_flow import Table, drawn, small_flow, trained_for
from table import write_table
from train_densities import BATCH, HIDDEN, shapes

COUNT, NOISES, EULER = 8, 64, 20


def main() -> None:
    from rectiflow.train.config import TrainConfig
    from rectiflow.train.densities import Density
    from rectiflow.train.optim import Optim

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=115.0, help="of the processor, for the training")
    parser.add_argument("--steps", type=int, default=1000, help="at most; the rate falls to its floor over them")
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(given.seeds):
        learnt, model = shapes(COUNT, 100 + seed), small_flow(3, HIDDEN, seed)
        config = TrainConfig(
            steps=given.steps, batch=BATCH, seed=seed, density=Density("uniform"), dropout=0.0, ema=0.99, save_every=0,
            optim=Optim("muon", lr=3e-3, muon_lr=0.02, warmup=30, weight_decay=0.0, floor=0.0),
        )  # fmt: skip
        trainer, seconds = trained_for(given.seconds, model, Table(learnt), config)
        noise = torch.randn((NOISES, *learnt.shape[1:]), generator=torch.Generator().manual_seed(seed))
        with trainer.averaged():
            ends = drawn(model, noise, EULER)
        errors = (ends[:, None] - learnt[None]).square().flatten(2).mean(2)
        near, which = errors.min(1)
        decibels = (10 * torch.log10(4 / near)).tolist()
        rows.append((
            seed, trainer.done, f"{seconds:.0f}", f"{statistics.median(decibels):.1f}", f"{min(decibels):.1f}", len(which.unique()), COUNT,
        ))  # fmt: skip
        print(*rows[-1], flush=True)
    header = ("seed", "steps", "processor_seconds", "psnr_median", "psnr_worst", "shapes_reached", "shapes")
    write_table("train_overfit", header, rows)


if __name__ == "__main__":
    main()
