"""Keys and values of tokens that are left out, so that those computed attend to the whole picture.

"Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389, eq. 2:

    O_a = softmax(Q_a [K_a, K_i]ᵀ / √d) [V_a, V_i]

A dense visit stores the image rows of K and V of every attention, as the attention gets them (after QK norm and RoPE). A visit over part
of the tokens writes its rows and attends to all; text rows are the call's own. What we do differently: rows are kept a condition, not a
batch, so that joined and split conditions may alternate; heads that the model repeats are kept once; other dtypes and the CPU are
choices, and the size has a cap.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import input_error
from ...kernels.token_gather import write_tokens
from .plan import KVOptions

__all__ = ["KVStore", "RowPlan", "all_rows", "keep_rows"]

Layer = tuple[Any, int]  # the block, and which of its attentions


class KVStore:
    """K and V of one run: (condition, layer) → two tensors, each (b, h, n, d), (b, n, h, d) or (b, n, h·d)."""

    def __init__(self, options: KVOptions, layers: int, where: str):
        self.options, self.layers, self.where = options, layers, where
        self.rows: dict[tuple[Hashable, Layer], tuple[torch.Tensor, torch.Tensor]] = {}
        self.nbytes = self.peak = 0

    def count(self, key: Hashable) -> int:
        """Attentions whose rows are held."""
        return sum(owner == key for owner, _ in self.rows)

    def has(self, key: Hashable) -> bool:
        return self.count(key) >= self.layers

    def expect(self, layers: int) -> None:
        """A whole call reached only so many attentions: blocks were left out of the model."""
        self.layers = layers

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """x as it is kept: a tensor of its own."""
        device = torch.device("cpu") if self.options.device == "cpu" else x.device
        return x.detach().to(device, self.options.dtype or x.dtype, copy=True, memory_format=torch.contiguous_format)

    def keep(self, key: Hashable, layer: Layer, k: torch.Tensor, v: torch.Tensor, conditions: int) -> None:
        """Store copies of the image rows of one condition.

        Raises: NodeInputError before anything above the cap is taken; the size it names is of all layers of this call's conditions.
        """
        size = 2 * k.numel() * (self.options.dtype or k.dtype).itemsize
        old = self.rows.get((key, layer))
        grown = self.nbytes + size - (0 if old is None else old[0].nbytes + old[1].nbytes)
        needed = max(size * self.layers * conditions, grown)
        if self.options.cap and needed > self.options.cap:
            mib = f"{needed / 2**20:.1f} MiB of keys and values"
            remedy = "Raise max_mib, set kv_dtype to fp8_e4m3, kv_device to cpu, or kv_cache to none."
            raise input_error(self.where, "max_mib", mib, f"up to {self.options.cap >> 20} MiB", remedy)
        self.rows[key, layer] = (self.stored(k), self.stored(v))
        self.nbytes = grown
        self.peak = max(self.peak, grown)

    def drop(self) -> None:
        self.rows.clear()
        self.nbytes = 0


@dataclass(frozen=True)
class RowPlan:
    """Where image tokens stand in K and V: `count` rows from `start` on along `axis`, 1 as (b, n, …), 2 as (b, h, n, d).

    repeat: equal heads that come one after the other (axis 2), of which one is kept.
    """

    axis: int
    start: int
    count: int
    repeat: int = 1

    def rows(self, x: torch.Tensor, start: int, count: int) -> torch.Tensor:
        rows = x.narrow(self.axis, start, count)
        return rows[:, :: self.repeat] if self.repeat > 1 and self.axis == 2 else rows

    def all_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(self.repeat, dim=1) if self.repeat > 1 and self.axis == 2 else x


def keep_rows(store: KVStore, keys: Sequence[Hashable], layer: Layer, plan: RowPlan, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store the image rows of a whole batch, one part a condition."""
    parts = [plan.rows(x, plan.start, plan.count).chunk(len(keys)) for x in (k, v)]
    for key, k_part, v_part in zip(keys, *parts):
        store.keep(key, layer, k_part, v_part, len(keys))


def all_rows(
    store: KVStore, keys: Sequence[Hashable], layer: Layer, plan: RowPlan, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V with all image rows, from those of a call whose a computed rows stand at plan.start; they are written into the store.

    index: (1 or rows of a condition, a), the same for every condition.
    """
    axis, start, count, active = plan.axis, plan.start, plan.count, index.shape[1]
    full = tuple(_around(x, plan, active) for x in (k, v))
    images = [x.narrow(axis, start, count).chunk(len(keys)) for x in full]
    own = [x.narrow(axis, start, active).chunk(len(keys)) for x in (k, v)]
    for place, key in enumerate(keys):
        kept, rows = store.rows[key, layer], tuple(part[place] for part in own)
        update = tuple(plan.rows(x, 0, active).detach().to(old.device, old.dtype) for x, old in zip(rows, kept))
        write_tokens(kept, index.to(kept[0].device), update, axis)
        targets = tuple(part[place] for part in images)
        for target, old in zip(targets, kept):
            target.copy_(plan.all_heads(old.to(target.device, target.dtype)))
        if kept[0].dtype != k.dtype or k.requires_grad or v.requires_grad:
            write_tokens(targets, index, rows, axis)  # this call's rows as they are, whatever precision is kept
    return full


def _around(x: torch.Tensor, plan: RowPlan, active: int) -> torch.Tensor:
    """A tensor with all rows, those that are no image rows filled from x with its `active` ones."""
    shape = list(x.shape)
    shape[plan.axis] += plan.count - active
    full = x.new_empty(shape)
    full.narrow(plan.axis, 0, plan.start).copy_(x.narrow(plan.axis, 0, plan.start))
    behind = x.shape[plan.axis] - plan.start - active
    full.narrow(plan.axis, plan.start + plan.count, behind).copy_(x.narrow(plan.axis, plan.start + active, behind))
    return full
