"""Modulated-input gate: a polynomial of how much the first block's input changed, summed over steps, says how much the output has changed.

"Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (TeaCache), arXiv 2411.19108. With m the first block's normalised,
shifted and scaled image tokens and m' those of the step before, computed or not:

    sum += P( mean|m − m'| / mean|m'| ),   skip while sum < threshold, else compute and set sum = 0

A skip adds what the whole stack added at the last computed step. P maps input change to output change and is fitted once a model
(calibration.py). What we do differently: sums are an image's own, and the worst image decides; P is the identity where none is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .gate import GateState, relative_l1
from .policy import Choice, Policy, Probe, RunFacts, Visit

__all__ = ["ModulatedInputGate", "polynomial"]


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Highest power first (Horner); no coefficients are the identity."""
    if not coefficients:
        return x
    total = 0.0
    for coefficient in coefficients:
        total = total * x + coefficient
    return total


@dataclass(frozen=True)
class ModulatedInputGate(Policy):
    """threshold: 0 computes every visit. coefficients: of P, highest power first. For target block_delta over the whole stack."""

    threshold: float = 0.1
    coefficients: tuple[float, ...] = ()
    reduce: str = "max_over_batch"

    @property
    def can_skip(self) -> bool:
        return self.threshold > 0

    @property
    def probe(self) -> Probe:
        return Probe("entry", every=True)

    def start(self, facts: RunFacts) -> GateState:
        return _State(self, self.threshold, self.reduce, adds=True)

    def line(self) -> str:
        fit = f"polynomial of degree {len(self.coefficients) - 1}" if self.coefficients else "no polynomial"
        return f"modulated-input gate below {self.threshold:g}, {fit}" + f", order {self.order}" * bool(self.order)


class _State(GateState):
    policy: ModulatedInputGate

    def measure(self, fresh: torch.Tensor, forecast: torch.Tensor) -> torch.Tensor:
        return relative_l1(fresh, forecast, forecast)

    def gate(self, visit: Visit, values: Sequence[float]) -> Choice:
        return super().gate(visit, [polynomial(self.policy.coefficients, value) for value in values])
