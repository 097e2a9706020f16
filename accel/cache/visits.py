"""One sampling run: which call belongs to which visit, whether it is skipped, and what is kept of it.

A visit is one evaluation of the guided model. Its conditions come in one call or in several, as memory allows, and in any order; the first
call decides for all of them, so guidance never mixes a computed condition with a forecast one unless the latter has no history. A new visit
starts when sigma changes, or when a condition that this visit has served comes again (Heun's second evaluation and the next step's first
share a sigma).

The decision is made on the rows of the first condition of that first call. Hosts hand conditions over in a fixed order, whole or in parts,
so the same rows decide however memory splits them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...families.arch import ArchSpec
from ...metrics.stopwatch import DeviceClock
from .clock import StepClock
from .policy import Action, Choice, Limits, Observation, Policy, RunFacts, Visit
from .report import RunRecord, VisitRecord
from .store import PROBE, FeatureStore, Key, StoreOptions, guard_of
from .targets import Call, Features, Target, Watch

__all__ = ["CachePlan", "Run", "Schedule"]

BETWEEN_STEPS = 1e-6  # u of a step's own sigma may fall short of its number by rounding; evaluations between steps go with the one before


class Schedule(Protocol):
    """Which steps are computed, said beforehand. A policy without a gate skips all others; one with a gate decides on them itself."""

    def steps_for(self, facts: RunFacts) -> frozenset[int]:
        """The steps of this run that are computed. Raises: NodeInputError where the schedule cannot be used for it."""
        ...

    def note(self, facts: RunFacts) -> str:
        """How the run differs from the one it was made for, in words; an empty string where it does not."""
        ...

    def reach_for(self, facts: RunFacts) -> Sequence[float]:
        """Of every step of the run, the share of its distance from the latest computed step that an order 1 forecast goes; empty: all."""
        ...


@dataclass(frozen=True)
class CachePlan:
    """Everything a cache node sets. target: one of TARGETS; blocks: a range for block_delta, "" for the whole stack."""

    policy: Policy
    target: str = "output"
    limits: Limits = field(default_factory=Limits)
    store: StoreOptions = field(default_factory=StoreOptions)
    blocks: str = ""
    schedule: Schedule | None = None


@dataclass
class _Batch:
    """One model call with its conditions. keys: one a part of the batch, parts of equal size; owners: what keys know by identity.

    text: tokens of text that history must have, 0 where it holds none.
    """

    call: Call
    keys: Sequence[Key]
    owners: tuple
    text: int = 0
    guards: list[tuple] = field(init=False)

    def __post_init__(self) -> None:
        self.guards = [(*guard_of(part), self.text) for part in self.split(self.call.x)]

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return tensor.tensor_split(len(self.keys))


class Run:
    """State of one sampling run; `close` drops all of it but the record.

    It travels in transformer_options as a plain object, which the host passes on by reference.
    """

    def __init__(
        self, plan: CachePlan, target: Target, sigmas: Sequence[float], device: torch.device, arch: ArchSpec | None = None, where: str = ""
    ):
        self.plan, self.target = plan, target
        self.policy, self.probe = plan.policy, plan.policy.probe
        self.clock = StepClock(sigmas)
        facts = RunFacts(self.clock.sigmas, target.name, arch, where)
        self.state = plan.policy.start(facts)
        self.store = FeatureStore(plan.policy.order, plan.policy.basis, plan.store, self.probe.order if self.probe else 0)
        self.record = RunRecord(plan.policy.line(), target.name, self.clock.steps)
        self.scheduled = None if plan.schedule is None else plan.schedule.steps_for(facts)
        self.reach = () if plan.schedule is None or self.probe is not None else plan.schedule.reach_for(facts)
        if plan.schedule is not None and (remark := plan.schedule.note(facts)):
            self.record.note(remark)
        self.inside = False
        self._full, self._forecast = DeviceClock(device), DeviceClock(device)
        self._visit: Visit | None = None
        self._lead: Key | None = None
        self._choice: Choice | None = None
        self._served: set[Key] = set()
        self._skipped = 0
        self._two_at_a_sigma = False

    def handle(self, call: Call, keys: Sequence[Key], owners: tuple) -> torch.Tensor:
        """Make the call or forecast it."""
        batch = _Batch(call, keys, owners, call.text if self.target.keeps_text else 0)
        if self._visit is None or self._visit.sigma != call.sigma or not self._served.isdisjoint(keys):
            self._open(batch)
        self._served.update(keys)
        self.record.calls += 1
        mark, entry = self._forecast.start(), self.record.visits[-1]
        skipped = False
        try:
            if self._choice.skip and self._known(batch, self._choice.part):
                skipped = True
                return self._skip(batch)
            if self._choice.skip:
                entry.reason = "forecast, without history in part"
            out, skipped = self._compute(batch)
            return out
        finally:
            entry.forecast += len(keys) * skipped
            entry.full += len(keys) * (not skipped)
            self.record.calls_made += not skipped
            (self._forecast if skipped else self._full).stop(mark)

    def close(self, seconds: float, finished: bool) -> RunRecord:
        """Drop every tensor and finish the record; the device must be done with its work."""
        record = self.record
        record.peak_bytes, record.order = self.store.peak, self.store.order
        for note in self.store.notes:
            record.note(note)
        record.seconds, record.seconds_full, record.seconds_forecast = seconds, self._full.seconds(), self._forecast.seconds()
        record.finished = finished
        if finished and self.policy.can_skip and self.policy.forecasts and not any(visit.forecast for visit in record.visits):
            record.note("no gain: every visit was full; fewer warm-up and tail steps, or more steps in all, leave room for forecasts")
        record.findings = self.state.findings()
        self.store.clear()
        self._served.clear()
        self.state = None
        return record

    def _open(self, batch: _Batch) -> None:
        """A new visit, decided here unless its gate lies inside the network."""
        before, sigma = self._visit, batch.call.sigma
        moment = self.clock.at(sigma)
        again = before is not None and before.u == moment.u
        self._two_at_a_sigma |= again
        # A step evaluated at both ends meets each inner sigma twice, the first time as the end of the step before.
        second = moment.u != int(moment.u) or (self._two_at_a_sigma and not again and before is not None)
        visit = Visit(len(self.record.visits), sigma, moment.u, self.clock.steps, self._skipped, moment.foreign, second)
        self._visit, self._lead, self._served = visit, batch.keys[0], set()
        self.record.visits.append(VisitRecord(visit.index, sigma, moment.u, "full", ""))
        choice = self._choose(batch, visit)
        if choice.action is Action.PROBE and self.probe.at == "latent":
            choice = self.state.gate(visit, self._measured(batch, batch.call.x))
        self._choice = choice
        if choice.action is not Action.PROBE:
            self._settle(choice)

    def _choose(self, batch: _Batch, visit: Visit) -> Choice:
        """Limits first, then the schedule, then the policy; whatever they say, a forecast needs history."""
        if forbidden := self.plan.limits.forbids(visit):
            return Choice(Action.FULL, forbidden)
        if self.scheduled is not None and int(visit.u + BETWEEN_STEPS) in self.scheduled:
            return Choice(Action.FULL, "schedule")
        by_schedule = self.scheduled is not None and self.probe is None
        choice = self.state.decide(visit)
        if by_schedule:
            choice = Choice(Action.SKIP, "schedule", choice.part)
        gated = choice.action is Action.PROBE
        if choice.action is Action.FULL or self._known(batch, choice.part) and not (gated and not self._known(batch, PROBE)):
            return choice
        return Choice(Action.FULL, "no history")

    def _settle(self, choice: Choice) -> None:
        visit, entry = self._visit, self.record.visits[-1]
        self._choice = choice
        entry.decision, entry.reason, entry.statistic = choice.action.value, choice.reason, choice.statistic
        self._skipped = self._skipped + 1 if choice.skip else 0
        self.state.settle(visit, choice)

    def _known(self, batch: _Batch, part: str) -> bool:
        return all(self.store.has(key, guard, part) for key, guard in zip(batch.keys, batch.guards))

    def _position(self) -> float:
        return self._visit.u if self.policy.axis == "step" else self._visit.sigma

    def _forecasts(self, batch: _Batch, part: str) -> Features:
        device, position = batch.call.x.device, self._position()
        reach = 1.0
        if self.reach and self.store.order == 1:
            reach = self.reach[min(int(self._visit.u + BETWEEN_STEPS), len(self.reach) - 1)]  # a solver may ask at the very end
        found = [self.store.forecast(key, position, self._visit.index, device, part, reach) for key in batch.keys]
        return tuple(torch.cat(feature) for feature in zip(*found))

    def _measured(self, batch: _Batch, read: torch.Tensor) -> list[float]:
        """The gate's number of each image, from the lead condition's rows; the one place where the host waits for the device."""
        fresh = self._thinned(batch.split(read)[0])
        forecast = self.store.forecast(batch.keys[0], self._position(), self._visit.index, fresh.device, PROBE)[0]
        return self.state.measure(fresh, forecast).tolist()

    def _thinned(self, read: torch.Tensor) -> torch.Tensor:
        return read[:, :: self.probe.stride] if self.probe.stride > 1 else read

    def _skip(self, batch: _Batch) -> torch.Tensor:
        call, part = batch.call, self._choice.part
        if self.probe is not None and self.probe.every and self.probe.at != "latent":
            call.watch = Watch(self.probe.at)
        out = self.target.skip(call, self._forecasts(batch, part), part)
        self._keep_probe(batch)
        self.record.bypassed_patches += call.bypassed
        return out

    def _compute(self, batch: _Batch) -> tuple[torch.Tensor, bool]:
        """(denoised, whether a gate inside the call left the blocks out)."""
        call, visit, deciding = batch.call, self._visit, self._choice.action is Action.PROBE
        if not self.policy.can_skip or self.store.order < 0 or visit.sigma == 0.0 or visit.foreign:
            return call.run(call.options), False

        def gate(read: torch.Tensor) -> Features | None:
            self._settle(self.state.gate(visit, self._measured(batch, read)))
            return self._forecasts(batch, "") if self._choice.skip else None

        if self.probe is not None and self.probe.at != "latent":
            call.watch = Watch(self.probe.at, gate if deciding else None)
        parts = self.policy.parts(visit)
        out, features = self.target.full(call, parts)
        self.record.bypassed_patches += call.bypassed
        if deciding and self._choice.skip:
            if self.probe.every:
                self._keep_probe(batch)
            return out, True
        if not features:
            self._warn("off: the model did not offer its blocks; target output works with every model")
            self.store.order = -1
            if self._choice.action is Action.PROBE:
                self._settle(Choice(Action.FULL, "no blocks"))
            return out, False
        self._keep(batch, features)
        return out, False

    def _read(self, batch: _Batch) -> torch.Tensor | None:
        """What the probe names in this call, over the whole batch."""
        if self.probe is None:
            return None
        return batch.call.x if self.probe.at == "latent" else batch.call.watch.seen if batch.call.watch else None

    def _keep_probe(self, batch: _Batch) -> None:
        """In a skipped visit."""
        if self.probe is None or not self.probe.every or (read := self._read(batch)) is None:
            return
        for key, guard, rows in zip(batch.keys, batch.guards, batch.split(self._thinned(read))):
            self.store.keep(key, guard, (rows,), self._position(), self._visit.index, batch.owners, PROBE)

    def _keep(self, batch: _Batch, features: dict[str, Features]) -> None:
        """Show each condition of a full visit to the policy, then keep what is finite."""
        read, visit = self._read(batch), self._visit
        probes = [None] * len(batch.keys) if read is None else batch.split(self._thinned(read))
        by_part = {part: [batch.split(feature) for feature in kept] for part, kept in features.items()}
        for i, (key, guard) in enumerate(zip(batch.keys, batch.guards)):
            own = {part: tuple(rows[i] for rows in kept) for part, kept in by_part.items()}
            tensors = [tensor for kept in own.values() for tensor in kept] + [probes[i]] * (read is not None)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                self._warn(f"not a finite number at sigma {visit.sigma:.4g}, {self.target.name}: nothing kept of it")
                self.store.drop(key)
                continue
            if self.state.observes:
                self.state.observe(self._observation(batch, i, own, probes[i]))
            if not self.policy.keeps:
                continue
            if self.policy.parts(visit) is not None:
                for part in getattr(self.target, "ranges", {}).keys() - own.keys():
                    self.store.drop(key, part)
            for part, kept in (own if read is None else {**own, PROBE: (probes[i],)}).items():
                self.store.keep(key, guard, kept, self._position(), visit.index, batch.owners, part)

    def _observation(self, batch: _Batch, i: int, features: dict[str, Features], probe: torch.Tensor | None) -> Observation:
        key, guard, device = batch.keys[i], batch.guards[i], batch.call.x.device

        def last(part: str) -> list[torch.Tensor] | None:
            return self.store.last(key, device, part) if self.store.has(key, guard, part) else None

        def forecast(part: str) -> list[torch.Tensor] | None:
            known = self.store.has(key, guard, part)
            return self.store.forecast(key, self._position(), self._visit.index, device, part) if known else None

        return Observation(self._visit, key, key == self._lead, features, probe, last, forecast)

    def _warn(self, text: str) -> None:
        self.record.note(text)
        logging.warning("Rectiflow cache: %s", text)
