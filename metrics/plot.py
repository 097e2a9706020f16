"""Line charts as pictures: measured points joined by lines, linear or logarithmic axes, a legend beside them. Drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["SMOOTH", "Chart", "Series", "as_picture", "line_chart"]

# Seven colours that people with any kind of colour blindness tell apart (Okabe and Ito), black last.
_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (20, 20, 20))
_MARKERS = ("disc", "square", "diamond", "triangle")
SMOOTH = 2  # drawn at this multiple and scaled down, since Pillow's lines have hard edges


@dataclass(frozen=True)
class Series:
    """A line through points (x, y), in the legend under its name if it has one.

    Points that are not finite, or not positive on a logarithmic axis, are left out.
    """

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """How a chart is drawn: its words, which axes are logarithmic, ticks of the x axis (empty: chosen here), size in pixels."""

    title: str
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    x_ticks: tuple[float, ...] = ()
    width: int = 880
    height: int = 480


@dataclass(frozen=True)
class _Axis:
    """One axis: the range of values, in log10 where `log`, and the ticks inside it."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)


def _axis(values: Sequence[float], log: bool, wanted: tuple[float, ...] = ()) -> _Axis:
    """The range of the values with a margin; ticks at 1, 2 and 5 times powers of ten, or where they are `wanted`."""
    axis = _fitted_axis(values, log)
    return replace(axis, ticks=wanted) if wanted else axis


def _fitted_axis(values: Sequence[float], log: bool) -> _Axis:
    if not values:
        values = (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
        margin = max(0.06 * (high - low), 0.04)
        low, high = low - margin, high + margin
        if high - low < 0.5:
            return _Axis(low, high, True, _round_ticks(10**low, 10**high))
        decades = range(math.floor(low), math.ceil(high) + 1)
        steps = (1, 2, 5) if high - low < 2.5 else (1,)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        return _Axis(low, high, True, tuple(tick for tick in ticks if low <= math.log10(tick) <= high))
    margin = 0.06 * (high - low) or 0.5
    low, high = (low if low == 0 else low - margin), high + margin
    return _Axis(low, high, False, _round_ticks(low, high))


def _round_ticks(low: float, high: float) -> tuple[float, ...]:
    """About six multiples of 1, 2 or 5 times a power of ten between the two."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return tuple(index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1))


def line_chart(series: Sequence[Series], chart: Chart) -> Tensor:
    """The chart as a picture, `(1, height, width, 3)` float32 in 0…1 on the CPU."""
    drawn = [[point for point in line.points if _drawable(point, chart)] for line in series]
    x_axis = _axis([x for line in drawn for x, _ in line], chart.log_x, chart.x_ticks)
    y_axis = _axis([y for line in drawn for _, y in line], chart.log_y)
    sheet = _Sheet(chart, x_axis, y_axis, [line.name for line in series])
    sheet.frame()
    for number, points in enumerate(drawn):
        sheet.line(number, points)
    sheet.legend()
    return as_picture(sheet.image)


def as_picture(sheet) -> Tensor:
    """A Pillow sheet that was drawn at SMOOTH as IMAGE `(1, h, w, 3)`, float32 in 0…1."""
    import numpy
    from PIL import Image

    small = sheet.resize((sheet.width // SMOOTH, sheet.height // SMOOTH), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.asarray(small, dtype=numpy.float32) / 255.0).unsqueeze(0)


def _drawable(point: tuple[float, float], chart: Chart) -> bool:
    x, y = point
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or not chart.log_x) and (y > 0 or not chart.log_y)


class _Sheet:
    """The paper of one chart: knows where values lie on it."""

    ink, faint, paper = (30, 30, 34), (222, 222, 226), (255, 255, 255)

    def __init__(self, chart: Chart, x_axis: _Axis, y_axis: _Axis, names: Sequence[str]):
        from PIL import Image, ImageDraw, ImageFont

        self.chart, self.x_axis, self.y_axis, self.names = chart, x_axis, y_axis, names
        self.image = Image.new("RGB", (chart.width * SMOOTH, chart.height * SMOOTH), self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.font, self.title_font = ImageFont.load_default(14 * SMOOTH), ImageFont.load_default(17 * SMOOTH)
        widest = max((self.font.getlength(name) for name in names), default=0.0)
        ticks = max((self.font.getlength(_number(tick)) for tick in y_axis.ticks), default=0.0)
        self.left = ticks + 42 * SMOOTH
        self.right = self.image.width - (widest + 58 * SMOOTH if widest else 20 * SMOOTH)
        self.top, self.bottom = 40 * SMOOTH, self.image.height - 54 * SMOOTH

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = self.left + self.x_axis.place(x) * (self.right - self.left)
        return across, self.bottom - self.y_axis.place(y) * (self.bottom - self.top)

    def frame(self) -> None:
        """Grid, tick numbers, the two axes' names and the title."""
        for tick in self.x_axis.ticks:
            x = self.left + self.x_axis.place(tick) * (self.right - self.left)
            self.draw.line((x, self.top, x, self.bottom), self.faint, SMOOTH)
            self.draw.text((x, self.bottom + 6 * SMOOTH), _number(tick), self.ink, self.font, anchor="mt")
        for tick in self.y_axis.ticks:
            y = self.bottom - self.y_axis.place(tick) * (self.bottom - self.top)
            self.draw.line((self.left, y, self.right, y), self.faint, SMOOTH)
            self.draw.text((self.left - 6 * SMOOTH, y), _number(tick), self.ink, self.font, anchor="rm")
        self.draw.rectangle((self.left, self.top, self.right, self.bottom), outline=self.ink, width=SMOOTH)
        middle = (self.left + self.right) / 2
        self.draw.text((middle, self.image.height - 10 * SMOOTH), self.chart.x_label, self.ink, self.font, anchor="mb")
        self.draw.text((self.left, 12 * SMOOTH), self.chart.title, self.ink, self.title_font, anchor="lt")
        self._upright(self.chart.y_label)

    def _upright(self, text: str) -> None:
        from PIL import Image, ImageDraw

        strip = Image.new("RGB", (round(self.font.getlength(text)) + 4, 22 * SMOOTH), self.paper)
        ImageDraw.Draw(strip).text((2, 11 * SMOOTH), text, self.ink, self.font, anchor="lm")
        turned = strip.rotate(90, expand=True)
        self.image.paste(turned, (6 * SMOOTH, round((self.top + self.bottom - turned.height) / 2)))

    def line(self, number: int, points: Sequence[tuple[float, float]]) -> None:
        colour = _COLOURS[number % len(_COLOURS)]
        places = [self.at(x, y) for x, y in sorted(points)]
        if len(places) > 1:
            self.draw.line(places, colour, 2 * SMOOTH, joint="curve")
        for place in places:
            self.marker(number, place)

    def marker(self, number: int, place: tuple[float, float]) -> None:
        (x, y), r, colour = place, 4.5 * SMOOTH, _COLOURS[number % len(_COLOURS)]
        shape = _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)]
        if shape == "disc":
            self.draw.ellipse((x - r, y - r, x + r, y + r), colour)
        elif shape == "square":
            self.draw.rectangle((x - r, y - r, x + r, y + r), colour)
        else:
            corners = [(x, y - 1.3 * r), (x + 1.3 * r, y), (x, y + 1.3 * r), (x - 1.3 * r, y)]
            self.draw.polygon(corners if shape == "diamond" else [corners[0], (x + 1.2 * r, y + r), (x - 1.2 * r, y + r)], colour)

    def legend(self) -> None:
        left = self.right + 14 * SMOOTH
        for number, name in enumerate(self.names):
            if not name:
                continue
            y = self.top + (12 + 22 * number) * SMOOTH
            colour = _COLOURS[number % len(_COLOURS)]
            self.draw.line((left, y, left + 24 * SMOOTH, y), colour, 2 * SMOOTH)
            self.marker(number, (left + 12 * SMOOTH, y))
            self.draw.text((left + 30 * SMOOTH, y), name, self.ink, self.font, anchor="lm")


def _number(value: float) -> str:
    """A tick's value in at most five characters or so: 0.002, 0.5, 20, 1e-05."""
    return f"{value:.3g}"
