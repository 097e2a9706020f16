"""A run of a cache as a picture: a column a visit, a row what was computed, forecast and why. Drawn with Pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .report import EARLIER

if TYPE_CHECKING:
    from .report import RunRecord

__all__ = ["timeline"]

FULL, FORECAST, MIXED = (0, 114, 178), (230, 159, 0), (204, 121, 167)  # told apart with any kind of colour blindness
INK, FAINT, PAPER = (30, 30, 34), (222, 222, 226), (255, 255, 255)
LEFT, TOP, BOX, ROW = 120, 46, 22, 30


def timeline(record: RunRecord) -> torch.Tensor:
    """(1, h, w, 3) float32 in 0…1. Rows: the decision, each condition (upper part computed, lower part forecast), the reason's number."""
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    visits = record.visits
    reasons = list(dict.fromkeys(visit.reason for visit in visits))
    parts = max((visit.full + visit.forecast for visit in visits), default=0)
    width = max(LEFT + BOX * len(visits) + 20, 640)
    height = TOP + ROW * (parts + 2) + 20 * (len(reasons) + 1) + 24
    image = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    when = " (an earlier graph run)" if EARLIER in record.notes else ""
    draw.text((12, 10), f"{record.policy}, {record.target}: {record.full_visits} of {len(visits)} visits full{when}", INK, font)
    for row, name in enumerate(("visit", *(f"condition {i + 1}" for i in range(parts)), "reason")):
        draw.text((LEFT - 8, TOP + ROW * row + BOX // 2), name, INK, font, anchor="rm")
    for column, visit in enumerate(visits):
        left = LEFT + BOX * column
        colour = FULL if not visit.forecast else FORECAST if not visit.full else MIXED
        states = [colour] + [FULL] * visit.full + [FORECAST] * visit.forecast
        for row, state in enumerate(states):
            top = TOP + ROW * row
            draw.rectangle((left + 1, top, left + BOX - 2, top + BOX), fill=state, outline=FAINT)
        number = str(reasons.index(visit.reason) + 1)
        draw.text((left + BOX // 2, TOP + ROW * (parts + 1) + BOX // 2), number, INK, font, anchor="mm")
    top = TOP + ROW * (parts + 2)
    legend = [("computed", FULL), ("forecast", FORECAST), ("part of the conditions", MIXED)]
    for i, (name, colour) in enumerate(legend):
        draw.rectangle((LEFT + 170 * i, top, LEFT + 170 * i + 12, top + 12), fill=colour)
        draw.text((LEFT + 170 * i + 18, top - 2), name, INK, font)
    for i, reason in enumerate(reasons):
        draw.text((LEFT, top + 20 * (i + 1)), f"{i + 1}  {reason}", INK, font)
    return torch.from_numpy(numpy.asarray(image, dtype=numpy.float32) / 255.0).unsqueeze(0)
