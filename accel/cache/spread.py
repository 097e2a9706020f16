"""A schedule without sigmas: where in a run computed steps are dense, told as shares of the run, for runs of any length and any number of
computed steps.

With c_0 = 0 < c_1 < … < c_{k−1} the shares of a searched schedule, g the line through (j, c_j) and (k, 1), a run of T steps at speed v
computes B = round(T/v) steps, at

    T·g(j·k/B),  j = 0 … B − 1,  rounded, each at least one after the one before

which is the searched schedule itself at its own T and B = k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .policy import Action, Choice, Policy, RunFacts, Visit
from .schedule import nearest_reach
from .search import even_steps

__all__ = ["SpreadCache", "SpreadSchedule", "budget_of", "spread"]


def budget_of(speed: float, steps: int) -> int:
    """Steps of `steps` to compute so that `speed` times fewer are; at least one, halves upwards."""
    return max(1, min(steps, int(steps / speed + 0.5)))


def spread(shares: Sequence[float], steps: int, budget: int) -> tuple[int, ...]:
    """`budget` rising step numbers of a run of `steps`, as dense as `shares` are, the first of them 0.

    Args:
        shares: rising, in [0, 1), the first 0.
    """
    corners = (*shares, 1.0)
    found: list[int] = []
    for j in range(budget):
        place, rest = divmod(j * len(shares) / budget, 1.0)
        low, high = corners[int(place)], corners[int(place) + 1]
        near = int(steps * (low + rest * (high - low)) + 0.5)
        found.append(max(near, found[-1] + 1) if found else 0)
    return tuple(min(step, steps - (budget - j)) for j, step in enumerate(found))


@dataclass(frozen=True)
class SpreadSchedule:
    """The schedule of a CachePlan. made_for: steps of the run that was searched. reach: of each of them, see CacheSchedule; or empty."""

    shares: tuple[float, ...]
    speed: float
    made_for: int
    reach: tuple[float, ...] = ()

    def steps_for(self, facts: RunFacts) -> frozenset[int]:
        if not facts.steps:
            return frozenset()
        budget = budget_of(self.speed, facts.steps)
        if facts.sigmas[0] < facts.sigmas[-1]:
            return frozenset(even_steps(facts.steps, budget))
        return frozenset(spread(self.shares, facts.steps, budget))

    def reach_for(self, facts: RunFacts) -> tuple[float, ...]:
        """Of every step of a run, that of the nearest forecast step at the same share of the searched run; rising sigmas have none."""
        if not self.reach or facts.sigmas[0] < facts.sigmas[-1]:
            return ()
        computed = {round(share * self.made_for) for share in self.shares}
        own = [(step / self.made_for, reach) for step, reach in enumerate(self.reach) if step not in computed]
        return nearest_reach(own, (step / facts.steps for step in range(facts.steps)))

    def note(self, facts: RunFacts) -> str:
        if facts.steps and facts.sigmas[0] < facts.sigmas[-1]:
            return "sigmas rise: the schedule was searched on falling ones, so even steps are computed"
        if facts.steps == self.made_for:
            return ""
        return f"searched on {self.made_for} steps; as dense in the same parts of this run's {facts.steps}"


@dataclass(frozen=True)
class SpreadCache(Policy):
    """Skips what the SpreadSchedule of the plan leaves it. speed: 1 computes every step."""

    speed: float = 1.0

    @property
    def can_skip(self) -> bool:
        return self.speed > 1.0

    def decide(self, visit: Visit) -> Choice:
        return Choice(Action.SKIP, "forecast")

    def line(self) -> str:
        return f"one step in {self.speed:g}, where a search put them, " + (f"forecast of order {self.order}" if self.order else "reuse")
