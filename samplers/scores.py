"""Scores that steering can raise: an IMAGE `(b, h, w, 3)` in 0…1 → one differentiable number a picture, larger is better.

Any callable of that form is a score; those that need a model on its device offer `prepared(load)` as well (costs.Score).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, interpolate, normalize

from ..errors import input_error
from .costs import gradable

__all__ = ["ClassScore", "ClipVisionScore", "ColourScore"]

SEEN_SIDE = 16  # pixels on a side of what a ClassScore without an encoder sees


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
        embed = _embedding(self.clip_vision, load)
        with torch.no_grad():
            wanted = embed(self.reference[:1].clone())
        return lambda image: cosine_similarity(embed(image), wanted, dim=-1).to(image.device)


@dataclass(frozen=True, eq=False)
class ClassScore:
    """log p(class | picture) of a nearest-mean classifier: p = softmax over classes of −d(picture, example)/temperature.

    d is 1 − cos of CLIP image embeddings, or without an encoder the mean squared distance of pictures of SEEN_SIDE² pixels. A last class,
    none of them, has d = `other` everywhere: without it the score of two classes is linear in the picture and grows for ever.

    Args:
        examples: IMAGE `(k, h, w, 3)`, one of each class. index: the wanted class, from 0. temperature: how much distance counts as doubt.

    Raises:
        NodeInputError: no class of that index.
    """

    examples: torch.Tensor
    index: int
    temperature: float = 0.01
    other: float = 0.02
    clip_vision: Any = None

    def __post_init__(self) -> None:
        count = len(self.examples)
        if not 0 <= self.index < count:
            raise input_error("Class Score", "wanted", self.index + 1, f"1 to {count}, the number of examples", "Choose one of them.")

    def prepared(self, load: Callable[[list], None]) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.clip_vision is None:
            see, scale = _small_pixels, 1 / (3 * SEEN_SIDE**2)
        else:
            embed, scale = _embedding(self.clip_vision, load), 1 / 2  # of unit vectors half the squared distance is 1 − cos

            def see(image):
                return normalize(embed(image), dim=-1)

        with torch.no_grad():
            means = see(self.examples.clone())  # (k, d)

        def score(image: torch.Tensor) -> torch.Tensor:
            seen = see(image)
            distance = (seen[:, None] - means.to(seen)[None]).square().sum(-1) * scale  # (b, k)
            none = distance.new_full((len(distance), 1), self.other)
            return (-torch.cat([distance, none], 1) / self.temperature).log_softmax(1)[:, self.index].to(image.device)

        return score


def _small_pixels(image: torch.Tensor) -> torch.Tensor:
    """IMAGE → `(b, 3·SEEN_SIDE²)`, each pixel the mean of its part."""
    return interpolate(image[..., :3].movedim(-1, 1), size=(SEEN_SIDE, SEEN_SIDE), mode="area").flatten(1)


def _embedding(clip_vision: Any, load: Callable[[list], None]) -> Callable[[torch.Tensor], torch.Tensor]:
    """IMAGE → embeddings `(b, d)` on the encoder's device, differentiable."""
    load([clip_vision.patcher])
    network = gradable(clip_vision.model)

    def embed(image: torch.Tensor) -> torch.Tensor:
        pixels = _encoder_pixels(clip_vision, image.to(clip_vision.load_device))
        return network(pixel_values=pixels, intermediate_output=-2)[2].float()

    return embed


def _encoder_pixels(clip_vision: Any, image: torch.Tensor) -> torch.Tensor:
    """IMAGE → normalised `(b, 3, size, size)`, the shorter side scaled to size, the middle kept."""
    size = clip_vision.image_size
    pixels = image[..., :3].movedim(-1, 1)
    ratio = size / min(pixels.shape[-2:])
    scaled = [max(size, round(side * ratio)) for side in pixels.shape[-2:]]
    pixels = interpolate(pixels, size=scaled, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    pixels = pixels[..., top : top + size, left : left + size]
    mean, deviation = (pixels.new_tensor(values).reshape(1, 3, 1, 1) for values in (clip_vision.image_mean, clip_vision.image_std))
    return ((pixels - mean) / deviation).float()
