"""What a caching policy is: when part of the network is left out, and how its value is forecast.

A policy is a frozen dataclass. `decide` is pure: all it knows of the run is in the Visit it is given. The limits that hold for every policy
are checked before it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ...errors import input_error

__all__ = ["Choice", "Limits", "Policy", "Visit"]


class Choice(NamedTuple):
    """skip: the target is forecast in this visit; reason: one or two words for the report."""

    skip: bool
    reason: str


@dataclass(frozen=True)
class Visit:
    """One evaluation of the guided model, whatever number of model calls its conditions take.

    index: visits before it in this run. u: fractional step of its sigma. steps: of the run. skipped: visits left out in a row before it.
    """

    index: int
    sigma: float
    u: float
    steps: int
    skipped: int
    foreign: bool = False


@dataclass(frozen=True)
class Policy:
    """Base of the policies; a subclass says when to skip.

    order: of the forecast, 0 to 4. basis: see forecast.py. axis: what the forecast is a polynomial in, "step" or "sigma".
    """

    order: int = 0
    basis: str = "newton"
    axis: str = "step"

    @property
    def can_skip(self) -> bool:
        """False where the settings leave nothing out: then nothing is kept and the calls stay untouched."""
        return True

    def decide(self, visit: Visit) -> Choice:
        raise NotImplementedError(f"{type(self).__name__} decides nothing")

    def line(self) -> str:
        """The settings in one line, for the report."""
        raise NotImplementedError(f"{type(self).__name__} has no name")


@dataclass(frozen=True)
class Limits:
    """Where no policy may skip: the first and last steps, and outside a range given in shares of this run's steps.

    warmup_steps, tail_steps: 0 or more. start, end: 0 to 1; the range is [start, end).
    """

    warmup_steps: int = 0
    tail_steps: int = 0
    start: float = 0.0
    end: float = 1.0

    def check(self, where: str) -> None:
        """Raises NodeInputError for a range that is empty or outside 0 to 1, and for negative steps."""
        for name, steps in (("warmup_steps", self.warmup_steps), ("tail_steps", self.tail_steps)):
            if steps < 0:
                raise input_error(where, name, steps, "0 or more steps", "Enter a count of steps.")
        if not 0.0 <= self.start <= self.end <= 1.0:
            got = f"{self.start:g} to {self.end:g}"
            remedy = "Set start_percent below end_percent."
            raise input_error(where, "start_percent", got, "0 ≤ start_percent ≤ end_percent ≤ 1", remedy)

    def forbids(self, visit: Visit) -> str:
        """Why this visit must be full, or an empty string."""
        if visit.foreign:
            return "sigma outside the schedule"
        if visit.sigma == 0.0:
            return "sigma 0"
        if visit.u < self.warmup_steps:
            return "warm-up"
        if visit.u > visit.steps - self.tail_steps - 1e-6:
            return "tail"
        share = visit.u / max(visit.steps, 1)
        return "" if self.start <= share < self.end else "outside the range"
