"""A matrix as a picture: a coloured cell a number, names beside the rows, numbers in cells that are large enough. Drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .heat_map import heat_map

__all__ = ["matrix_chart"]

_INK, _PALE = (30, 30, 34), (240, 240, 240)
_SMOOTH = 2  # drawn at this multiple and scaled down, since Pillow's edges are hard
_DIGITS = 44  # pixels that a number of three digits needs
_ROW = 26


def matrix_chart(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, full_scale: float = 1.0) -> Tensor:
    """`(1, h, w, 3)` float32 in 0…1 of `values` (r, c), black for 0 and pale yellow for `full_scale`; NaN is left white.

    columns: names below, written where they fit.
    """
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    font, large = ImageFont.load_default(13 * _SMOOTH), ImageFont.load_default(17 * _SMOOTH)
    names = max((font.getlength(name) for name in rows), default=0.0)
    count = max(1, values.shape[1])
    cell = max(6, min(64, 760 // count)) * _SMOOTH
    left, top, height = round(names) + 28 * _SMOOTH, 52 * _SMOOTH, _ROW * _SMOOTH
    width = max(left + cell * count, round(large.getlength(title)) + 14 * _SMOOTH) + 24 * _SMOOTH
    sheet = Image.new("RGB", (width, top + height * max(1, len(rows)) + 36 * _SMOOTH), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((14 * _SMOOTH, 12 * _SMOOTH), title, _INK, large)
    colours = (heat_map(values.nan_to_num()[None].double(), full_scale)[0][0] * 255).round().int().tolist()
    for r, name in enumerate(rows):
        y = top + r * height
        draw.text((left - 10 * _SMOOTH, y + height / 2), name, _INK, font, anchor="rm")
        for c, number in enumerate(values[r].tolist()):
            x = left + c * cell
            if number == number:
                draw.rectangle((x, y, x + cell - 1, y + height - 1), tuple(colours[r][c]))
                if cell >= _DIGITS * _SMOOTH:
                    ink = _INK if number > 0.6 * full_scale else _PALE
                    draw.text((x + cell / 2, y + height / 2), f"{number:.3g}", ink, font, anchor="mm")
    free = float("-inf")
    for c, name in enumerate(columns):
        x, width = left + (c + 0.5) * cell, font.getlength(name)
        if x - width / 2 > free and x + width / 2 < sheet.width:
            draw.text((x, top + height * len(rows) + 6 * _SMOOTH), name, _INK, font, anchor="mt")
            free = x + width / 2 + 8 * _SMOOTH
    small = sheet.resize((sheet.width // _SMOOTH, sheet.height // _SMOOTH), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.asarray(small, dtype=numpy.float32) / 255.0).unsqueeze(0)
