"""Randomness without state: every draw comes from a generator seeded by a hash of (seed, step, stream).

Nothing of a generator has to be saved: a resumed run draws what the uninterrupted one would have drawn, and validation or a
preview between two steps moves no number of the next one. A step draws for all of its pictures at once and its micro-batches
take slices, so that 4 micro-batches of 1 see what one batch of 4 sees.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Draws", "Order", "seeded"]


def seeded(*names: object) -> torch.Generator:
    """A CPU generator that depends on the printed names alone."""
    digest = hashlib.blake2b("|".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step."""

    seed: int
    step: int

    def generator(self, stream: str) -> torch.Generator:
        return seeded(self.seed, self.step, stream)

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator(stream))

    def uniform(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator(stream))


class Order:
    """Which examples a step sees: every example once an epoch, and one step's examples all from one bucket (one latent size).

    Args:
        buckets: rows of the data set, one list a bucket. seed: of the run. count: examples a step.
    """

    def __init__(self, buckets: list[list[int]], seed: int, count: int):
        self.buckets = [torch.tensor(rows) for rows in buckets if rows]
        self.seed, self.count = seed, count
        self._epoch, self._groups = -1, torch.zeros((0, count), dtype=torch.long)

    def rows(self, step: int) -> Tensor:
        """Rows (count,) of step `step`. Where a bucket holds fewer than `count`, its examples repeat."""
        if len(self.buckets) == 1:
            return self._one_bucket(step)
        groups = sum(-(-len(rows) // self.count) for rows in self.buckets)
        epoch, place = divmod(step, groups)
        if epoch != self._epoch:
            self._epoch, self._groups = epoch, self._group(epoch)
        return self._groups[place]

    def _one_bucket(self, step: int) -> Tensor:
        rows = self.buckets[0]
        places = torch.arange(step * self.count, (step + 1) * self.count)
        epochs = places // len(rows)
        chosen = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            order = torch.randperm(len(rows), generator=seeded(self.seed, epoch, "order"))
            chosen[epochs == epoch] = rows[order[places[epochs == epoch] % len(rows)]]
        return chosen

    def _group(self, epoch: int) -> Tensor:
        groups = []
        for number, rows in enumerate(self.buckets):
            shuffled = rows[torch.randperm(len(rows), generator=seeded(self.seed, epoch, "order", number))]
            whole = -(-len(rows) // self.count) * self.count
            groups.append(shuffled.repeat(-(-whole // len(rows)))[:whole].view(-1, self.count))
        groups = torch.cat(groups)
        return groups[torch.randperm(len(groups), generator=seeded(self.seed, epoch, "groups"))]
