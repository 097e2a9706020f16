"""Confidence-gated Taylor: the forecast of the last block is trusted where the forecast of the first block has just proved right.

"Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor", arXiv 2508.02240. Two ladders (forecast.py), A
of the first block's output h and B of the last block's, over the computed steps. At a step s:

    ĥ = A(s),  h is computed,  e = mean|ĥ − h| / mean|h|
    e < threshold    the last block's tokens are B(s), the blocks between do not run, and neither ladder moves
    otherwise        all blocks run, A and B take the new values

A does not move on a skip, so its distance grows and with it e, until the gate closes by itself. What we do differently: warm-up steps
always feed A (the released FLUX code leaves it empty and so computes one step more); e is an image's own and the worst image decides, in
place of one mean over the batch; the conditions of a step share the decision of the one that the host hands over first; `residual`
compares what the first block adds in place of the tokens, whose common offset hides changes; `accumulated` compares the sum of e since the
last computed step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...errors import input_error
from ...families.arch import ArchSpec
from ...families.blocks import BlockKey
from .gate import REDUCES, GateState, relative_l1
from .policy import Policy, Probe, RunFacts

__all__ = ["ConfidenceGatedTaylor", "ERROR_MODES", "GATES"]

GATES = {"hidden": "first_block", "residual": "first_residual"}
ERROR_MODES = ("instant", "accumulated")


@dataclass(frozen=True)
class ConfidenceGatedTaylor(Policy):
    """threshold: of e, 0 computes every visit. order: of B, first_order: of A. stride: e is taken over every so many tokens."""

    order: int = 1
    threshold: float = 0.08
    first_order: int = 1
    gate: str = "hidden"
    reduce: str = "max_over_batch"
    error_mode: str = "instant"
    stride: int = 1

    @property
    def can_skip(self) -> bool:
        return self.threshold > 0

    @property
    def probe(self) -> Probe:
        return Probe(GATES[self.gate], self.first_order, stride=self.stride)

    def check(self, where: str) -> None:
        for name, value, allowed in (("gate", self.gate, tuple(GATES)), ("gate_reduce", self.reduce, REDUCES),
                                     ("err_mode", self.error_mode, ERROR_MODES)):  # fmt: skip
            if value not in allowed:
                raise input_error(where, name, value, ", ".join(allowed), "Choose one of these.")
        if self.threshold < 0 or self.stride < 1:
            name, value = ("threshold", self.threshold) if self.threshold < 0 else ("subsample", self.stride)
            raise input_error(where, name, value, "threshold 0 or more, subsample 1 or more", "Enter a larger number.")

    def ranges(self, arch: ArchSpec) -> Mapping[str, tuple[BlockKey, ...]]:
        return {"": arch.blocks[1:]}

    def start(self, facts: RunFacts) -> GateState:
        return _State(self, self.threshold, self.reduce, self.error_mode == "accumulated")

    def line(self) -> str:
        orders = f"orders {self.first_order} and {self.order}"
        return f"confidence-gated Taylor below {self.threshold:g} ({self.gate}, {self.error_mode}), {orders}"


class _State(GateState):
    def measure(self, fresh: torch.Tensor, forecast: torch.Tensor) -> torch.Tensor:
        return relative_l1(forecast, fresh, fresh)
