"""Which blocks' work changes least from step to step: measured, for ranges of a stack, in one uncached run.

Δ-DiT (arXiv 2406.01125) holds what a range of blocks adds, D = h_c − h_a, between computed steps, and takes the rear blocks early and the
front blocks late, since on its models they change least there. Whether that holds for another model is a measurement: with D_t of step t,

    change_t = ‖D_t − D_{t−1}‖ / ‖D_t‖    over the image tokens of a picture, the mean of pictures and conditions

for front, middle and rear ranges of several sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...errors import input_error
from ...families.arch import ArchSpec
from ...families.blocks import BlockKey, block_text
from ...metrics.plot import Chart, Series, line_chart
from .calibration import Calibration
from .delta_dit import place_blocks
from .gate import TINY
from .policy import Observation, RunFacts, RunState

if TYPE_CHECKING:
    from torch import Tensor

    from .report import RunRecord

__all__ = ["RangeProbe", "change_chart", "probed"]

_PLACES = ("front", "middle", "rear")
_CHANGES = "changes"  # the finding of a run that the chart reads


@dataclass(frozen=True)
class RangeProbe(Calibration):
    """For target block_delta. sizes: shares of the stack, above 0 and at most 1; ranges that come out equal are measured once."""

    sizes: tuple[float, ...] = (0.25, 0.5, 0.75)

    def check(self, where: str) -> None:
        if not self.sizes or not all(0 < size <= 1 for size in self.sizes):
            raise input_error(where, "sizes", self.sizes, "shares of the stack above 0, up to 1", "Write shares such as 0.25, 0.5, 0.75.")

    def ranges(self, arch: ArchSpec) -> Mapping[str, tuple[BlockKey, ...]]:
        total = len(arch.blocks)
        found: dict[tuple[BlockKey, ...], str] = {}
        for count in dict.fromkeys(max(1, round(size * total)) for size in self.sizes):
            for place in _PLACES:
                found.setdefault(place_blocks(place, count, arch.blocks), f"{place if count < total else 'all'} {count} of {total}")
        return {name: blocks for blocks, name in found.items()}

    def start(self, facts: RunFacts) -> RunState:
        if facts.arch is None:
            raise input_error(facts.where, "model", "blocks without patches", "a model whose blocks can be patched", "Use another model.")
        return _ProbeState(self, facts, self.ranges(facts.arch))

    def line(self) -> str:
        return f"probe of block ranges, {', '.join(f'{size:g}' for size in self.sizes)} of the stack"


class _ProbeState(RunState):
    observes = True

    def __init__(self, policy: RangeProbe, facts: RunFacts, ranges: Mapping[str, tuple[BlockKey, ...]]):
        super().__init__(policy)
        self.ranges = ranges
        self.found: dict[str, list[list[float]]] = {part: [[] for _ in range(facts.steps)] for part in ranges}

    def observe(self, seen: Observation) -> None:
        step = int(seen.visit.u)
        if seen.visit.second or step >= len(next(iter(self.found.values()))):
            return
        for part, (offset, *_) in seen.features.items():
            before = seen.last(part)
            if before is not None:
                fresh = offset.float().flatten(1)
                change = (fresh - before[0].flatten(1)).norm(dim=1) / fresh.norm(dim=1).clamp_min(TINY)
                self.found[part][step].append(float(change.mean()))

    def findings(self) -> dict[str, Any]:
        """changes: a dictionary a range with its blocks and a number a step, None where there was no step before it; a line a range and
        the two verdicts, as words."""
        changes = [
            {"range": part, "blocks": block_text(self.ranges[part]), "change": [fmean(step) if step else None for step in steps]}
            for part, steps in self.found.items()
        ]
        lines = {f"{one['range']} ({one['blocks']})": _line(one["change"]) for one in changes}
        return {_CHANGES: changes, **lines, **_verdicts(changes)}


def _line(change: Sequence[float | None]) -> str:
    early, late = _halves(change)
    return f"changes a step by {early:.1%} early, {late:.1%} late"


def _halves(change: Sequence[float | None]) -> tuple[float, float]:
    """The mean change of the first and of the second half of a run, 0 where nothing was measured."""
    middle = (len(change) + 1) // 2
    halves = [[value for value in half if value is not None] for half in (change[:middle], change[middle:])]
    return tuple(fmean(half) if half else 0.0 for half in halves)


def _verdicts(changes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each half of the run, which of the ranges of each size changes least."""
    sizes: dict[str, list[Mapping[str, Any]]] = {}
    for one in changes:
        sizes.setdefault(one["range"].split(" ", 1)[1], []).append(one)
    return {
        f"least change {name}": ", ".join(min(group, key=lambda one: _halves(one["change"])[half])["range"] for group in sizes.values())
        for half, name in enumerate(("early", "late"))
    }


def probed(record: RunRecord | None, where: str) -> Sequence[Mapping[str, Any]]:
    """What a run of the probe found, a dictionary a range.

    Raises: NodeInputError where the report is not one of a probe that ran.
    """
    found = () if record is None else record.findings.get(_CHANGES, ())
    if not found or not isinstance(found[0], Mapping):
        got = "a cache that has not run" if record is None else f"the report of {record.policy}"
        remedy = "Link the report of Block Range Probe, its model to a sampler, and the sampler's output to 'after'."
        raise input_error(where, "report", got, "the report of a probe that was sampled", remedy)
    return found


def change_chart(changes: Sequence[Mapping[str, Any]]) -> Tensor:
    """The change of every range over the steps: (1, h, w, 3)."""
    lines = [
        Series(one["range"], tuple((float(step), value) for step, value in enumerate(one["change"]) if value is not None))
        for one in changes
    ]  # fmt: skip
    return line_chart(lines, Chart("How much of what a range adds changes in a step", "step", "|D - D before| / |D|", log_y=True))
