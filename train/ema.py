"""A running average of the trained weights: ema ← d·ema + (1 − d)·weight with d = min(decay, (1 + n)/(10 + n)) after n steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema:
    """Averages of `params`, kept in fp32; `decay` 0 keeps none and gives the weights themselves."""

    def __init__(self, params: Mapping[str, nn.Parameter], decay: float):
        self.params = dict(params)
        self.decay = decay
        self.average = {name: value.detach().float().clone() for name, value in params.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step number `step`, counted from 0."""
        if self.average:
            decay = min(self.decay, (1 + step) / (10 + step))
            weights = [self.params[name].float() for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), weights, 1.0 - decay)

    def weights(self) -> dict[str, Tensor]:
        """The averages, or the weights where none are kept."""
        return dict(self.average) if self.average else {name: value.detach() for name, value in self.params.items()}

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(average[name])
