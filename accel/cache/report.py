"""What a cache did: every visit with its decision and reason, calls, bytes and seconds, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["EARLIER", "CacheLog", "RunRecord", "VisitRecord"]

EARLIER = "an earlier graph run: this one took the sampler's result from the host's cache"
KEPT_RUNS = 8  # a batch of queued prompts reads its own report each time; older ones are of no use


@dataclass
class VisitRecord:
    """One visit. full, forecast: condition parts (uuids) that were computed and that were forecast; statistic: the number that decided."""

    index: int
    sigma: float
    u: float
    decision: str
    reason: str
    full: int = 0
    forecast: int = 0
    statistic: float | None = None


@dataclass
class RunRecord:
    """One sampling run. seconds_full and seconds_forecast are inside model calls; bytes are the most that was kept at once.

    prompt: the graph run that sampled, "" outside of one.
    """

    policy: str
    target: str
    steps: int
    visits: list[VisitRecord] = field(default_factory=list)
    calls: int = 0
    calls_made: int = 0
    order: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    seconds_full: float = 0.0
    seconds_forecast: float = 0.0
    bypassed_patches: int = 0
    notes: list[str] = field(default_factory=list)
    finished: bool = False
    findings: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""

    def note(self, text: str) -> None:
        """Add a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def parts(self) -> tuple[int, int]:
        """(computed, forecast), each condition of each visit counted once."""
        return sum(visit.full for visit in self.visits), sum(visit.forecast for visit in self.visits)

    @property
    def hit_ratio(self) -> float:
        """Share of the conditions' evaluations that was forecast."""
        full, forecast = self.parts
        return forecast / (full + forecast) if full + forecast else 0.0

    @property
    def full_visits(self) -> int:
        return sum(visit.decision == "full" for visit in self.visits)

    def text(self) -> str:
        full, forecast = self.parts
        reasons = Counter(visit.reason for visit in self.visits if visit.decision == "full")
        lines = [
            f"{self.policy}, target {self.target}" + ("" if self.finished else " — the run did not finish"),
            f"{self.full_visits} of {len(self.visits)} visits full over {self.steps} steps: "
            + ", ".join(f"{count} {reason}" for reason, count in reasons.items()),
            f"network: {self.calls_made} of {self.calls} calls; conditions: {full} computed, {forecast} forecast ({self.hit_ratio:.0%})",
            f"{self.seconds:.3f} s, in full calls {self.seconds_full:.3f} s, in forecasts {self.seconds_forecast:.3f} s",
            f"kept at most {self.peak_bytes / 2**20:.3f} MiB, order {self.order}",
        ]
        if self.bypassed_patches:
            lines.append(f"{self.bypassed_patches} calls of other nodes' block patches were left out with their blocks")
        lines += [f"{name}: {value}" for name, value in self.findings.items() if not isinstance(value, list)]
        lines += [f"note: {note}" for note in self.notes]
        lines.append("visits: " + "".join("F" if visit.decision == "full" else "·" for visit in self.visits))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hit_ratio": self.hit_ratio, "full_visits": self.full_visits}


class CacheLog:
    """The handle that a cache node hands out; sampling adds a record a run. It holds numbers and words, never a tensor.

    running: gives the id of the graph run that is under way, "" outside of one; str gives "" always.
    """

    def __init__(self, running: Callable[[], str] = str) -> None:
        self.runs: list[RunRecord] = []
        self.running = running

    def add(self, record: RunRecord) -> None:
        self.runs.append(record)
        del self.runs[:-KEPT_RUNS]

    @property
    def last(self) -> RunRecord | None:
        return self.runs[-1] if self.runs else None

    def read(self) -> RunRecord | None:
        """The last run; where the graph run under way took the sampler's result from an earlier one, a copy that says so."""
        last, prompt = self.last, self.running()
        if last is None or not prompt or last.prompt in ("", prompt):
            return last
        return replace(last, notes=[*last.notes, EARLIER])

    def json(self) -> str:
        """The last run, for other programs; see read."""
        last = self.read()
        return json.dumps(None if last is None else last.as_dict(), ensure_ascii=False)
