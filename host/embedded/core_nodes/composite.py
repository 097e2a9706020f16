"""One tensor pasted onto another; pictures and latents are both (b, c, h, w) here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["paste"]


def paste(destination: Tensor, source: Tensor, x: int, y: int, mask: Tensor | None = None, resize_source: bool = False) -> Tensor:
    """A copy of `destination` with `mask · source + (1 − mask) · destination` at column `x`, row `y`; what lies outside is cut off.

    Args:
        destination: (b, c, h, w). source: (n, c, h2, w2), repeated to the batch of `destination`.
        mask: (…, mh, mw), stretched to `source`; None is all ones.
        resize_source: stretch `source` to `destination` first.
    """
    import torch.nn.functional as F

    from ..utils import repeat_to_batch_size

    source = source.to(destination.device)
    if resize_source:
        source = F.interpolate(source, size=destination.shape[-2:], mode="bilinear")
    source = repeat_to_batch_size(source, destination.shape[0])
    if mask is not None:
        mask = mask.to(destination.device).reshape(-1, 1, *mask.shape[-2:])
        mask = repeat_to_batch_size(F.interpolate(mask, size=source.shape[-2:], mode="bilinear"), source.shape[0])

    height, width = max(0, destination.shape[-2] - y), max(0, destination.shape[-1] - x)  # what is seen of the source
    pasted = destination.clone()
    target = pasted[..., y : y + source.shape[-2], x : x + source.shape[-1]]
    visible = source[..., :height, :width]
    if mask is None:
        target.copy_(visible)
    else:
        mask = mask[..., :height, :width]
        target.copy_(mask * visible + (1.0 - mask) * target)
    return pasted
