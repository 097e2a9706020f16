"""What RAS did: every visit with its phase, tokens and reason, how often each token was computed, calls, bytes and seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["RegionLog", "RegionRecord", "RegionVisit"]

KEPT_RUNS = 8


@dataclass
class RegionVisit:
    """One evaluation of the guided model. phase: "dense", "active" or "skipped" (a cache around RAS made no call). tokens: computed."""

    step: int
    sigma: float
    phase: str
    tokens: int
    reason: str
    seconds: float = 0.0


@dataclass
class RegionRecord:
    """One sampling run. sides: of the token grid. counts: (b, n) active visits in which a token was computed, on the CPU, of how many
    `active`.

    masks: (step, (b, n) bool) of the active steps.
    """

    settings: str
    family: str
    sides: tuple[int, ...]
    patch: tuple[int, ...]
    steps: int
    visits: list[RegionVisit] = field(default_factory=list)
    masks: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    kv_bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    finished: bool = False

    def note(self, text: str) -> None:
        """Add a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def tokens(self) -> int:
        count = 1
        for side in self.sides:
            count *= side
        return count

    @property
    def share(self) -> float:
        """Share of the tokens' evaluations that was computed, over all visits."""
        asked = self.tokens * len(self.visits)
        return sum(visit.tokens for visit in self.visits) / asked if asked else 1.0

    def counts(self) -> tuple[torch.Tensor, int]:
        """((b, n) active steps in which each token was computed, how many active steps there were)."""
        if not self.masks:
            return torch.zeros(1, self.tokens), 0
        return torch.stack([mask for _, mask in self.masks]).sum(dim=0), len(self.masks)

    def mean_seconds(self, phase: str) -> float:
        spans = [visit.seconds for visit in self.visits if visit.phase == phase]
        return sum(spans) / len(spans) if spans else 0.0

    def text(self) -> str:
        dense, active = ([visit for visit in self.visits if visit.phase == phase] for phase in ("dense", "active"))
        grid = "×".join(str(side) for side in self.sides)
        lines = [
            f"{self.settings}" + ("" if self.finished else " — the run did not finish"),
            f"{self.family}, {grid} = {self.tokens} tokens, {self.steps} steps: "
            f"{len(dense)} visits dense, {len(active)} over part of the tokens",
            f"tokens computed: {self.share:.1%} of all visits'",
            f"{self.seconds:.3f} s; a dense visit {self.mean_seconds('dense'):.4f} s, one over part {self.mean_seconds('active'):.4f} s",
            f"keys and values kept: {self.kv_bytes / 2**20:.2f} MiB at most",
        ]
        lines += [f"note: {note}" for note in self.notes]
        lines.append("step: tokens (why)")
        lines += [f"{visit.step}: {visit.tokens if visit.phase != 'skipped' else '·'} ({visit.reason})" for visit in self.visits]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        plain = {name: value for name, value in vars(self).items() if name not in ("masks", "visits")}
        return {**plain, "visits": [vars(visit) for visit in self.visits], "share": self.share, "tokens": self.tokens}


class RegionLog:
    """The handle that a RAS node hands out; sampling adds a record a run. It holds numbers, words and small masks on the CPU."""

    def __init__(self) -> None:
        self.runs: list[RegionRecord] = []

    def add(self, record: RegionRecord) -> None:
        self.runs.append(record)
        del self.runs[:-KEPT_RUNS]

    @property
    def last(self) -> RegionRecord | None:
        return self.runs[-1] if self.runs else None

    def json(self) -> str:
        """The last run, for other programs."""
        return json.dumps(None if self.last is None else self.last.as_dict(), ensure_ascii=False)
