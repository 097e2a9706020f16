"""Magnitude rule: how the length of the stack's residual goes from step to step is alike for all prompts, so it is measured once.

"MagCache: Fast Video Generation with Magnitude-Aware Cache", arXiv 2506.09045. With γ_i = mean over tokens of |r_i| / |r_{i−1}|, r the
stack's residual, from one calibration (calibration.py):

    acc ·= γ_i,  err += |1 − acc|;   skip while err ≤ threshold, else compute and set acc = 1, err = 0

and no more than so many in a row (Limits.max_consecutive). A skip adds what the stack added at the last computed step. What we do
differently: steps the range forbids reset the sums, as computed ones do; a run of another length takes the ratio at the same share of its
steps, as the authors do, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import input_error
from .policy import Action, Choice, Policy, RunFacts, RunState, Visit

__all__ = ["MagnitudeRule"]


@dataclass(frozen=True)
class MagnitudeRule(Policy):
    """threshold: of err, 0 computes every visit. ratios: γ a step, the first is of no use. For target block_delta over the whole stack."""

    threshold: float = 0.1
    ratios: tuple[float, ...] = ()

    @property
    def can_skip(self) -> bool:
        return self.threshold > 0

    def check(self, where: str) -> None:
        if not self.ratios or min(self.ratios) <= 0:
            got = "none" if not self.ratios else f"{min(self.ratios):g} among them"
            remedy = "Sample once through Reuse Calibrate and link the ratios of Reuse Curve."
            raise input_error(where, "curve", got, "positive ratios, one a step", remedy)

    def start(self, facts: RunFacts) -> RunState:
        return _State(self)

    def line(self) -> str:
        return f"magnitude rule up to {self.threshold:g}, {len(self.ratios)} ratios" + f", order {self.order}" * bool(self.order)

    def ratio(self, visit: Visit) -> float:
        last = len(self.ratios) - 1
        return self.ratios[min(round(visit.u * last / max(visit.steps - 1, 1)), last)]


class _State(RunState):
    policy: MagnitudeRule

    def __init__(self, policy: MagnitudeRule):
        super().__init__(policy)
        self.product, self.error = 1.0, 0.0

    def decide(self, visit: Visit) -> Choice:
        error = self._next(visit)[1]
        skips = error <= self.policy.threshold
        return Choice(Action.SKIP if skips else Action.FULL, "like magnitude" if skips else "other magnitude", statistic=error)

    def settle(self, visit: Visit, choice: Choice) -> None:
        self.product, self.error = self._next(visit) if choice.skip else (1.0, 0.0)

    def _next(self, visit: Visit) -> tuple[float, float]:
        product = self.product * self.policy.ratio(visit)
        return product, self.error + abs(1.0 - product)
