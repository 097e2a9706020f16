"""A weight as it is kept: codes, and what turns them into numbers. Three layouts.

    int8     codes (n, k) int8, scale (n, 1)                                                       ŵ = code·scale
    rows     packed codes, a grid a row (n, 2^b) int8, scale (n, 1)                                 ŵ = book[code]·scale
    groups   packed codes, one grid (2^b,) int8, 8-bit scales (n, k/group), scale (n, 1)            ŵ = book[code]·group_scale·scale

`int8` is the core's int8_tensorwise tensor by tensor. In the other two a code is looked up as an int8 number, so that the product is that
of 8-bit integers in all three.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...kernels.tlq_decode import tlq_decode
from .packing import pack, packed_width
from .twin_log import ROUNDS, SCALE_DTYPE, TINY, fit_groups, fit_rows
from .uniform import int8_rows

__all__ = ["LAYOUTS", "StoredWeight", "expected_tensors", "store"]

LAYOUTS = ("int8", "rows", "groups")
TOP = 127


@dataclass(frozen=True)
class StoredWeight:
    """layout, bits of a code, columns k; codes and scale always, book and group_scale as the layout has them."""

    layout: str
    bits: int
    columns: int
    codes: torch.Tensor
    scale: torch.Tensor
    book: torch.Tensor | None = None
    group_scale: torch.Tensor | None = None

    def numbers(self) -> torch.Tensor:
        """ŵ (n, k) float32."""
        return self.codes.float() * self.scale if self.layout == "int8" else self._decoded(torch.float32)[0]

    def as_int8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes (n, k) int8, scale (n,)) for the integer product. Exact for int8 and rows; groups are rounded once more, to 8 bits of the
        row's largest: 42 dB below the weights where 4 bits are 22 below."""
        codes, scale = (self.codes, self.scale) if self.layout == "int8" else self._decoded(torch.int8)
        return codes, scale.flatten()

    def _decoded(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return tlq_decode(self.codes, self.book, self.bits, self.columns, self.scale, self.group_scale, dtype)

    def requantised(self, weight: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        """Codes of another weight (n, k) on these grids and scales: the nearest ones, or with a seed rounded up or down by chance so that
        the mean is the weight. What lies on a level keeps it."""
        chance = None
        if seed is not None:
            chance = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
        w = weight.float() / self.scale.clamp_min(TINY)
        if self.layout == "int8":
            low = w.floor()
            return (w.round() if chance is None else low + (chance < w - low)).clamp(-TOP, TOP).to(torch.int8)
        if self.layout == "groups":
            full = self.group_scale.float()
            full = torch.where(full == 0, torch.full_like(full, TINY), full)
            w = (w.unflatten(1, (full.shape[1], -1)) / full[..., None]).flatten(1)
        levels = self.book.float()
        below = torch.searchsorted(levels, w.contiguous(), right=True).sub_(1).clamp_(0, levels.shape[-1] - 2)
        low, high = ((levels.gather(1, i) if levels.ndim == 2 else levels[i]) for i in (below, below + 1))
        share = ((w - low) / (high - low).clamp_min(1)).clamp(0, 1)
        return pack(below + (share > (0.5 if chance is None else chance)), self.bits)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of a file, behind the layer's name."""
        named = {"weight": self.codes, "weight_scale": self.scale, "tlq_codebook": self.book, "weight_s_rel": self.group_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_codes(self, codes: torch.Tensor) -> StoredWeight:
        return replace(self, codes=codes)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def expected_tensors(layout: str, bits: int, rows: int, columns: int, group: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name → (dtype, shape) of what a layer of `rows` outputs and `columns` inputs is stored as."""
    scale = {"weight_scale": (torch.float32, (rows, 1))}
    if layout == "int8":
        return {"weight": (torch.int8, (rows, columns)), **scale}
    levels = (rows, 1 << bits) if layout == "rows" else (1 << bits,)
    found = {"weight": (torch.uint8, (rows, packed_width(columns, bits))), **scale, "tlq_codebook": (torch.int8, levels)}
    if layout == "groups":
        found["weight_s_rel"] = (SCALE_DTYPE, (rows, columns // group))
    return found


def store(weight: torch.Tensor, bits: int, group: int, method: str, rounds: int = ROUNDS) -> StoredWeight:
    """weight (n, k) → its codes. 8 bits: int8 a row. Fewer: `method` tlq or uniform, a grid a row for group 0, else scales a group.

    Raises: ValueError for a group that does not divide the rows.
    """
    columns = weight.shape[1]
    if bits == 8:
        codes, scale = int8_rows(weight)
        return StoredWeight("int8", 8, columns, codes, scale[:, None].contiguous())
    uniform = method == "uniform"
    if group:
        found = fit_groups(weight, bits, group, uniform, rounds)
        codes, scale = pack(found.codes, bits), found.scale[:, None].contiguous()
        return StoredWeight("groups", bits, columns, codes, scale, found.book, found.group_scale)
    rows = fit_rows(weight, bits, uniform)
    return StoredWeight("rows", bits, columns, pack(rows.codes, bits), rows.scale[:, None].contiguous(), rows.book)
