"""One sampling run: which call belongs to which visit, whether it is skipped, and what is kept of it.

A visit is one evaluation of the guided model. Its conditions come in one call or in several, as memory allows, and in any order; the first
call decides for all of them, so guidance never mixes a computed condition with a forecast one unless the latter has no history. A new visit
starts when sigma changes, or when a condition that this visit has served comes again (Heun's second evaluation and the next step's first
share a sigma).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...metrics.stopwatch import DeviceClock
from .clock import StepClock
from .policy import Limits, Policy, Visit
from .report import RunRecord, VisitRecord
from .store import FeatureStore, Key, StoreOptions, guard_of
from .targets import BlockTarget, Call, OutputTarget

__all__ = ["CachePlan", "Run"]


@dataclass(frozen=True)
class CachePlan:
    """Everything a cache node sets. target: one of TARGETS; blocks: a range for block_delta, "" for the whole stack."""

    policy: Policy
    target: str = "output"
    limits: Limits = field(default_factory=Limits)
    store: StoreOptions = field(default_factory=StoreOptions)
    blocks: str = ""


class Run:
    """State of one sampling run; `close` drops all of it but the record.

    It travels in transformer_options as a plain object, which the host passes on by reference.
    """

    def __init__(self, plan: CachePlan, target: OutputTarget | BlockTarget, sigmas: Sequence[float], device: torch.device):
        self.plan, self.target = plan, target
        self.clock = StepClock(sigmas)
        self.store = FeatureStore(plan.policy.order, plan.policy.basis, plan.store)
        self.record = RunRecord(plan.policy.line(), target.name, self.clock.steps)
        self.inside = False
        self._full, self._forecast = DeviceClock(device), DeviceClock(device)
        self._visit: Visit | None = None
        self._skips = False
        self._served: set[Key] = set()
        self._skipped = 0

    def handle(self, call: Call, keys: Sequence[Key], owners: tuple) -> torch.Tensor:
        """Make the call or forecast it. keys: one a part of the batch, parts of equal size; owners: objects that keys know by identity."""
        size = call.x.shape[0] // len(keys)
        guards = [guard_of(part) for part in call.x.split(size)]
        known = all(self.store.has(key, guard) for key, guard in zip(keys, guards))
        visit = self._open(call.sigma, keys, known)
        self._served.update(keys)
        entry = self.record.visits[-1]
        self.record.calls += 1
        if self._skips and known:
            entry.forecast += len(keys)
            mark = self._forecast.start()
            try:
                return self._skip(call, keys, visit)
            finally:
                self._forecast.stop(mark)
        if self._skips:
            entry.reason = "forecast, without history in part"
        entry.full += len(keys)
        self.record.calls_made += 1
        mark = self._full.start()
        try:
            return self._compute(call, keys, guards, visit, owners)
        finally:
            self._full.stop(mark)

    def close(self, seconds: float, finished: bool) -> RunRecord:
        """Drop every tensor and finish the record; the device must be done with its work."""
        record = self.record
        record.peak_bytes, record.order = self.store.peak, self.store.order
        for note in self.store.notes:
            record.note(note)
        record.seconds, record.seconds_full, record.seconds_forecast = seconds, self._full.seconds(), self._forecast.seconds()
        record.finished = finished
        if finished and self.plan.policy.can_skip and not any(visit.forecast for visit in record.visits):
            record.note("no gain: every visit was full; fewer warm-up and tail steps, or more steps in all, leave room for forecasts")
        self.store.clear()
        self._served.clear()
        return record

    def _open(self, sigma: float, keys: Sequence[Key], known: bool) -> Visit:
        """The visit this call belongs to; a new one is decided here."""
        if self._visit is not None and self._visit.sigma == sigma and self._served.isdisjoint(keys):
            return self._visit
        moment = self.clock.at(sigma)
        visit = Visit(len(self.record.visits), sigma, moment.u, self.clock.steps, self._skipped, moment.foreign)
        forbidden = self.plan.limits.forbids(visit)
        skips, reason = (False, forbidden) if forbidden else self.plan.policy.decide(visit)
        if skips and not known:
            skips, reason = False, "no history"
        self._visit, self._skips, self._served = visit, skips, set()
        self._skipped = self._skipped + 1 if skips else 0
        self.record.visits.append(VisitRecord(visit.index, sigma, moment.u, "forecast" if skips else "full", reason))
        return visit

    def _position(self, visit: Visit) -> float:
        return visit.u if self.plan.policy.axis == "step" else visit.sigma

    def _skip(self, call: Call, keys: Sequence[Key], visit: Visit) -> torch.Tensor:
        parts = [self.store.forecast(key, self._position(visit), visit.index, call.x.device) for key in keys]
        out = self.target.skip(call, [torch.cat(feature) for feature in zip(*parts)])
        self.record.bypassed_patches += call.bypassed
        return out

    def _compute(self, call: Call, keys: Sequence[Key], guards: list, visit: Visit, owners: tuple) -> torch.Tensor:
        if not self.plan.policy.can_skip or self.store.order < 0 or visit.sigma == 0.0 or visit.foreign:
            return call.run(call.options)
        out, features = self.target.full(call)
        if features is None:
            self._warn("off: the model did not offer its blocks; target output works with every model")
            self.store.order = -1
            return out
        split = [feature.tensor_split(len(keys)) for feature in features]
        for i, (key, guard) in enumerate(zip(keys, guards)):
            parts = [feature[i] for feature in split]
            if all(bool(torch.isfinite(part).all()) for part in parts):
                self.store.keep(key, guard, parts, self._position(visit), visit.index, owners)
            else:
                self._warn(f"not a finite number at sigma {visit.sigma:.4g}, {self.target.name}: nothing kept of it")
                self.store.drop(key)
        return out

    def _warn(self, text: str) -> None:
        self.record.note(text)
        logging.warning("Rectiflow cache: %s", text)
