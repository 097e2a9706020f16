"""Model inputs that belong to one condition, and how several of them are joined into one batch."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from .utils import repeat_to_batch_size

__all__ = ["CONDRegular", "CONDNoiseShape", "CONDCrossAttn", "CONDConstant", "CONDList"]


class CONDRegular:
    """A tensor (b, …) that is repeated to the latent's batch and joined along it."""

    def __init__(self, cond: Any):
        self.cond = cond

    def _copy_with(self, cond: Any) -> CONDRegular:
        return self.__class__(cond)

    def process_cond(self, batch_size: int, **kwargs) -> CONDRegular:
        """The input for `batch_size` latents; `area` (sizes then offsets per dimension) comes as a keyword."""
        return self._copy_with(repeat_to_batch_size(self.cond, batch_size))

    def can_concat(self, other: CONDRegular) -> bool:
        return self.cond.shape == other.cond.shape and self._same_device(other)

    def _same_device(self, other: CONDRegular) -> bool:
        if self.cond.device != other.cond.device:
            logging.warning("conditions lie on %s and %s and are run one after the other", self.cond.device, other.cond.device)
            return False
        return True

    def concat(self, others: list[CONDRegular]) -> Any:
        return torch.cat([self.cond] + [other.cond for other in others])

    def size(self) -> list[int]:
        return list(self.cond.size())


class CONDNoiseShape(CONDRegular):
    """A tensor shaped like the latent: an area condition sees its own part of it."""

    def process_cond(self, batch_size: int, area: list[int] | None = None, **kwargs) -> CONDNoiseShape:
        data = self.cond
        if area is not None:
            dims = len(area) // 2
            for axis in range(dims):
                data = data.narrow(axis + 2, area[dims + axis], area[axis])
        return self._copy_with(repeat_to_batch_size(data, batch_size))


class CONDCrossAttn(CONDRegular):
    """Text states (b, n, d) that enter only as keys and values: repeating all tokens equally leaves attention unchanged,
    so two lengths are joined at their least common multiple."""

    MAX_REPEAT = 4  # a longer common length costs more than a second model call

    def can_concat(self, other: CONDRegular) -> bool:
        mine, theirs = self.cond.shape, other.cond.shape
        if mine != theirs:
            if mine[0] != theirs[0] or mine[2] != theirs[2]:
                return False
            if math.lcm(mine[1], theirs[1]) // min(mine[1], theirs[1]) > self.MAX_REPEAT:
                return False
        return self._same_device(other)

    def concat(self, others: list[CONDRegular]) -> torch.Tensor:
        states = [self.cond] + [other.cond for other in others]
        length = math.lcm(*(state.shape[1] for state in states))
        return torch.cat([state.repeat(1, length // state.shape[1], 1) for state in states])  # (sum b, length, d)


class CONDConstant(CONDRegular):
    """Any value that holds for the whole call; conditions are joined only where it is equal."""

    def process_cond(self, batch_size: int, **kwargs) -> CONDConstant:
        return self._copy_with(self.cond)

    def can_concat(self, other: CONDRegular) -> bool:
        return bool(self.cond == other.cond)

    def concat(self, others: list[CONDRegular]) -> Any:
        return self.cond

    def size(self) -> list[int]:
        return [1]


class CONDList(CONDRegular):
    """A list of tensors, such as reference latents, joined place by place."""

    def process_cond(self, batch_size: int, **kwargs) -> CONDList:
        return self._copy_with([repeat_to_batch_size(entry, batch_size) for entry in self.cond])

    def can_concat(self, other: CONDRegular) -> bool:
        return [entry.shape for entry in self.cond] == [entry.shape for entry in other.cond]

    def concat(self, others: list[CONDRegular]) -> list[torch.Tensor]:
        return [torch.cat([entry] + [other.cond[place] for other in others]) for place, entry in enumerate(self.cond)]

    def size(self) -> list[int]:
        """One shape with as many elements as the list has, which is what the memory estimate asks for."""
        elements = sum(math.prod(entry.size()) for entry in self.cond)
        channels = self.cond[-1].size()[1] if self.cond and self.cond[-1].ndim > 1 else 1
        return [1, channels, elements // channels]
