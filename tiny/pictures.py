"""The example pictures that ship: real 64×64 pictures that the tiny model was not trained on (sources: docs/tiny.md)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PICTURES", "load_picture"]

FOLDER = Path(__file__).with_name("pictures")
# Name on the node → file, and the box (left, top, right, bottom) that the inpainting example repaints.
PICTURES = {
    "smiling cat": ("smiling_cat.png", (12, 20, 52, 40)),
    "smiling face": ("smiling_face.png", (4, 12, 60, 36)),
}


def load_picture(name: str) -> tuple[Tensor, Tensor]:
    """The picture on white and its mask.

    Returns:
        IMAGE (1, 64, 64, 3) in 0…1 and MASK (1, 64, 64), 1 inside the box.
    """
    import numpy
    from PIL import Image

    file, (left, top, right, bottom) = PICTURES[name]
    with Image.open(FOLDER / file) as picture:
        rgba = picture.convert("RGBA")
    paper = Image.new("RGBA", rgba.size, "white")
    pixels = numpy.asarray(Image.alpha_composite(paper, rgba).convert("RGB"), dtype=numpy.float32) / 255.0
    image = torch.from_numpy(pixels).unsqueeze(0)  # (1, h, w, 3)
    mask = torch.zeros(image.shape[:3])
    mask[:, top:bottom, left:right] = 1.0
    return image, mask
