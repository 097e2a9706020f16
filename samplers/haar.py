"""One level of the orthonormal Haar transform over the last two axes: a latent as four bands of half its sides, and back.

Of each square of 2×2 cells, a b above c d:
    LL = (a + b + c + d)/2      what the square is as a whole
    LH = (a + b − c − d)/2      what changes downwards
    HL = (a − b + c − d)/2      what changes to the right
    HH = (a − b − c + d)/2      what changes along the diagonals
The 4×4 matrix is symmetric and its own inverse, so the same sums lead back and the squares of the bands add up to those of the latent.
A latent with an odd side is refused: any padding makes more numbers than there were, and the transform is no longer orthonormal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import input_error

__all__ = ["BANDS", "haar_merge", "haar_split"]

BANDS = ("LL", "LH", "HL", "HH")


def haar_split(latent: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LL, LH, HL, HH `(…, h/2, w/2)` of a latent `(…, h, w)`.

    Raises: NodeInputError in the name of `where` for sides that are odd, or no sides at all.
    """
    if latent.ndim < 3 or latent.shape[-1] % 2 or latent.shape[-2] % 2:
        remedy = "Use a picture whose sides are even in latent cells, such as multiples of 16 pixels behind a VAE of 8."
        raise input_error(where, "latent", tuple(latent.shape), "two last axes of even length", remedy)
    a, b = latent[..., 0::2, 0::2], latent[..., 0::2, 1::2]
    c, d = latent[..., 1::2, 0::2], latent[..., 1::2, 1::2]
    return _sums(a, b, c, d)


def haar_merge(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor, where: str) -> Tensor:
    """The latent `(…, h, w)` of four bands `(…, h/2, w/2)`; a batch of one serves for any.

    Raises: NodeInputError in the name of `where` for bands of different shapes, naming the first that differs.
    """
    bands = (ll, lh, hl, hh)
    batch = max(band.shape[0] for band in bands)
    for name, band in zip(BANDS, bands, strict=True):
        if band.shape[1:] != ll.shape[1:] or band.shape[0] not in (1, batch):
            allowed = f"{(batch, *ll.shape[1:])} as LL has it, or a batch of 1"
            raise input_error(where, name, tuple(band.shape), allowed, "Link bands of latents of one size.")
    a, b, c, d = _sums(*torch.broadcast_tensors(*bands))
    above, below = (torch.stack(pair, dim=-1).flatten(-2) for pair in ((a, b), (c, d)))  # (…, h/2, w)
    return torch.stack((above, below), dim=-2).flatten(-3, -2)


def _sums(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top, bottom, left, right = a + b, c + d, a - b, c - d
    return 0.5 * (top + bottom), 0.5 * (top - bottom), 0.5 * (left + right), 0.5 * (left - right)
