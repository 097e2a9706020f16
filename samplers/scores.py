"""Scores that steering can raise: an IMAGE `(b, h, w, 3)` in 0…1 → one differentiable number a picture, larger is better.

Any callable of that form is a score; those that need a model on its device offer `prepared(load)` as well (costs.Score).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, interpolate

from .costs import gradable

__all__ = ["ClipVisionScore", "ColourScore"]


@dataclass(frozen=True, eq=False)
class ColourScore:
    """Minus the squared distance of the mean colour to `colour` (r, g, b in 0…1), inside `mask` `(1, h, w)` where one is given."""

    colour: tuple[float, float, float]
    mask: torch.Tensor | None = None

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        share = torch.ones_like(image[..., :1])
        if self.mask is not None:
            mask = self.mask.reshape(-1, 1, *self.mask.shape[-2:])[:1].to(image).clone()
            share = interpolate(mask, size=image.shape[1:3], mode="area").movedim(1, -1)
        mean = (image[..., :3] * share).sum((1, 2)) / share.sum((1, 2)).clamp_min(1e-6)  # (b, 3)
        return -((mean - image.new_tensor(self.colour)) ** 2).sum(1)


@dataclass(frozen=True, eq=False)
class ClipVisionScore:
    """Cosine between the CLIP image embeddings of the picture and of `reference`, an IMAGE `(1, h, w, 3)`.

    The host's own preparation rounds pixels to 8 bits, which has no gradient; ours resizes and normalises in the same way without rounding.
    """

    clip_vision: Any
    reference: torch.Tensor

    def prepared(self, load: Callable[[list], None]) -> Callable[[torch.Tensor], torch.Tensor]:
        load([self.clip_vision.patcher])
        network = gradable(self.clip_vision.model)

        def embed(image: torch.Tensor) -> torch.Tensor:
            pixels = self._pixels(image.to(self.clip_vision.load_device))
            return network(pixel_values=pixels, intermediate_output=-2)[2].float()  # (b, d)

        with torch.no_grad():
            wanted = embed(self.reference[:1].clone())
        return lambda image: cosine_similarity(embed(image), wanted, dim=-1).to(image.device)

    def _pixels(self, image: torch.Tensor) -> torch.Tensor:
        """IMAGE → normalised `(b, 3, size, size)`, the shorter side scaled to size, the middle kept."""
        size = self.clip_vision.image_size
        pixels = image[..., :3].movedim(-1, 1)
        ratio = size / min(pixels.shape[-2:])
        scaled = [max(size, round(side * ratio)) for side in pixels.shape[-2:]]
        pixels = interpolate(pixels, size=scaled, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
        pixels = pixels[..., top : top + size, left : left + size]
        statistics = (self.clip_vision.image_mean, self.clip_vision.image_std)
        mean, deviation = (pixels.new_tensor(values).reshape(1, 3, 1, 1) for values in statistics)
        return ((pixels - mean) / deviation).float()
