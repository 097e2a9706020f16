"""First-block gate: where the first block adds what it added at the last computed step, the others are taken to do so too.

The rule known as First Block Cache (ParaAttention, 2024; diffusers' FirstBlockCacheConfig). With r = block 0(h) − h over image tokens and
r' that of the last computed step:

    mean|r − r'| / mean|r'| < threshold    →    the streams leave the stack as block 0's output + what blocks 1 … L−1 added at that step

What we do differently: an image's own ratio, and the worst image decides; at the threshold itself the step is computed; with `order` above
0 what the blocks added is forecast in place of repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...families.arch import ArchSpec
from ...families.blocks import BlockKey
from .gate import GateState, relative_l1
from .policy import Policy, Probe, RunFacts

__all__ = ["FirstBlockGate"]


@dataclass(frozen=True)
class FirstBlockGate(Policy):
    """threshold: 0 computes every visit. For target block_delta."""

    threshold: float = 0.1
    reduce: str = "max_over_batch"

    @property
    def can_skip(self) -> bool:
        return self.threshold > 0

    @property
    def probe(self) -> Probe:
        return Probe("first_residual")

    def ranges(self, arch: ArchSpec) -> Mapping[str, tuple[BlockKey, ...]]:
        return {"": arch.blocks[1:]}

    def start(self, facts: RunFacts) -> GateState:
        return _State(self, self.threshold, self.reduce, adds=False)

    def line(self) -> str:
        return f"first-block gate below {self.threshold:g}" + f", order {self.order}" * bool(self.order)


class _State(GateState):
    def measure(self, fresh: torch.Tensor, forecast: torch.Tensor) -> torch.Tensor:
        return relative_l1(fresh, forecast, forecast)
