"""Pictures with a hole, as inpainting nodes prepare them. Masks are 1 where something new is to be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["on_latent_grid", "grey_out_mask", "grow_mask"]


def on_latent_grid(pixels: Tensor, mask: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Resize the mask to the picture, then cut both, centred, to a multiple of `step` pixels.

    Args:
        pixels: (b, h, w, c). mask: (…, mh, mw).

    Returns:
        pixels (b, h', w', c), mask (n, 1, h', w').
    """
    import torch.nn.functional as F

    height, width = pixels.shape[1:3]
    mask = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=(height, width), mode="bilinear")
    rows, columns = (slice(size % step // 2, size % step // 2 + size // step * step) for size in (height, width))
    return pixels[:, rows, columns], mask[:, :, rows, columns]


def grey_out_mask(pixels: Tensor, mask: Tensor) -> Tensor:
    """A copy of pixels (b, h, w, c) whose colours are 0.5 where the rounded mask (n, 1, h, w) is 1."""
    pixels = pixels.clone()
    keep = (1.0 - mask.round()).movedim(1, -1)  # (n, h, w, 1)
    pixels[..., :3] = (pixels[..., :3] - 0.5) * keep + 0.5
    return pixels


def grow_mask(mask: Tensor, size: int) -> Tensor:
    """The rounded mask (n, 1, h, w) widened by a window of `size`×`size` pixels; even windows reach one pixel further down and right."""
    import torch.nn.functional as F

    grown = mask.round()
    for window in ((size, 1), (1, size)):
        grown = F.max_pool2d(grown, window, stride=1, padding=(window[0] // 2, window[1] // 2))
    return grown.clamp(0, 1)[:, :, : mask.shape[2], : mask.shape[3]]
