"""Hidden states as a target: the student's blocks are pulled towards the teacher's at the same point of the flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FeatureLoss", "masked_distance"]

ENOUGH = 8192
NORMAL = 1.4826  # standard deviation over median distance of normal numbers


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


def masked_distance(given: Tensor, wanted: Tensor, width: float) -> Tensor:
    """Mean of (given − wanted)² where both lie within `width` deviations of their sample's middle, over mean wanted² there.

    TinyFusion (arXiv 2412.01199) leaves out the few very large activations of a transformer, which would be all of the loss. It masks
    either side alone; here a place counts where both are inside, so that none is pulled towards a zero. Its middle and deviation are mean
    and standard deviation, which one huge number moves; ours are the median and 1.4826 times the median distance from it, equal to
    those for normal numbers. width 0: every place counts. given, wanted: (b, n, d).
    """
    given, wanted = given.float(), wanted.float()
    if width <= 0.0:
        return (given - wanted).square().mean() / wanted.square().mean().clamp(min=1e-8)
    mask = (_inside(given.detach(), width) & _inside(wanted, width)).float()
    return ((given - wanted).square() * mask).sum() / (wanted.square() * mask).sum().clamp(min=1e-8)


def _inside(features: Tensor, width: float) -> Tensor:
    few = features.flatten(1)
    few = few[:, :: max(1, few.shape[1] // ENOUGH)]  # medians of some thousand numbers are as good as those of millions
    middle = few.median(dim=1, keepdim=True).values
    deviation = NORMAL * (few - middle).abs().median(dim=1, keepdim=True).values
    return (features - middle[..., None]).abs() < width * deviation[..., None]
