"""The loss curve as a picture: single steps pale, their running mean dark, validation as dots, error by sigma as thin lines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .history import History

__all__ = ["curve_picture", "density_picture"]

PAPER, INK, GRID = (255, 255, 255), (40, 40, 48), (228, 228, 232)
RAW, MEAN, WEIGHTS, AVERAGED = (178, 200, 230), (38, 92, 168), (214, 120, 40), (190, 40, 60)
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 34
LOGARITHMIC_FROM = 20.0  # a range of more than this factor is drawn on a logarithmic axis
SMOOTHING = 0.95


def curve_picture(history: History, width: int = 640, height: int = 360) -> Tensor:
    """IMAGE (1, height, width, 3) in 0…1. Values that are not finite are left out; nothing to draw gives an empty frame."""
    import numpy
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    losses = [(record.step, record.loss) for record in history.steps if math.isfinite(record.loss)]
    checks = [record for record in history.validations if math.isfinite(record.mean)]
    values = [loss for _, loss in losses] + [value for record in checks for value in (record.mean, *record.bins) if math.isfinite(value)]
    title = "loss" if not losses else f"loss {history.mean_loss():.4g} after {losses[-1][0]} steps"
    draw.text((LEFT, 8), title, fill=INK)
    if values:
        last = max([step for step, _ in losses] + [record.step for record in checks])
        axes = _Axes(min(values), max(values), last, width, height)
        axes.draw(draw)
        _line(draw, axes, losses, RAW)
        _line(draw, axes, _smoothed(losses), MEAN, 2)
        for name, colour in (("weights", WEIGHTS), ("ema", AVERAGED)):
            own = [record for record in checks if record.weights == name]
            for number in range(len(own[0].bins) if own and name == "ema" else 0):
                _line(draw, axes, [(record.step, record.bins[number]) for record in own], GRID)
            for record in own:
                x, y = axes.at(record.step, record.mean)
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    pixels = numpy.asarray(picture, dtype=numpy.float32) / 255.0
    return torch.from_numpy(pixels).unsqueeze(0)


class _Axes:
    """From (step, value) to pixels."""

    def __init__(self, low: float, high: float, last: int, width: int, height: int):
        self.logarithmic = low > 0.0 and high / low > LOGARITHMIC_FROM
        low, high = (math.log10(low), math.log10(high)) if self.logarithmic else (low, high)
        margin = 0.05 * (high - low) or max(abs(high) * 0.1, 1e-6)
        self.low, self.high, self.last = low - margin, high + margin, max(2, last)
        self.width, self.height = width, height

    def at(self, step: float, value: float) -> tuple[float, float]:
        value = math.log10(max(value, 1e-300)) if self.logarithmic else value
        across = (step - 1) / (self.last - 1)
        up = (value - self.low) / (self.high - self.low)
        return LEFT + across * (self.width - LEFT - RIGHT), self.height - BOTTOM - up * (self.height - TOP - BOTTOM)

    def draw(self, draw) -> None:
        for part in range(5):
            level = self.low + (self.high - self.low) * part / 4
            value = 10.0**level if self.logarithmic else level
            y = self.at(1, value)[1]
            draw.line((LEFT, y, self.width - RIGHT, y), fill=GRID)
            draw.text((6, y - 6), f"{value:.3g}", fill=INK)
            step = 1 + (self.last - 1) * part // 4
            draw.text((self.at(step, value)[0] - 8, self.height - BOTTOM + 10), str(step), fill=INK)


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean that starts without a bias towards the first value."""
    mean, weight, smooth = 0.0, 0.0, []
    for step, value in points:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append((step, mean / weight))
    return smooth


def _line(draw, axes: _Axes, points: list[tuple[int, float]], colour, width: int = 1) -> None:
    places = [axes.at(step, value) for step, value in points if math.isfinite(value)]
    if len(places) > 1:
        draw.line(places, fill=colour, width=width)
    elif places:
        x, y = places[0]
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)


def density_picture(density, width: int = 480, height: int = 240, bins: int = 96) -> Tensor:
    """IMAGE (1, height, width, 3): the density of sigma from 0 (data) to 1 (noise), from its quantiles."""
    import numpy
    from PIL import Image, ImageDraw

    edges = density.quantile(torch.linspace(0.0, 1.0, 40_001, dtype=torch.float64))
    counts = torch.histc(edges.float(), bins, 0.0, 1.0)
    tops = counts / counts.max()
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((12, 8), f"{density.describe()}: share of steps at each sigma", fill=INK)
    span = width - 24
    for number, top in enumerate(tops.tolist()):
        left, right = 12 + span * number / bins, 12 + span * (number + 1) / bins - 1
        draw.rectangle((left, height - BOTTOM - top * (height - TOP - BOTTOM), right, height - BOTTOM), fill=RAW)
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        draw.text((12 + (span - 20) * value, height - BOTTOM + 8), f"{value:g}", fill=INK)
    return torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255.0).unsqueeze(0)
