"""Where a family turns token places into rotations, and how many latent cells a token covers.

Facts of ComfyUI 0.3.64: Flux, Chroma, HunyuanVideo, Qwen-Image and HiDream keep an embedder as `pe_embedder`, Lumina 2 and Wan as
`rope_embedder`. It takes ids (b, n, axes) alone, has `axes_dim` and `theta`, and answers (b, 1, n, d/2, 2, 2), HiDream's (b, n, 1, …),
pairs in the order of the axes: time or text, row, column. SD3's positions are added vectors, and others compute rotations inside their
blocks: nothing can be put in their place.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..errors import input_error

__all__ = ["RotarySpec", "rotary_spec"]

SUPPORTED = "a model with rotary positions of rows and columns, such as Flux, Chroma, Lumina 2, Wan, HunyuanVideo, Qwen-Image and HiDream"
_NAMES = ("pe_embedder", "rope_embedder")


@dataclass(frozen=True)
class RotarySpec:
    """name: the embedder's attribute. axes: channels of each position axis, the last two rows and columns. patch: latent cells a token."""

    name: str
    axes: tuple[int, ...]
    theta: float
    patch: tuple[int, int]


def rotary_spec(transformer: Any, where: str) -> RotarySpec:
    """The spec of `transformer` (a model's `diffusion_model`).

    Raises: NodeInputError for a family without an embedder that can be exchanged, by name.
    """
    for name in _NAMES:
        embedder = getattr(transformer, name, None)
        if embedder is not None and _takes_ids(embedder):
            size = transformer.patch_size
            patch = (size, size) if isinstance(size, int) else tuple(size)[-2:]
            return RotarySpec(name, tuple(embedder.axes_dim), float(embedder.theta), patch)
    remedy = "Use one of these; for others make the picture at the training size and enlarge it."
    raise input_error(where, "model", type(transformer).__name__, SUPPORTED, remedy)


def _takes_ids(embedder: Any) -> bool:
    axes = getattr(embedder, "axes_dim", None)
    if not isinstance(axes, (list, tuple)) or len(axes) != 3 or not hasattr(embedder, "theta"):
        return False
    return len(inspect.signature(embedder.forward).parameters) == 1
