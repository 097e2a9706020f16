"""The velocity error on fixed examples, by sigma: the loss of single steps is noise, this is not."""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import Draws, seeded

__all__ = ["BINS", "Validation"]

BINS = 8  # bin k is measured at sigma = (k + ½)/8
EXAMPLES = 16


class Validation:
    """Fixed rows, noises and sigmas of `data`, the same in every call and in every run of one seed."""

    def __init__(self, data, seed: int, examples: int = EXAMPLES, bins: int = BINS):
        self.data, self.seed, self.count, self.bin_count = data, seed, examples, bins

    @torch.no_grad()
    def bins(self, trainee) -> tuple[float, ...]:
        """Mean squared velocity error at the middle of each sigma bin, from data to noise."""
        draws = Draws(self.seed, -1)  # no step is numbered so
        rows = self._rows()
        batch = self.data.batch(rows, draws)
        noise = draws.normal("noise", tuple(batch.clean.shape))
        errors = []
        for number in range(self.bin_count):
            sigma = (number + 0.5) / self.bin_count
            x = (1.0 - sigma) * batch.clean + sigma * noise
            velocity = trainee.velocity(x, torch.full((len(rows),), sigma), batch.cond).cpu()
            errors.append(float((velocity - (noise - batch.clean)).square().mean()))
        return tuple(errors)

    def _rows(self) -> Tensor:
        """Rows of the largest bucket, spread by the seed."""
        rows = torch.tensor(max(self.data.buckets(), key=len))
        return rows[torch.randperm(len(rows), generator=seeded(self.seed, "validation"))[: self.count]]
