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
from .twin_log import ROUNDS, SCALE_DTYPE, TINY, fit_groups, fit_rows, nearest
from .uniform import int8_rows

__all__ = ["LAYOUTS", "StoredWeight", "expected_tensors", "store"]

LAYOUTS = ("int8", "rows", "groups")
TOP = 127
CHUNK = 1 << 18  # weights that take new codes at a time: what stands between two steps stays in the cache
GAINS, HALVINGS = (0.25, 64.0), 14  # of a change, found to a two thousandth


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

    def requantised(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes of another weight (n, k) on these grids and scales, for sums with a LoRA, whose entries are mostly below half a step.

        Each row takes the nearest levels of ŵ + g·Δ, Δ = weight − ŵ, with the gain g where the change δ of ŵ is as long along Δ as Δ is,
        Σ δ·Δ = Σ Δ². So the largest entries move and small ones wait, and of all codes of that length these are the nearest to Δ: a move by
        a step d adds d·|Δ| to the length and d² to the noise. What is no change keeps its codes.
        """
        parts = [weight.float().split(rows := max(1, CHUNK // self.columns)), self.numbers().split(rows)]
        bounds = range(0, len(weight), rows)
        codes = torch.cat([self._rows(start, rows)._moved(new, base) for start, new, base in zip(bounds, *parts)])
        return self.as_kept(codes)

    def as_kept(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (n, k) as this layout keeps them: int8 as they are, others packed."""
        return codes if self.layout == "int8" else pack(codes, self.bits)

    def _rows(self, start: int, count: int) -> StoredWeight:
        def own(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start : start + count]

        book = self.book if self.layout == "groups" else own(self.book)
        return replace(self, codes=own(self.codes), scale=own(self.scale), book=book, group_scale=own(self.group_scale))

    def _moved(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Codes (n, k), not packed, of `requantised`; base: ŵ."""
        added = weight - base
        wanted = added.square().sum(1)
        least, most = (torch.full_like(wanted, gain) for gain in GAINS)
        for _ in range(HALVINGS):
            gain = (least * most).sqrt()
            along = ((self._nearest(base + gain[:, None] * added)[1] - base) * added).sum(1)
            least, most = torch.where(along < wanted, gain, least), torch.where(along < wanted, most, gain)
        found = [self._nearest(base + gain[:, None] * added) for gain in (least, most)]
        short, long = (((numbers - base) * added).sum(1) for _, numbers in found)
        return torch.where(((long - wanted) < (wanted - short))[:, None], found[1][0], found[0][0])

    def _nearest(self, weight: torch.Tensor, column: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, the numbers they stand for) nearest to a weight (n, k), or to one column of it, (n, 1)."""
        full = self.scale.clamp_min(TINY)
        if self.layout == "int8":
            codes = (weight / full).round().clamp(-TOP, TOP)
            return codes.to(torch.int8), codes * self.scale
        if self.group_scale is not None:
            group = self.columns // self.group_scale.shape[1]
            full = full * (
                self.group_scale.float().repeat_interleave(group, 1) if column is None
                else self.group_scale[:, column // group, None].float()
            )  # fmt: skip
        levels = self.book.float()
        codes = nearest(weight / torch.where(full == 0, torch.full_like(full, TINY), full), levels)
        return codes, (levels.gather(1, codes) if levels.ndim == 2 else levels[codes]) * full

    def nearest_in_column(self, values: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes (n,), not packed, the numbers they stand for) nearest to values (n,) of that column."""
        codes, numbers = self._nearest(values[:, None], column)
        return codes[:, 0], numbers[:, 0]

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
