"""Coarse regions as one token each: which tokens of a grid become one, how they are merged and how they come back.

D²iT (Jia et al., arXiv 2504.09454) codes flat regions on a grid of a half of the sides and rich ones on the whole grid. Its trained
transformers draw codes of both kinds; a pretrained model can be given them inside its blocks. With a coarse cell c of g × g tokens x_i:

    merge     z_c = mean of x_i                       or x_i of the cell's middle
    place     rotation of the cell's centre           or of its first token
    weigh     log g² is added to the scores of z_c as a key: it stands for g² keys
    put back  x_i ← x_i + (z_c′ − z_c)                `delta`: what the blocks added, to every token of the cell
              x_i ← z_c′                              `copy`: D²iT's neighbour copying

The centre of g × g places is the middle of the (up to four) tokens around it: the sum of their rotations, brought back to length 1, turns
by just that angle. Text, fine tokens and tokens of reference pictures stay as they are. What we do differently: only whole cells are
merged, tokens at an edge that g does not divide stay fine, and in a batch every picture has as many coarse cells as the one with fewest,
those with the least detail, so that all have one number of tokens. The cells of a clip are the same in every frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ...kernels.token_gather import gather_tokens, write_tokens
from .grid import TokenGrid

__all__ = ["BLOCK", "MERGES", "POSITIONS", "SIDES", "UNMERGES", "GrainCells", "Joint", "grain_cells"]

BLOCK = "rectiflow_grain_block"  # in the options of a block whose image tokens are merged
MERGES, UNMERGES, POSITIONS = ("mean", "centre"), ("delta", "copy"), ("centre", "first")
SIDES = (2, 8)


@dataclass(frozen=True)
class GrainCells:
    """The cells of one picture, or of each of a batch. Merged tokens stand as fine ones in their order, then cells in theirs.

    sides: tokens of the grid ((frames,) rows, columns). side: g. fine: (1 or b, f), coarse: (1 or b, c, g²) numbers of tokens in a frame.
    """

    sides: tuple[int, ...]
    side: int
    fine: torch.Tensor
    coarse: torch.Tensor

    @property
    def frames(self) -> int:
        return math.prod(self.sides[:-2])

    @property
    def count(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.sides)

    @property
    def merged(self) -> int:
        """Tokens after merging: fine ones and one a cell, in all frames."""
        return self.frames * (self.fine.shape[1] + self.coarse.shape[1])

    @property
    def middle(self) -> list[int]:
        """Which of a cell's g² tokens are around its centre: one for odd g, four for even."""
        near = (self.side // 2,) if self.side % 2 else (self.side // 2 - 1, self.side // 2)
        return [row * self.side + column for row in near for column in near]

    def to(self, device: torch.device) -> GrainCells:
        return replace(self, fine=self.fine.to(device), coarse=self.coarse.to(device))

    def _of(self, index: torch.Tensor, samples: int) -> torch.Tensor:
        """A row a frame of each of `samples`, conditions one after the other; one row where all are the same."""
        if len(index) == 1:
            return index
        return index.repeat(samples // len(index), *(1,) * (index.ndim - 1)).repeat_interleave(self.frames, dim=0)

    def merge(self, x: torch.Tensor, how: str = "mean") -> torch.Tensor:
        """(b, tokens of the grid, d) → (b, merged, d), a tensor of its own."""
        frames = x.reshape(len(x) * self.frames, -1, x.shape[-1])
        cells = gather_tokens(frames, self._of(self.coarse, len(x)).flatten(1)).unflatten(1, (-1, self.side**2))
        if how == "mean":  # of what differs from the first: equal tokens give themselves to the bit
            one = cells[:, :, 0] + (cells - cells[:, :, :1]).mean(dim=2)
        else:
            one = cells[:, :, self.middle[-1]]
        return torch.cat((gather_tokens(frames, self._of(self.fine, len(x))), one), dim=1).reshape(len(x), self.merged, -1)

    def put_back(self, new: torch.Tensor, old: torch.Tensor, before: torch.Tensor, how: str = "delta") -> torch.Tensor:
        """new, old (b, merged, d): tokens behind and in front of the blocks; before (b, tokens of the grid, d): what was merged."""
        samples, frames = len(new), len(new) * self.frames
        fine, coarse = self._of(self.fine, samples), self._of(self.coarse, samples).flatten(1)
        out = before.reshape(frames, -1, before.shape[-1]).clone()
        new, old = (x.reshape(frames, -1, x.shape[-1]) for x in (new, old))
        first = self.fine.shape[1]
        if how == "copy":
            cells = new[:, first:, None].expand(-1, -1, self.side**2, -1)
        else:
            cells = gather_tokens(out, coarse).unflatten(1, (-1, self.side**2)) + (new[:, first:] - old[:, first:])[:, :, None]
        write_tokens(out, fine, new[:, :first])
        return write_tokens(out, coarse, cells.flatten(1, 2)).reshape(before.shape)

    def joint(self, text: int, extra: int, samples: int, device: torch.device) -> Joint:
        """The same for sequences of `text` tokens in front of the image and `extra` ones behind it."""
        here = self.to(device)
        fine, coarse = (x if len(x) == 1 else x.repeat(samples // len(x), *(1,) * (x.ndim - 1)) for x in (here.fine, here.coarse))
        rows, size = len(fine), math.prod(self.sides[-2:])
        at = text + size * torch.arange(self.frames, device=device)[None, :, None]
        cells = (at[..., None] + coarse[:, None]).flatten(1, 2)  # (1 or b, frames · c, g²)
        firsts = torch.cat((at + fine[:, None], at + coarse[:, None, :, 0]), dim=2).flatten(1)
        before = torch.arange(text, device=device).expand(rows, -1)
        behind = text + self.count + torch.arange(extra, device=device).expand(rows, -1)
        places = torch.arange(self.merged, device=device).view(self.frames, -1)[:, self.fine.shape[1] :].flatten()
        return Joint(text + self.count + extra, torch.cat((before, firsts, behind), dim=1), cells, text + places, self.middle)


@dataclass(frozen=True)
class Joint:
    """Rows of a sequence of `total` tokens, text and reference pictures among them, after merging.

    first: (1 or b, m) its rows, a cell by its first token. cells: (1 or b, cells, g²) rows of each cell; places: (cells) where they stand.
    """

    total: int
    first: torch.Tensor
    cells: torch.Tensor
    places: torch.Tensor
    middle: list[int]

    def _along(self, x: torch.Tensor, axis: int, chosen: torch.Tensor, reduce) -> torch.Tensor:
        """Rows along `axis`; those of cells from their `chosen` tokens (1 or b, cells, k) by `reduce` over one axis."""
        rows = gather_tokens(x, self.first, axis)
        parts = gather_tokens(x, chosen.flatten(1), axis).unflatten(axis, (-1, chosen.shape[-1]))
        return write_tokens(rows, self.places[None], reduce(parts, axis + 1), axis)

    def rotations(self, pe: torch.Tensor, axis: int, position: str) -> torch.Tensor:
        """Rotations (…, n, …, 2, 2) of the merged tokens; `axis` is that of the tokens."""
        turned = pe.stride(-1) > pe.stride(-2)  # matrices lie in memory as they were written; transposed ones would slow every layer
        source = pe.transpose(-1, -2) if turned else pe
        shared = source[:1] if len(source) > 1 and source.stride(0) == 0 and len(self.first) == 1 else source
        if position == "first":
            rows = gather_tokens(shared, self.first, axis)
        else:
            rows = self._along(shared, axis, self.cells[..., self.middle], _middle_rotation)
        return rows.transpose(-1, -2) if turned else rows

    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask over queries and keys, or over keys alone. A cell is seen, or sees, where one of its tokens is or does; of added masks
        keys take the log of the mean weight, queries the mean."""
        seen = mask.dtype == torch.bool
        rows = mask[None] if mask.ndim == 2 else mask
        if rows.shape[-2] == self.total:
            rows = self._along(rows, rows.ndim - 2, self.cells, torch.any if seen else torch.mean)
        if rows.shape[-1] == self.total:
            rows = self._along(rows, rows.ndim - 1, self.cells, torch.any if seen else _log_mean)
        return rows[0] if mask.ndim == 2 and len(rows) == 1 else rows

    def log_weights(self, like: torch.Tensor, start: int = 0) -> torch.Tensor:
        """log g² at cells, 0 elsewhere, of the rows from `start` on: (m − start)."""
        weights = like.new_zeros(self.first.shape[1] - start)
        weights[self.places - start] = math.log(self.cells.shape[-1])
        return weights


def _middle_rotation(parts: torch.Tensor, dim: int) -> torch.Tensor:
    mean = parts.mean(dim=dim)
    return mean / (mean[..., 0, 0] * mean[..., 1, 1] - mean[..., 0, 1] * mean[..., 1, 0]).sqrt()[..., None, None]


def _log_mean(parts: torch.Tensor, dim: int) -> torch.Tensor:
    return parts.float().exp().mean(dim=dim).log().to(parts.dtype)


def grain_cells(fine: torch.Tensor, grid: TokenGrid, side: int) -> GrainCells:
    """Cells of `side` × `side` tokens. fine: (1 or b, n) how fine each token of the grid is, 0 to 1; a cell is coarse below a mean of 0.5.

    A clip takes the map of its first frame.
    """
    rows, columns = grid.sides[-2:]
    down, across = rows // side, columns // side
    maps = fine[:, : rows * columns].reshape(-1, rows, columns)
    means = maps[:, : down * side, : across * side].reshape(-1, down, side, across, side).mean(dim=(2, 4)).flatten(1)
    count = int((means < 0.5).sum(dim=1).min())
    chosen = means.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values  # (b, c) numbers of cells
    inside = torch.arange(side)
    first = chosen // max(across, 1) * side * columns + chosen % max(across, 1) * side
    coarse = first[..., None] + (inside[:, None] * columns + inside).flatten()
    stays = torch.ones(len(maps), rows * columns, dtype=torch.bool).scatter_(1, coarse.flatten(1), False)
    return GrainCells(grid.sides, side, stays.nonzero()[:, 1].reshape(len(maps), -1), coarse)
