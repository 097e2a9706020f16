"""Bars of one number a name as a picture, some of them marked: what was left out, say. Drawn with Pillow."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from .plot import SMOOTH, as_picture

__all__ = ["bar_chart"]

_KEPT, _MARKED, _INK, _FAINT = (0, 114, 178), (213, 94, 0), (30, 30, 34), (222, 222, 226)


def bar_chart(values: Mapping[str, float], marked: Collection[str], title: str, width: int = 880, height: int = 360) -> Tensor:
    """`(1, height, width, 3)` float32 in 0…1: a bar a name from 0 upwards, those in `marked` in another colour."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (width * SMOOTH, height * SMOOTH), (255, 255, 255))
    draw, font, large = ImageDraw.Draw(sheet), ImageFont.load_default(13 * SMOOTH), ImageFont.load_default(17 * SMOOTH)
    left, right, top, bottom = 20 * SMOOTH, (width - 20) * SMOOTH, 62 * SMOOTH, (height - 34) * SMOOTH
    draw.text((left, 12 * SMOOTH), title, _INK, large)
    draw.line((left, bottom, right, bottom), _FAINT, SMOOTH)
    highest = max((value for value in values.values()), default=0.0) or 1.0
    step = (right - left) / max(1, len(values))
    legible = step > max((font.getlength(name) for name in values), default=0.0)  # many blocks: every name would run into the next
    for place, (name, value) in enumerate(values.items()):
        x, y = left + place * step, bottom - max(0.0, value) / highest * (bottom - top)
        draw.rectangle((x + 0.15 * step, y, x + 0.85 * step, bottom), _MARKED if name in marked else _KEPT)
        if legible:
            draw.text((x + 0.5 * step, bottom + 5 * SMOOTH), name, _INK, font, anchor="mt")
            draw.text((x + 0.5 * step, y - 3 * SMOOTH), f"{value:.3g}", _INK, font, anchor="mb")
    return as_picture(sheet)
