"""A matrix as a picture: a coloured cell a number, names beside the rows, numbers in cells that are large enough. Drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .heat_map import heat_map
from .plot import SMOOTH, as_picture

__all__ = ["matrix_chart"]

_INK, _PALE = (30, 30, 34), (240, 240, 240)
_DIGITS = 44  # pixels that a number of three digits needs
_ROW = 26


def matrix_chart(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, full_scale: float = 1.0) -> Tensor:
    """`(1, h, w, 3)` float32 in 0…1 of `values` (r, c), black for 0 and pale yellow for `full_scale`; NaN is left white.

    columns: names below, written where they fit.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, large = ImageFont.load_default(13 * SMOOTH), ImageFont.load_default(17 * SMOOTH)
    names = max((font.getlength(name) for name in rows), default=0.0)
    count = max(1, values.shape[1])
    cell = max(6, min(64, 760 // count)) * SMOOTH
    left, top, height = round(names) + 28 * SMOOTH, 52 * SMOOTH, _ROW * SMOOTH
    width = max(left + cell * count, round(large.getlength(title)) + 14 * SMOOTH) + 24 * SMOOTH
    sheet = Image.new("RGB", (width, top + height * max(1, len(rows)) + 36 * SMOOTH), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((14 * SMOOTH, 12 * SMOOTH), title, _INK, large)
    colours = (heat_map(values.nan_to_num()[None].double(), full_scale)[0][0] * 255).round().int().tolist()
    for r, name in enumerate(rows):
        y = top + r * height
        draw.text((left - 10 * SMOOTH, y + height / 2), name, _INK, font, anchor="rm")
        for c, number in enumerate(values[r].tolist()):
            x = left + c * cell
            if number == number:
                draw.rectangle((x, y, x + cell - 1, y + height - 1), tuple(colours[r][c]))
                if cell >= _DIGITS * SMOOTH:
                    ink = _INK if number > 0.6 * full_scale else _PALE
                    draw.text((x + cell / 2, y + height / 2), f"{number:.3g}", ink, font, anchor="mm")
    free = float("-inf")
    for c, name in enumerate(columns):
        x, width = left + (c + 0.5) * cell, font.getlength(name)
        if x - width / 2 > free and x + width / 2 < sheet.width:
            draw.text((x, top + height * len(rows) + 6 * SMOOTH), name, _INK, font, anchor="mt")
            free = x + width / 2 + 8 * SMOOTH
    return as_picture(sheet)
