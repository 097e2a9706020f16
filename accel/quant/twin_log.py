"""Twin-log quantisation: few-bit weights on a grid that is logarithmic on each side of zero.

"LRQ-DiT: Log-Rotation Post-Training Quantization of Diffusion Transformers for Image and Video Generation", arXiv 2508.03485. Weights of a
trained layer are near zero with long tails; steps that grow with the magnitude serve both:

    level k of a sign = 2^(lo + s·(k + ½)) − η,   k = 0 … 2^(b−1) − 1
    lo = log2 η,   hi = log2(c·max|w| + η),   s = (hi − lo)/(2^(b−1) − ½)

so that level 0 lies near zero and the last one at c·max. η bends the grid: small is logarithmic, large is uniform.

What we do differently, all of it measured in docs/quantization.md:
- η and the clip c are found by search relative to the weights (their grid of η is absolute, so that the error depends on the layer's
  scale), for each sign from its own entries (their code fills the other sign's places with zeros, which fixes the top of the range);
- a weight takes the nearest level, in place of the rounded logarithm; the negative side has as many levels as fit the bits (theirs has one
  more); levels are rounded to the row's int8 grid, so that decoding is one look-up and the product is that of int8;
- `fit_groups`: one grid for the whole tensor and a scale in 8-bit float for each group of weights, at equal bits far below a grid a row.

`reference_quantised` is the published code's grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .uniform import clipped_range

__all__ = ["GroupCodes", "RowCodes", "fit_groups", "fit_rows", "nearest", "reference_quantised", "twin_levels"]

BENDS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # η over the mean magnitude
TOPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of a side of the shared grid
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # c
SCALE_TRIALS = tuple(sign * (0.75 + 0.05 * i) for sign in (1, -1) for i in range(10))  # of a group's own
ROUNDS = 3  # grid, scales, grid for these scales …; a fourth gains under 0.01 dB
REFERENCE_BENDS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SAMPLE = 1 << 14  # weights that tell the grid
CHUNK = 1 << 17  # weights whose scales are tried together on a CPU: half a MiB of float32, which stays in the second-level cache
REACH = 512  # half steps of int8 that the table of `_on_levels` has on each side: twice the largest level
INT8 = 127
SCALE_DTYPE = torch.float8_e4m3fn
TINY = 1e-12


def twin_levels(bend: torch.Tensor, top: torch.Tensor, count: int) -> torch.Tensor:
    """Levels of one sign, rising: bend η and top c·max of one shape (…) → (…, count)."""
    bend, top = bend.clamp_min(TINY), top.clamp_min(TINY)
    low, high = bend.log2(), (top + bend).log2()
    step = (high - low) / (count - 0.5)
    k = torch.arange(count, device=bend.device, dtype=bend.dtype) + 0.5
    return torch.exp2(low[..., None] + step[..., None] * k) - bend[..., None]


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the nearest level: values (n, k), levels (n, m) or (m,), rising → (n, k) int64."""
    between = (levels[..., 1:] + levels[..., :-1]) / 2
    if between.ndim == 1:
        return torch.searchsorted(between, values.contiguous())
    return torch.searchsorted(between.contiguous(), values.contiguous())


@dataclass(frozen=True)
class RowCodes:
    """A grid of its own for every row: codes (n, k) uint8; book (n, 2^bits) int8, rising; scale (n,) float32. ŵ = book[code]·scale."""

    codes: torch.Tensor
    book: torch.Tensor
    scale: torch.Tensor

    def dequantised(self) -> torch.Tensor:
        return self.book.float().gather(1, self.codes.long()) * self.scale[:, None]


@dataclass(frozen=True)
class GroupCodes:
    """One grid for the tensor: codes (n, k) uint8; book (2^bits,) int8; group_scale (n, k/group) 8-bit float; scale (n,) float32.

    ŵ = book[code]·group_scale·scale.
    """

    codes: torch.Tensor
    book: torch.Tensor
    group_scale: torch.Tensor
    scale: torch.Tensor

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.group_scale.shape[1]

    def dequantised(self) -> torch.Tensor:
        values = self.book.float()[self.codes.long()].unflatten(1, (-1, self.group))
        return (values * self.group_scale.float()[..., None]).flatten(1) * self.scale[:, None]


def _one_sign(magnitudes: torch.Tensor, present: torch.Tensor, count: int) -> torch.Tensor:
    """The best levels of one sign for every row, (n, count): magnitudes (n, k), of which only `present` ones count."""
    kept = magnitudes * present
    mean = kept.sum(1) / present.sum(1).clamp_min(1)
    top = kept.amax(1)
    best = twin_levels(mean, top, count)
    least = torch.full_like(mean, float("inf"))
    for bend in BENDS:
        for clip in CLIPS:
            levels = twin_levels(bend * mean, clip * top, count)
            error = ((levels.gather(1, nearest(magnitudes, levels)) - magnitudes).square() * present).sum(1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better[:, None], levels, best)
    return best


def _on_int8(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels (…, m) → (int8 levels, scale (…))."""
    scale = (levels.abs().amax(-1) / INT8).clamp_min(TINY)
    return (levels / scale[..., None]).round().to(torch.int8), scale


def fit_rows(weight: torch.Tensor, bits: int, uniform: bool = False) -> RowCodes:
    """weight (n, k) → a twin-log grid a row; `uniform`: equal steps between clipped ends, everything else alike."""
    w = weight.float()
    if uniform:
        low, step = clipped_range(w, bits)
        book, scale = _on_int8(low + step * torch.arange(1 << bits, device=w.device))
        return RowCodes(nearest(w / scale[:, None], book.float()).to(torch.uint8), book, scale)
    count = 1 << (bits - 1)
    positive = _one_sign(w.clamp_min(0), w > 0, count)
    negative = _one_sign((-w).clamp_min(0), w < 0, count)
    book, scale = _on_int8(torch.cat([-negative.flip(1), positive], 1))
    codes = nearest(w / scale[:, None], book.float())
    return RowCodes(codes.to(torch.uint8), book, scale)


def _largest(grouped: torch.Tensor) -> torch.Tensor:
    """The weight of the largest magnitude in each group, with its sign: (n, g, group) → (n, g)."""
    return grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2)


def _divisor(scales: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """scales (n, g) of rows (n,) as what weights are divided by, (n, g, 1): never zero."""
    full = scales.float() * row[:, None]
    return torch.where(full.abs() < TINY, torch.full_like(full, TINY), full)[..., None]


def _table(levels: torch.Tensor) -> torch.Tensor:
    """The nearest level at every half step of int8, for levels (m,) on its steps: borders between two levels are such halves."""
    halves = torch.arange(-REACH, REACH + 1, device=levels.device, dtype=torch.float32)
    steps = (levels * INT8).round()
    return levels[torch.searchsorted(steps[1:] + steps[:-1], halves, right=True)]


def _on_levels(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Nearest levels of values (…), by the table: a look-up in place of a search."""
    place = (values * (2 * INT8)).floor_().clamp_(-REACH, REACH).add_(REACH).int()
    return table.index_select(0, place.flatten()).view_as(values)


def _group_scales(grouped: torch.Tensor, levels: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The 8-bit scale of every group that leaves the least error: grouped (n, g, group), levels (m,) with 1 at their top, row (n,)."""
    own, table = (_largest(grouped) / row[:, None]).flatten(), _table(levels)
    found = torch.empty_like(own)
    at_once = max(1, CHUNK // grouped.shape[2]) if own.device.type == "cpu" else max(1, len(own))
    parts = (grouped.flatten(0, 1), own, row.repeat_interleave(grouped.shape[1]), found)
    for weights, largest, rows, into in zip(*[part.split(at_once) for part in parts]):
        into.copy_(largest)
        least = torch.full_like(largest, float("inf"))
        for trial in SCALE_TRIALS:
            scale = (largest * trial).to(SCALE_DTYPE).float()
            full = _divisor(scale[:, None], rows).flatten(1)
            normal = weights / full
            error = (_on_levels(normal, table).sub_(normal)).square_().sum(1) * full.flatten().square()
            better = error < least
            least = torch.where(better, error, least)
            into.copy_(torch.where(better, scale, into))
    return found.view(grouped.shape[:2]).to(SCALE_DTYPE)


def fit_groups(weight: torch.Tensor, bits: int, group: int, uniform: bool = False, rounds: int = ROUNDS) -> GroupCodes:
    """weight (n, k), k a multiple of `group` → one twin-log grid, its bend and clip found on the weights over their groups' scales.

    uniform: equal steps in place of the twin-log grid, everything else alike; what the grid is held against at equal bytes.
    rounds: 1 is enough to rank weights by the error they will have.

    Raises: ValueError for a group that does not divide the rows.
    """
    w = weight.float()
    if group < 1 or w.shape[1] % group:
        raise ValueError(f"groups of {group} do not divide rows of {w.shape[1]}")
    grouped = w.unflatten(1, (-1, group))
    row = w.abs().amax(1).clamp_min(TINY)
    levels = _equal_steps(bits).to(w) if uniform else _fitted_levels(grouped, row, bits, rounds)
    scales = _group_scales(grouped, levels, row)
    codes = nearest((grouped / _divisor(scales, row)).flatten(0, 1), levels).view_as(grouped).flatten(1)
    return GroupCodes(codes.to(torch.uint8), (levels * INT8).round().to(torch.int8), scales, row / INT8)


def _fitted_levels(grouped: torch.Tensor, row: torch.Tensor, bits: int, rounds: int) -> torch.Tensor:
    """The grid that fits a share of the groups, grid and scales in turn: grouped (n, g, group), row (n,) → (2^bits,)."""
    every = max(1, grouped.numel() // SAMPLE)
    some = grouped.flatten(0, 1)[::every, None]  # (groups, 1, group)
    rows = row.repeat_interleave(grouped.shape[1])[::every]
    full = _divisor(_largest(some), torch.ones_like(rows))
    levels = torch.zeros(0)
    for _ in range(rounds):
        levels = _shared_levels((some / full).flatten(0, 1), full.flatten(0, 1), bits)
        full = _divisor(_group_scales(some, levels, rows), rows)
    return levels


def _equal_steps(bits: int) -> torch.Tensor:
    """2^bits equal steps that end at 1, on the int8 grid; zero is a level."""
    half = 1 << (bits - 1)
    return (torch.arange(1 - half, half + 1, dtype=torch.float32) / half * INT8).round() / INT8


def _shared_levels(normal: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The grid for weights over their groups' scales, normal (groups, group) and scale (groups, 1), on int8 steps: (2^bits,), rising.

    Each side has its bend and its top: the group's largest weight is positive after division by its scale, so the other side is shorter.
    """
    weigh, mean, count = scale.square(), normal.abs().mean(), 1 << (bits - 1)
    below, above = (_side_levels((sign * normal).clamp_min(0), (sign * normal > 0) * weigh, mean, count) for sign in (-1, 1))
    return torch.cat([-below.flip(0), above])


def _side_levels(magnitudes: torch.Tensor, weigh: torch.Tensor, mean: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) levels of one sign, by the bend and the top of least weighted error."""

    def tried(bend: float, top: float) -> tuple[float, torch.Tensor]:
        levels = (twin_levels(bend * mean, torch.tensor(top, device=mean.device), count) * INT8).round() / INT8
        return float(((_on_levels(magnitudes, _table(levels)) - magnitudes).square() * weigh).sum()), levels

    top = TOPS[0]
    for _ in range(2):  # in turn: within 0.01 dB of all pairs
        bend = min(BENDS, key=lambda bend: tried(bend, top)[0])
        top = min(TOPS, key=lambda top: tried(bend, top)[0])
    return tried(bend, top)[1]


def reference_quantised(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """ŵ of the published code's grid: one absolute η for the tensor, a step a row and sign, logarithms rounded, one code more below zero.

    The range of a sign ends at 0, log2 of 1: places of the other sign are zeros there, and every logarithm of a trained weight is negative.
    So its search over percentiles of the top changes nothing, and is left out.
    """
    w = weight.float()
    best, least, half = w, float("inf"), 1 << (bits - 1)
    for bend in REFERENCE_BENDS:
        out = torch.zeros_like(w)
        for sign, top in ((1, half - 1), (-1, half)):
            side = sign * w > 0
            u = torch.where(side, (w.abs() + bend).log2(), torch.zeros_like(w))
            step = ((u.amax(1, keepdim=True) - u.amin(1, keepdim=True)) / half).clamp_min(TINY)
            zero = (u.amin(1, keepdim=True) / step).round()
            code = ((u / step).round() - zero).clamp(0, top)
            out = torch.where(side, sign * (torch.exp2(step * (code + zero)) - bend), out)
        error = float((out - w).square().sum())
        if error < least:
            least, best = error, out
    return best
