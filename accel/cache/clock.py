"""Where on its schedule a run stands: sigma → u, the fractional step index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Moment", "StepClock"]

# float32 schedules near 1 are resolved to 6e-8; solvers that add and subtract a step come back within a few of those.
SAME_SIGMA = 1e-6


class Moment(NamedTuple):
    """u: 0 at the first sigma, 1 at the second …; foreign: the sigma is outside the schedule, and u is its nearest end."""

    u: float
    foreign: bool


class StepClock:
    """Reads u off a schedule, falling (sampling) or rising (inversion); it counts nothing, so any order of calls gives the same.

    Args:
        sigmas: the run's schedule, one more value than steps.
    """

    def __init__(self, sigmas: Sequence[float]):
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        self.steps = max(len(self.sigmas) - 1, 0)

    def at(self, sigma: float) -> Moment:
        """On a sigma of the schedule its index (the first of equal ones), between two the fraction of the interval passed."""
        near = min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - sigma), default=None)
        if near is None:
            return Moment(0.0, True)
        if abs(self.sigmas[near] - sigma) <= SAME_SIGMA * max(1.0, abs(sigma)):
            return Moment(float(near), False)
        for i, (start, end) in enumerate(zip(self.sigmas, self.sigmas[1:])):
            if min(start, end) < sigma < max(start, end):
                return Moment(i + (start - sigma) / (start - end), False)
        return Moment(float(near), True)
