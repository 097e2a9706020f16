"""How image tokens lie on a latent: from maps of latent cells to values of tokens and back, for sides that a patch does not divide too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...errors import input_error

__all__ = ["TokenGrid"]


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of one picture or clip, row by row.

    shape: the latent's axes after batch and channels, (h, w) or (frames, h, w). patch: cells of a token along each.
    """

    shape: tuple[int, ...]
    patch: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], patch: Sequence[int], where: str) -> TokenGrid:
        """Raises: NodeInputError for a latent with fewer axes than the patch has."""
        if len(shape) < len(patch):
            remedy = "Use an empty latent node made for this model."
            raise input_error(where, "latent", f"axes {tuple(shape)}", f"a latent with {len(patch)} axes after its channels", remedy)
        return cls(tuple(shape), (1,) * (len(shape) - len(patch)) + tuple(patch))

    @property
    def sides(self) -> tuple[int, ...]:
        """Tokens along each axis; the host pads the latent to whole patches."""
        return tuple(-(-side // cells) for side, cells in zip(self.shape, self.patch))

    @property
    def count(self) -> int:
        return math.prod(self.sides)

    def pool(self, cells: torch.Tensor, how: str = "mean") -> torch.Tensor:
        """A map (b, *shape) → its mean, max or min over each token's own cells, (b, n); padding does not count."""
        pad = [0 for side, patch in zip(self.shape[::-1], self.patch[::-1]) for _ in (0, 1)]
        pad[1::2] = [(-side) % patch for side, patch in zip(self.shape[::-1], self.patch[::-1])]
        padded = F.pad(cells.float(), pad, value=math.nan)
        split = padded.reshape(cells.shape[0], *(size for pair in zip(self.sides, self.patch) for size in pair))
        order = [0, *range(1, split.ndim, 2), *range(2, split.ndim, 2)]
        values = split.permute(order).reshape(cells.shape[0], self.count, -1)  # (b, n, cells of a token)
        if how == "mean":
            return values.nanmean(dim=-1)
        fill = -math.inf if how == "max" else math.inf
        values = values.nan_to_num(nan=fill, posinf=math.inf, neginf=-math.inf)
        return values.amax(dim=-1) if how == "max" else values.amin(dim=-1)

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """Values of tokens (b, n) → a map (b, 1, *shape) in which a token's cells share its value."""
        grid = tokens.reshape(tokens.shape[0], *self.sides)
        for axis, patch in enumerate(self.patch, start=1):
            if patch > 1:
                grid = grid.repeat_interleave(patch, dim=axis)
        return grid[(slice(None), *(slice(side) for side in self.shape))].unsqueeze(1)

    def cells_of(self, side: int, where: str) -> tuple[int, ...]:
        """Sides of the grid of side × side squares of tokens in the last two axes.

        Raises: NodeInputError where the grid is not a multiple of the square.
        """
        rows, columns = self.sides[-2:]
        if side < 1 or rows % side or columns % side:
            allowed = f"1, or a number that divides both {rows} and {columns} (the tokens of this size)"
            raise input_error(where, "cell", side, allowed, "Set cell to 1 or choose another size.")
        return (*self.sides[:-2], rows // side, columns // side)

    def mean_of_cells(self, tokens: torch.Tensor, side: int) -> torch.Tensor:
        """Each token's value replaced by the mean of its square: (b, n) → (b, n)."""
        if side == 1:
            return tokens
        rows, columns = self.sides[-2:]
        squares = tokens.reshape(tokens.shape[0], -1, rows // side, side, columns // side, side)
        return squares.mean(dim=(3, 5), keepdim=True).expand_as(squares).reshape(tokens.shape)

    def from_mask(self, mask: torch.Tensor, batch: int, where: str, name: str) -> torch.Tensor:
        """A picture mask (h, w) or (1 or batch, h, w), 0 to 1, of any size with the latent's aspect, as a map (1 or batch, *shape).

        Raises: NodeInputError for a mask of another aspect, count or number of axes.
        """
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.ndim != 3 or mask.shape[0] not in (1, batch):
            allowed = f"one mask, or {batch} for this batch"
            raise input_error(where, name, f"a mask of shape {tuple(mask.shape)}", allowed, "Link a MASK as Load Image gives it.")
        height, width = self.shape[-2:]
        scale = max(mask.shape[-2] / height, mask.shape[-1] / width)
        off = (abs(mask.shape[-2] / scale - height), abs(mask.shape[-1] / scale - width))
        if max(off) > max(self.patch[-2:]):
            allowed = f"a mask with the aspect of the latent, {width}:{height}"
            raise input_error(where, name, f"{mask.shape[-1]}×{mask.shape[-2]}", allowed, "Resize or crop the mask to the picture.")
        cells = F.interpolate(mask[:, None].float(), size=(height, width), mode="area")[:, 0]
        return cells.reshape(cells.shape[0], *(1,) * (len(self.shape) - 2), height, width).expand(-1, *self.shape)
