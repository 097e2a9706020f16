"""A plan of what a smaller model keeps, as JSON: bound to one model by a hash, in the model's own numbering.

    {"version": 1, "family": "Flux", "model": "<16 hex>", "counts": {"double_blocks": 3, "single_blocks": 6},
     "kept": {"double_blocks": [0, 2], …}, "runs": [{"holder", "first", "last"}], "students": {"double_blocks.1": "<file>"},
     "width": {"double_blocks.0": {"heads": [0, 1], "ffn": [0, 5, …]}}, "method": "…", "scores": {"double_blocks.1": 0.2}}

A run [first..last] is replaced by one student block that stands at `first`; last and what lies between are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import input_error
from ...families.stack import Stack, StackBlock
from ...families.width import KINDS

__all__ = ["PrunePlan", "Run", "plan_from_json"]

VERSION = 1
LONGEST = 64 << 20  # characters of a plan; one that keeps every neuron of a large model by number has a few million
REMEDY = "Make the plan with a pruning node, or take the one that came with the model."


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks first..last of one holder, replaced together."""

    holder: str
    first: int
    last: int

    @property
    def path(self) -> str:
        """Where the student of this run stands."""
        return f"{self.holder}.{self.first}"

    def __contains__(self, block: StackBlock) -> bool:
        return block.holder == self.holder and self.first <= block.index <= self.last


@dataclass(frozen=True)
class PrunePlan:
    """What is kept of the model with hash `model`.

    counts: holder → blocks that the model has. kept: holder → kept indices, ascending; a holder that is absent is kept whole.
    runs: of PPCL. students: path of a run's first block → file with its weights. width: block path → kept units of
    a kind (families/width.py: "heads", "ffn", …) by number.
    method: how it was made. scores: block path → its number by that method. facts: further figures for people.
    """

    family: str
    model: str
    counts: Mapping[str, int]
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()
    students: Mapping[str, str] = field(default_factory=dict)
    width: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    method: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def removed(self, stack: Stack) -> tuple[StackBlock, ...]:
        """Blocks that this plan leaves out, in running order; the first of a run is not among them."""
        in_runs = {f"{run.holder}.{index}" for run in self.runs for index in range(run.first + 1, run.last + 1)}

        def out(block: StackBlock) -> bool:
            kept = self.kept.get(block.holder)
            return block.path in in_runs or (kept is not None and block.index not in kept)

        return tuple(block for block in stack.blocks if out(block))

    def check(self, stack: Stack, model: str, where: str) -> None:
        """Raises NodeInputError where this plan is not for that model, or leaves out what must stay."""
        if self.model != model or self.family != stack.family or dict(self.counts) != stack.counts:
            got = f"a plan for {self.family} {self.model} with {dict(self.counts)}"
            allowed = f"one for this model: {stack.family} {model} with {stack.counts}"
            raise input_error(where, "plan", got, allowed, "Link the model that the plan was made on, with no merge before it.")
        lost = [block.name for block in self.removed(stack) if block in stack.fixed]
        if lost:
            allowed = f"plans that keep it: the last block of {stack.family} hands no text on"
            raise input_error(where, "plan", f"leaves out {', '.join(lost)}", allowed, "Make the plan again with this block protected.")

    def to_json(self) -> str:
        content = {
            "version": VERSION, "family": self.family, "model": self.model, "counts": dict(self.counts),
            "kept": {holder: list(kept) for holder, kept in self.kept.items()},
            "runs": [{"holder": run.holder, "first": run.first, "last": run.last} for run in self.runs],
            "students": dict(self.students),
            "width": {path: {kind: list(kept) for kind, kept in kinds.items()} for path, kinds in self.width.items()},
            "method": self.method, "scores": dict(self.scores), "facts": dict(self.facts),
        }  # fmt: skip
        return json.dumps({name: value for name, value in content.items() if value or name in ("version", "kept")}, allow_nan=False)

    def describe(self, stack: Stack) -> str:
        out = [block.name for block in self.removed(stack)]
        parts = [f"leaves out {len(out)} of {len(stack.blocks)} blocks ({', '.join(out)})" if out else "keeps every block"]
        if self.runs:
            parts.append("runs " + ", ".join(f"{run.holder}.{run.first}-{run.last}" for run in self.runs))
        if self.width:
            parts.append(f"narrows {len(self.width)} blocks")
        return "; ".join(parts)


def plan_from_json(text: str, where: str, name: str = "plan") -> PrunePlan:
    """The plan that `text` holds.

    Raises: NodeInputError for what is no plan, an unknown version, or numbers outside of the model that it names.
    """

    def refuse(got: str, allowed: str = "a plan as JSON, version 1") -> Exception:
        return input_error(where, name, got, allowed, REMEDY)

    if not isinstance(text, str) or len(text) > LONGEST:
        raise refuse("no text, or more than a plan holds")
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise refuse(f"{text[:40]!r} ({error})") from None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise refuse(f"version {found.get('version')!r}" if isinstance(found, dict) else f"{text[:40]!r}")
    try:
        return _checked(found)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise refuse(str(error) or type(error).__name__, "kept blocks, heads and neurons within the counts that the plan names") from None


def _checked(found: dict) -> PrunePlan:
    counts = {str(holder): _whole(count, 1, 10_000, f"counts of {holder}") for holder, count in found["counts"].items()}
    kept = {holder: _numbers(numbers, counts[holder], f"kept {holder}", empty=True) for holder, numbers in found["kept"].items()}
    if not any(kept.get(holder, True) for holder in counts):
        raise ValueError("no block is kept")
    runs = []
    for entry in found.get("runs", []):
        last = _whole(entry["last"], 1, counts[entry["holder"]] - 1, "last of a run")
        run = Run(entry["holder"], _whole(entry["first"], 0, last - 1, "first of a run"), last)
        if any(run.holder == other.holder and run.first <= other.last and other.first <= run.last for other in runs):
            raise ValueError(f"run {run.first}-{run.last} overlaps another one")
        if any(index not in kept.get(run.holder, range(counts[run.holder])) for index in (run.first,)):
            raise ValueError(f"the first block of run {run.first}-{run.last} is not kept, and its student stands there")
        runs.append(run)
    students = {_path(path, counts): str(file) for path, file in found.get("students", {}).items()}
    lone = set(students) - {run.path for run in runs}
    if lone:
        raise ValueError(f"students at {', '.join(sorted(lone))}, where no run begins")
    width = {
        _path(path, counts): {kind: _numbers(numbers, 1 << 20, f"{kind} of {path}", empty=True) for kind, numbers in kinds.items()}
        for path, kinds in found.get("width", {}).items()
    }
    unknown = {kind for kinds in width.values() for kind in kinds} - set(KINDS)
    if unknown:
        raise ValueError(f"width of {', '.join(sorted(unknown))}; it is of {', '.join(KINDS)}")
    scores = {str(path): float(score) for path, score in found.get("scores", {}).items()}
    if not all(math.isfinite(score) for score in scores.values()):
        raise ValueError("scores that are not finite")
    named = (str(found["family"]), str(found["model"]))
    facts = dict(found.get("facts", {}))
    return PrunePlan(*named, counts, kept, tuple(runs), students, width, str(found.get("method", "")), scores, facts)


def _whole(value: Any, low: int, high: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{what}: {value!r}, not from {low} to {high}")
    return value


def _numbers(values: Any, count: int, what: str, empty: bool = False) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{what}: not a list")
    numbers = tuple(_whole(value, 0, count - 1, what) for value in values)
    if list(numbers) != sorted(set(numbers)) or not (numbers or empty):
        raise ValueError(f"{what}: numbers must rise, and there must be one at least")
    return numbers


def _path(path: str, counts: Mapping[str, int]) -> str:
    holder, _, index = path.rpartition(".")
    if holder not in counts or not index.isdecimal():
        raise ValueError(f"{path!r} names no block")
    _whole(int(index), 0, counts[holder] - 1, f"block {path}")
    return path
