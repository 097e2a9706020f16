"""A velocity model with a few hundred parameters, and data from a table: what the trainer needs to know of either."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rectiflow.train.checkpoints import RunFolder
from rectiflow.train.config import TrainConfig
from rectiflow.train.loop import Batch, Trainer
from rectiflow.train.optim import Optim
from torch import nn

SHAPE = (3, 4, 4)


class Table:
    """Twelve fixed latents; the condition is the row."""

    fingerprint = "table"

    def __init__(self, rows: int = 12):
        self.latents = torch.randn((rows, *SHAPE), generator=torch.Generator().manual_seed(1))

    def buckets(self):
        return [list(range(len(self.latents)))]

    def batch(self, rows, draws) -> Batch:
        return Batch(self.latents[rows], rows.tolist())


class Toy(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        size = SHAPE[0] * SHAPE[1] * SHAPE[2]
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn((32, size + 1), generator=generator) * 0.1)
        self.second = nn.Parameter(torch.randn((size, 32), generator=generator) * 0.1)
        self.rows = nn.Parameter(torch.zeros(13, 32))
        self.broken_from = 1 << 60  # calls from here on give NaN
        self.calls = 0

    def describe(self):
        return {"model": "toy"}

    def params(self):
        return dict(self.named_parameters())

    def velocity(self, x, sigma, cond):
        self.calls += 1
        rows = torch.tensor([12 if key is None else key for key in cond])
        hidden = torch.tanh(torch.cat((x.flatten(1), sigma[:, None]), dim=1) @ self.first.T + self.rows[rows])
        out = (hidden @ self.second.T).view(x.shape)
        return out * float("nan") if self.calls > self.broken_from else out


def config(**changed) -> TrainConfig:
    return TrainConfig(**{"steps": 40, "batch": 4, "save_every": 7, "validate_every": 0, "optim": Optim(lr=1e-2, warmup=5), **changed})


def train(folder: Path | None = None, model: Toy | None = None, **changed) -> Trainer:
    trainer = Trainer(model or Toy(), Table(), config(**changed), RunFolder(folder) if folder else None)
    trainer.run()
    return trainer


if __name__ == "__main__":  # the process that a test kills: toy.py FOLDER, one line a step
    torch.set_num_threads(1)
    made = Trainer(Toy(), Table(), config(save_every=3), RunFolder(Path(sys.argv[1])))
    made.callbacks.progress = lambda done, steps, history: print(done, flush=True)
    made.run()
