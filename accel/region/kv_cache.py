"""Keys and values of tokens that are left out, so that those computed attend to the whole picture.

"Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389, eq. 2:

    O_a = softmax(Q_a [K_a, K_i]ᵀ / √d) [V_a, V_i]

A dense visit stores the image rows of K and V of every attention, as the attention gets them (after QK norm and RoPE). A visit over part
of the tokens writes its rows and attends to all; text rows are the call's own. What we do differently: rows are kept a condition, not a
batch, so that joined and split conditions may alternate; heads that the model repeats are kept once; other dtypes and the CPU are
choices, and the size has a cap.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from ...errors import input_error
from ...kernels.token_gather import write_tokens
from .plan import KVOptions

__all__ = ["KVStore", "attend_all", "keep_rows"]

Layer = tuple[Any, int]  # the block, and which of its attentions


class KVStore:
    """K and V of one run: (condition, layer) → two tensors, each (b, h, n, d) or (b, n, h·d)."""

    def __init__(self, options: KVOptions, layers: int, where: str):
        self.options, self.layers, self.where = options, layers, where
        self.rows: dict[tuple[Hashable, Layer], tuple[torch.Tensor, torch.Tensor]] = {}
        self.nbytes = self.peak = 0

    def has(self, key: Hashable) -> bool:
        return sum(owner == key for owner, _ in self.rows) >= self.layers

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


def _image_rows(x: torch.Tensor, start: int, count: int, repeat: int) -> torch.Tensor:
    """Image rows along the axis before the last, repeated heads once."""
    rows = x.narrow(-2, start, count)
    return rows[:, ::repeat] if repeat > 1 and x.ndim == 4 else rows


def keep_rows(
    store: KVStore, keys: Sequence[Hashable], layer: Layer, k: torch.Tensor, v: torch.Tensor, start: int, count: int, repeat: int
) -> None:
    """Store rows start … start + count of a whole batch, one part a condition."""
    parts = [_image_rows(x, start, count, repeat).chunk(len(keys)) for x in (k, v)]
    for key, k_part, v_part in zip(keys, *parts):
        store.keep(key, layer, k_part, v_part, len(keys))


def attend_all(
    store: KVStore, keys: Sequence[Hashable], layer: Layer, index: torch.Tensor, start: int, count: int, repeat: int,
    k: torch.Tensor, v: torch.Tensor, attention: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Run attention(K, V) with all `count` image rows; the call's own a rows stand at start … start + a of k and v.

    index: (1 or rows of a condition, a), the same for every condition.
    """
    full = [_completed(store, keys, layer, place, x, index, start, count, repeat) for place, x in enumerate((k, v))]
    return attention(*full)


def _completed(
    store: KVStore, keys: Sequence[Hashable], layer: Layer, place: int, x: torch.Tensor, index: torch.Tensor,
    start: int, count: int, repeat: int,
) -> torch.Tensor:  # fmt: skip
    """Keys (place 0) or values (1) of all rows, those of this call in the cache and in the result."""
    active = index.shape[1]
    shape = list(x.shape)
    shape[-2] += count - active
    full = x.new_empty(shape)
    full.narrow(-2, 0, start).copy_(x.narrow(-2, 0, start))
    behind = x.shape[-2] - start - active
    full.narrow(-2, start + count, behind).copy_(x.narrow(-2, start + active, behind))
    image, own = full.narrow(-2, start, count), x.narrow(-2, start, active)
    axis = x.ndim - 2
    for key, target, rows in zip(keys, image.chunk(len(keys)), own.chunk(len(keys))):
        kept = store.rows[key, layer][place]
        update = _image_rows(rows, 0, active, repeat).detach().to(kept.device, kept.dtype)
        write_tokens(kept, index.to(kept.device), update, axis)
        old = kept.to(x.device, x.dtype)
        target.copy_(old.repeat_interleave(repeat, dim=1) if repeat > 1 and x.ndim == 4 else old)
        write_tokens(target, index, rows, axis)  # this call's rows as they are, whatever precision is kept
    return full
