"""What a run keeps: per condition the ladders of its features, under a cap, and nothing after the run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .forecast import Ladder

__all__ = ["FeatureStore", "Key", "StoreOptions"]

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
    ladders: list[Ladder]
    guard: tuple
    seen: int
    owners: tuple = field(default=())  # keeps the foreign patches alive whose identity is in the key


def guard_of(part: torch.Tensor) -> tuple:
    """What a condition's latent must share with the kept one: shape, dtype, device."""
    return tuple(part.shape), part.dtype, part.device


class FeatureStore:
    """Ladders per Key. `order` falls when the cap would be passed; below 0 the store keeps nothing more.

    Attributes: peak: most bytes ever held. notes: what was given up, in words.
    """

    def __init__(self, order: int, basis: str, options: StoreOptions):
        self.order, self.basis, self.options = order, basis, options
        self.peak = 0
        self.notes: list[str] = []
        self._entries: dict[Key, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(ladder.nbytes for entry in self._entries.values() for ladder in entry.ladders)

    def has(self, key: Key, guard: tuple) -> bool:
        """Whether a forecast for this condition can be made; history of another size or dtype is dropped."""
        entry = self._entries.get(key)
        if entry is not None and entry.guard != guard:
            del self._entries[key]
            return False
        return entry is not None

    def keep(self, key: Key, guard: tuple, parts: Sequence[torch.Tensor], position: float, visit: int, owners: tuple = ()) -> None:
        """A new anchor of each feature of one condition."""
        if self.order < 0:
            return
        for stale in [other for other, entry in self._entries.items() if visit - entry.seen > STALE_VISITS]:
            del self._entries[stale]
        device = torch.device("cpu") if self.options.device == "cpu" else None
        if not self.has(key, guard):
            ladders = [Ladder(self.order, self.basis, self.options.dtype, device) for _ in parts]
            self._entries[key] = _Entry(ladders, guard, visit, owners)
        entry = self._entries[key]
        if not self._make_room(entry, parts):
            return
        for ladder, part in zip(entry.ladders, parts):
            ladder.update(position, part)
        entry.seen = visit
        self.peak = max(self.peak, self.nbytes)

    def forecast(self, key: Key, position: float, visit: int, device: torch.device) -> list[torch.Tensor]:
        """Each feature of one condition in float32, in new memory; only after `has`."""
        entry = self._entries[key]
        entry.seen = visit
        return [ladder.predict(position, device) for ladder in entry.ladders]

    def drop(self, key: Key) -> None:
        self._entries.pop(key, None)

    def clear(self) -> None:
        self._entries.clear()

    def _make_room(self, entry: _Entry, parts: Sequence[torch.Tensor]) -> bool:
        """Lower the order until the new tensors fit under the cap; False, and an empty store, where not even one value does."""
        cap = self.options.cap
        while cap and self.nbytes + sum(ladder.growth(part) for ladder, part in zip(entry.ladders, parts)) > cap:
            self.order -= 1
            if self.order < 0:
                self.clear()
                self.notes.append(f"off: one value a condition does not fit under the memory cap of {cap / 2**20:.3g} MiB")
                return False
            self.notes.append(f"order lowered to {self.order}: memory cap of {cap / 2**20:.3g} MiB")
            for other in self._entries.values():
                for ladder in other.ladders:
                    ladder.trim(self.order)
        return True
