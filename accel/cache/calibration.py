"""Measuring a model for the gates: uncached runs that note the few numbers a threshold or a curve is chosen by.

ReuseCalibration notes, step by step and per condition, |r_i|/|r_{i−1}| of the stack's residual r (MagCache's ratio, a mean over tokens) and
the relative changes of the first block's modulated input and of r (TeaCache fits a polynomial from the one to the other). GateCalibration
notes confidence-gated Taylor's e and the error that the last block's forecast would have made at the same step, both one step ahead of
complete history, as a gate that never closes would see them. Nothing of a run but these numbers is left when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from ...errors import input_error
from ...families.arch import ArchSpec
from ...families.blocks import BlockKey
from .confidence import ConfidenceGatedTaylor
from .gate import TINY, reduced, relative_l1
from .policy import Action, Choice, Observation, Policy, Probe, RunFacts, RunState, Visit

__all__ = ["Calibration", "GateCalibration", "ReuseCalibration", "correlation", "fit_polynomial", "mean_ratios", "read_curve"]

MOST_NUMBERS, MOST_DEGREE = 2000, 8


@dataclass(frozen=True)
class Calibration(Policy):
    """Every visit is full; what is kept serves the measurement alone."""

    @property
    def forecasts(self) -> bool:
        return False

    def decide(self, visit: Visit) -> Choice:
        return Choice(Action.FULL, "calibration")


@dataclass(frozen=True)
class ReuseCalibration(Calibration):
    """For target block_delta over the whole stack."""

    @property
    def probe(self) -> Probe:
        return Probe("entry")

    def start(self, facts: RunFacts) -> RunState:
        return _ReuseState(self, facts.steps)

    def line(self) -> str:
        return "calibration of reuse curves"


class _ReuseState(RunState):
    observes = True

    def __init__(self, policy: Policy, steps: int):
        super().__init__(policy)
        self.ratios: list[list[float]] = [[] for _ in range(steps)]
        self.changes: list[tuple[float, float]] = []

    def observe(self, seen: Observation) -> None:
        before, probe_before = seen.last(""), seen.last("probe")
        step = int(seen.visit.u)
        if before is None or seen.visit.second or step >= len(self.ratios):
            return
        r, old = seen.features[""][0].float(), before[0]
        ratio = r.norm(dim=-1) / old.norm(dim=-1).clamp_min(TINY)  # (b, n)
        self.ratios[step].append(float(ratio.mean()))
        ins, outs = relative_l1(seen.probe, probe_before[0], probe_before[0]), relative_l1(r, old, old)
        self.changes += zip(ins.tolist(), outs.tolist())

    def findings(self) -> dict[str, Any]:
        """ratios: a step, 1 where none was measured; changes: pairs of input and output change."""
        return {"ratios": [fmean(found) if found else 1.0 for found in self.ratios], "changes": self.changes}


@dataclass(frozen=True)
class GateCalibration(Calibration):
    """For target last_block. gated: the policy whose threshold is sought; thresholds: tried on what was noted."""

    gated: ConfidenceGatedTaylor = ConfidenceGatedTaylor()
    thresholds: tuple[float, ...] = ()
    warmup: int = 4

    @property
    def probe(self) -> Probe:
        return self.gated.probe

    def check(self, where: str) -> None:
        self.gated.check(where)
        if not self.thresholds or min(self.thresholds) < 0:
            raise input_error(where, "thresholds", self.thresholds, "numbers from 0 on", "Write numbers such as 0.02, 0.05, 0.1.")

    def ranges(self, arch: ArchSpec) -> Mapping[str, tuple[BlockKey, ...]]:
        return self.gated.ranges(arch)

    def start(self, facts: RunFacts) -> RunState:
        return _GateState(self)

    def line(self) -> str:
        return f"calibration of the gate ({self.gated.gate}), orders {self.gated.first_order} and {self.order}"


class _GateState(RunState):
    policy: GateCalibration
    observes = True

    def __init__(self, policy: GateCalibration):
        super().__init__(policy)
        self.pairs: list[tuple[float, float]] = []

    def observe(self, seen: Observation) -> None:
        if not seen.lead or seen.visit.u < self.policy.warmup:
            return
        forecast, probe_forecast = seen.forecast(""), seen.forecast("probe")
        if forecast is not None and probe_forecast is not None:
            e = relative_l1(probe_forecast[0], seen.probe, seen.probe)
            real = relative_l1(forecast[0], seen.features[""][0], seen.features[""][0])
            self.pairs.append(tuple(reduced(values.tolist(), self.policy.gated.reduce) for values in (e, real)))

    def findings(self) -> dict[str, Any]:
        """errors: e a step; real: of the last block; accepted: steps with e below each threshold; correlation: of the two."""
        errors, real = [e for e, _ in self.pairs], [r for _, r in self.pairs]
        accepted = {f"{threshold:g}": sum(e < threshold for e in errors) for threshold in self.policy.thresholds}
        return {"errors": errors, "real": real, "accepted": accepted, "correlation": correlation(errors, real)}


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's, 0 where one of them does not vary."""
    if len(a) < 2:
        return 0.0
    left, right = ([value - fmean(values) for value in values] for values in (a, b))
    size = sum(x * x for x in left) ** 0.5 * sum(y * y for y in right) ** 0.5
    return sum(x * y for x, y in zip(left, right)) / size if size > TINY else 0.0


def fit_polynomial(pairs: Sequence[tuple[float, float]], degree: int, where: str) -> tuple[float, ...]:
    """Least squares of the second over the first, coefficients highest power first.

    Raises: NodeInputError for fewer pairs than coefficients.
    """
    if not 1 <= degree <= MOST_DEGREE:
        raise input_error(where, "degree", degree, f"1 to {MOST_DEGREE}", "4 is what the paper uses.")
    if len(pairs) <= degree:
        remedy = "Sample more steps or prompts through Reuse Calibrate."
        raise input_error(where, "report", f"{len(pairs)} measured changes", f"more than {degree}", remedy)
    x, y = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    scale = x.max().clamp_min(TINY)  # powers of numbers near 0.01 would not be told apart
    table = torch.stack([(x / scale) ** power for power in range(degree, -1, -1)], dim=1)
    found = torch.linalg.lstsq(table, y[:, None], driver="gelsd").solution[:, 0]
    return tuple(float(value / scale**power) for value, power in zip(found, range(degree, -1, -1)))


def mean_ratios(runs: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean a step of the runs that have the newest one's length."""
    alike = [run for run in runs if len(run) == len(runs[-1])]
    return tuple(fmean(column) for column in zip(*alike))


def read_curve(text: str, where: str, name: str = "curve") -> tuple[float, ...]:
    """Numbers separated by commas or spaces; an empty text is none.

    Raises: NodeInputError for anything else, and for more than a schedule could have.
    """
    words = text.replace(",", " ").split()
    try:
        numbers = tuple(float(word) for word in words)
    except ValueError:
        raise input_error(where, name, text, "numbers separated by commas", "Link the text of Reuse Curve, or write numbers.") from None
    if len(numbers) > MOST_NUMBERS or not all(-1e9 < number < 1e9 for number in numbers):
        raise input_error(where, name, f"{len(numbers)} numbers", f"at most {MOST_NUMBERS} finite ones", "Shorten the list.")
    return numbers
