"""Hidden states as a target: the student's blocks are pulled towards the teacher's at the same point of the flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FeatureLoss"]


@dataclass(frozen=True)
class FeatureLoss:
    """Σ over blocks of mean (f_student − f_teacher)² / mean f_teacher², so that wide and narrow layers count alike.

    teacher: a frozen trainee whose `features` fill when it is called. pairs: (student's block, teacher's block), which differ where
    blocks were removed. weight, start, stop, every: when and how much it counts.
    """

    teacher: object
    pairs: tuple[tuple[tuple[str, int], tuple[str, int]], ...]
    weight: float = 1.0
    start: int = 0
    stop: int = 1 << 60
    every: int = 1
    name: str = "features"

    def loss(self, context) -> Tensor:
        """context: loop.StepContext of the student, whose `features` its forward has filled."""
        with torch.no_grad():
            self.teacher.velocity(context.point.x, context.point.sigma, context.cond)
        total = context.prediction.new_zeros(())
        for own, other in self.pairs:
            wanted = self.teacher.features[other].detach().float()
            given = context.trainee.features[own].float()
            total = total + (given - wanted).square().mean() / wanted.square().mean().clamp(min=1e-8)
        return total / len(self.pairs)
