"""The velocity error on fixed examples, by sigma, and how straight the flow runs: the loss of single steps is noise, these are not."""

from __future__ import annotations

import torch
from torch import Tensor

from ..samplers.straightness import PathRecord, sample_recorded, straightness
from .draws import Draws, seeded
from .targets import AT_NOISE, NEEDS_PAIRS, Target, teacher_velocity

__all__ = ["BINS", "Validation"]

BINS = 8  # bin k is measured at sigma = (k + ½)/8
EXAMPLES = 16
PATHS, PATH_STEPS = 8, 6  # rows and steps of the paths that straightness is measured on: 13 calls


class Validation:
    """Fixed rows, noises and sigmas of `data`, the same in every call and in every run of one seed.

    What is compared with is the target's: noise − x0 at noise that belongs to no example, or of a pair (without the noise that annealing
    adds), or what `teacher` answers. One-step targets stand at sigma 1 alone.

    Args:
        target, teacher: of the run. chunk: rows a model call has at most.
    """

    def __init__(self, data, seed: int, target: Target, teacher=None, chunk: int = EXAMPLES):
        self.data, self.seed, self.target, self.teacher, self.chunk = data, seed, target, teacher, chunk
        self.sigmas = (1.0,) if target.kind in AT_NOISE else tuple((number + 0.5) / BINS for number in range(BINS))

    @torch.no_grad()
    def bins(self, trainee) -> tuple[float, ...]:
        """Mean squared velocity error at each of `sigmas`."""
        clean, noise, cond = self._examples(EXAMPLES)
        errors = []
        for sigma in self.sigmas:
            squares = []
            for start in range(0, len(clean), self.chunk):
                rows = slice(start, start + self.chunk)
                at = torch.full((len(cond[rows]),), sigma)
                x = (1.0 - sigma) * clean[rows] + sigma * noise[rows]
                wanted = noise[rows] - clean[rows]
                if self.target.kind == "teacher_velocity":
                    wanted = teacher_velocity(self.teacher, self.target, x, at, cond[rows]).cpu()
                squares.append((trainee.velocity(x, at, cond[rows]).cpu() - wanted).square().flatten())
            errors.append(float(torch.cat(squares).mean()))
        return tuple(errors)

    @torch.no_grad()
    def straightness(self, trainee) -> tuple[float, float]:
        """S of the trainee's own paths from fixed noises, and S over the squared length of these paths."""
        _, noise, cond = self._examples(PATHS)
        record = PathRecord()

        def denoised(x: Tensor, sigma: Tensor, **_) -> Tensor:
            parts = []
            for start in range(0, len(x), self.chunk):
                rows = slice(start, start + self.chunk)
                parts.append(trainee.velocity(x[rows], sigma[rows], cond[rows]).cpu())
            return x - sigma.view(-1, *[1] * (x.ndim - 1)) * torch.cat(parts)

        sample_recorded(denoised, noise, torch.linspace(1.0, 0.0, PATH_STEPS + 1), disable=True, record=record)
        found = straightness(record)
        return found.value, found.relative

    def _examples(self, count: int) -> tuple[Tensor, Tensor, list]:
        """Clean latents, noises and conditions of rows of the largest bucket, spread by the seed."""
        draws = Draws(self.seed, -1)  # no step is numbered so
        rows = torch.tensor(max(self.data.buckets(), key=len))
        rows = rows[torch.randperm(len(rows), generator=seeded(self.seed, "validation"))[:count]]
        batch = self.data.batch(rows, draws)
        paired = batch.noise if self.target.kind in NEEDS_PAIRS else None
        return batch.clean, draws.normal("noise", tuple(batch.clean.shape)) if paired is None else paired, batch.cond
