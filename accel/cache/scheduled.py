"""A cache that computes the steps of a schedule and no others; between them it repeats or forecasts, as the schedule was made for.

"DDT: Decoupled Diffusion Transformer", arXiv 2504.05741, shares the encoder's output over steps that a search has chosen. What we do
differently: any target of the engine is shared so, and a forecast may stand in the place of repetition.
"""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Action, Choice, Policy, Visit
from .schedule import CacheSchedule

__all__ = ["ScheduledCache"]


@dataclass(frozen=True)
class ScheduledCache(Policy):
    """Skips what the plan's schedule leaves it; order, basis and axis are those of `schedule` unless others are given.

    The same schedule stands in CachePlan.schedule, which the engine asks first.
    """

    schedule: CacheSchedule = CacheSchedule((1.0, 0.0), (0,))

    @classmethod
    def of(cls, schedule: CacheSchedule, order: int = -1) -> ScheduledCache:
        """The policy that replays `schedule`. order: -1 for the schedule's own."""
        return cls(schedule.order if order < 0 else order, schedule.basis, schedule.axis, schedule)

    @property
    def can_skip(self) -> bool:
        return len(self.schedule.computed) < self.schedule.steps

    def decide(self, visit: Visit) -> Choice:
        return Choice(Action.SKIP, "forecast")

    def line(self) -> str:
        how = f"forecast of order {self.order}" if self.order else "reuse"
        return f"schedule {self.schedule.line()}, {how}"
