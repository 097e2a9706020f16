"""What gates have in common: numbers an image from two tensors, one number from those, and a sum since the last computed visit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .policy import Action, Choice, Policy, RunState, Visit

__all__ = ["GateState", "REDUCES", "mean_size", "reduced", "relative_l1"]

REDUCES = ("max_over_batch", "mean")
TINY = 1e-12  # two tensors of zeros are equal, not incomparable


def mean_size(tensor: torch.Tensor) -> torch.Tensor:
    """mean|tensor| of each image: (b, …) → (b,), in float32."""
    return tensor.float().abs().flatten(1).mean(1)


def relative_l1(new: torch.Tensor, old: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """mean|new − old| / mean|base| of each image: (b, …) → (b,)."""
    return mean_size(new.float() - old.float()) / mean_size(base).clamp_min(TINY)


def reduced(values: Sequence[float], how: str) -> float:
    """One number for a batch; a mean would hide the one image that has changed."""
    return max(values) if how == "max_over_batch" else sum(values) / len(values)


class GateState(RunState):
    """Skips while a number stays below the threshold: the visit's own, or (`adds`) the sum of those since the last computed visit."""

    def __init__(self, policy: Policy, threshold: float, how: str, adds: bool):
        super().__init__(policy)
        self.threshold, self.how, self.adds = threshold, how, adds
        self.sums: list[float] = []

    def decide(self, visit: Visit) -> Choice:
        return Choice(Action.PROBE, "gate")

    def gate(self, visit: Visit, values: Sequence[float]) -> Choice:
        if self.adds:
            before = self.sums if len(self.sums) == len(values) else [0.0] * len(values)
            values = [total + value for total, value in zip(before, values)]
        statistic = reduced(values, self.how)
        if not statistic < self.threshold:  # also where it is not a number
            return Choice(Action.FULL, "changed", statistic=statistic)
        self.sums = list(values)
        return Choice(Action.SKIP, "little change", statistic=statistic)

    def settle(self, visit: Visit, choice: Choice) -> None:
        if not choice.skip:
            self.sums = []
