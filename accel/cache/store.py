"""What a run keeps: per condition the ladders of its features, under a cap, and nothing after the run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .forecast import Ladder

__all__ = ["FeatureStore", "Key", "PROBE", "StoreOptions"]

PROBE = "probe"
STALE_VISITS = 4  # a condition that was not asked for in so many visits is over: a time range ended, or its patches are made anew each time


class Key(NamedTuple):
    """One condition as the host names it in a model call.

    uuid, kind: transformer_options' uuids and cond_or_uncond. window: indices of a context window. hooks: active weight hooks with their
    strengths. variant: the other nodes' block patches and attention override, compared by identity: skipped-layer guidance calls again
    with the same uuid and other patches.
    """

    uuid: Hashable
    kind: int
    window: tuple[int, ...] | None = None
    hooks: tuple[tuple[int, float], ...] = ()
    variant: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class StoreOptions:
    """dtype: of kept tensors, None as they come. device: "model" or "cpu". cap: bytes, 0 for no cap."""

    dtype: torch.dtype | None = None
    device: str = "model"
    cap: int = 0


@dataclass
class _Entry:
    """ladders: of each feature, by part."""

    guard: tuple
    seen: int
    owners: tuple = ()  # keeps the foreign patches alive whose identity is in the key
    ladders: dict[str, list[Ladder]] = field(default_factory=dict)


def guard_of(part: torch.Tensor) -> tuple:
    """What a condition's latent must share with the kept one: shape, dtype, device."""
    return tuple(part.shape), part.dtype, part.device


class FeatureStore:
    """Ladders per Key and part: "" or the name of a range of blocks, and PROBE for what a gate compares.

    `order` falls when the cap would be passed; below 0 the store keeps nothing more.

    Attributes: peak: most bytes ever held. notes: what was given up, in words.
    """

    def __init__(self, order: int, basis: str, options: StoreOptions, probe_order: int = 0):
        self.order, self.probe_order, self.basis, self.options = order, probe_order, basis, options
        self.peak = 0
        self.notes: list[str] = []
        self._entries: dict[Key, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(ladder.nbytes for ladder in self._ladders())

    def has(self, key: Key, guard: tuple, part: str = "") -> bool:
        """Whether a forecast for this condition can be made; history of another size or dtype is dropped."""
        entry = self._entries.get(key)
        if entry is not None and entry.guard != guard:
            del self._entries[key]
            return False
        return entry is not None and part in entry.ladders

    def keep(
        self, key: Key, guard: tuple, features: Sequence[torch.Tensor], position: float, visit: int, owners: tuple = (), part: str = ""
    ) -> None:
        """A new anchor of each feature of one condition."""
        if self.order < 0:
            return
        for stale in [other for other, entry in self._entries.items() if visit - entry.seen > STALE_VISITS]:
            del self._entries[stale]
        self.has(key, guard)  # drops history of another size
        entry = self._entries.setdefault(key, _Entry(guard, visit, owners))
        if part not in entry.ladders:
            device = torch.device("cpu") if self.options.device == "cpu" else None
            order = self.probe_order if part == PROBE else self.order
            entry.ladders[part] = [Ladder(order, self.basis, self.options.dtype, device) for _ in features]
        ladders = entry.ladders[part]
        if not self._make_room(ladders, features):
            return
        for ladder, feature in zip(ladders, features):
            ladder.update(position, feature)
        entry.seen = visit
        self.peak = max(self.peak, self.nbytes)

    def forecast(
        self, key: Key, position: float, visit: int, device: torch.device, part: str = "", reach: float = 1.0
    ) -> list[torch.Tensor]:
        """Each feature of one condition in float32, in new memory; only after `has`. reach: share of the way from the latest anchor to
        `position` that the forecast goes."""
        entry = self._entries[key]
        entry.seen = visit
        found = []
        for ladder in entry.ladders[part]:
            place = position if reach == 1.0 else ladder.positions[0] + reach * (position - ladder.positions[0])
            found.append(ladder.predict(place, device))
        return found

    def last(self, key: Key, device: torch.device, part: str = "") -> list[torch.Tensor]:
        """The latest anchor of each feature in float32, in new memory; only after `has`."""
        return [ladder.factors[0].to(device, torch.float32, copy=True) for ladder in self._entries[key].ladders[part]]

    def drop(self, key: Key, part: str | None = None) -> None:
        """Forget a condition, or one part of it."""
        if part is None:
            self._entries.pop(key, None)
        elif key in self._entries:
            self._entries[key].ladders.pop(part, None)

    def clear(self) -> None:
        self._entries.clear()

    def _ladders(self) -> Iterator[Ladder]:
        return (ladder for entry in self._entries.values() for ladders in entry.ladders.values() for ladder in ladders)

    def _make_room(self, ladders: Sequence[Ladder], features: Sequence[torch.Tensor]) -> bool:
        """Lower the orders until the new tensors fit under the cap; False, and an empty store, where not even one value does."""
        cap = self.options.cap
        while cap and self.nbytes + sum(ladder.growth(feature) for ladder, feature in zip(ladders, features)) > cap:
            if self.probe_order > max(self.order, 0):
                self.probe_order -= 1
            else:
                self.order -= 1
                self.probe_order = min(self.probe_order, max(self.order, 0))
            if self.order < 0:
                self.clear()
                self.notes.append(f"off: one value a condition does not fit under the memory cap of {cap / 2**20:.3g} MiB")
                return False
            self.notes.append(f"order lowered to {self.order}: memory cap of {cap / 2**20:.3g} MiB")
            for entry in self._entries.values():
                for part, kept in entry.ladders.items():
                    for ladder in kept:
                        ladder.trim(min(ladder.order, self.probe_order if part == PROBE else self.order))
        return True
