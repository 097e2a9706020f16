"""Charts: points lie where their values say, ticks are round, what cannot be drawn is left out."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.metrics.plot import Chart, Series, _axis, line_chart

BLUE = torch.tensor([0, 114, 178]) / 255


def blue_places(chart: torch.Tensor) -> torch.Tensor:
    """(row, column) of the first series' pixels left of the legend."""
    return ((chart[0, :, :700] - BLUE).abs().max(-1).values < 0.03).nonzero().float()


def test_a_chart_is_a_picture():
    chart = line_chart([Series("one", ((1, 1), (2, 3)))], Chart("title", "x", "y", width=640, height=360))
    assert chart.shape == (1, 360, 640, 3) and chart.dtype == torch.float32
    assert float(chart.min()) >= 0 and float(chart.max()) <= 1


def test_higher_and_further_right_are_where_they_should_be():
    low = blue_places(line_chart([Series("a", ((1.0, 1.0),)), Series("", ((0.0, 0.0), (4.0, 4.0)))], Chart("", "x", "y"))).mean(0)
    high = blue_places(line_chart([Series("a", ((3.0, 3.0),)), Series("", ((0.0, 0.0), (4.0, 4.0)))], Chart("", "x", "y"))).mean(0)
    assert high[0] < low[0] - 100 and high[1] > low[1] + 200


def test_a_power_law_is_a_line_on_logarithmic_axes():
    points = tuple((float(n), 1.0 / n**2) for n in (1, 10, 100))
    places = blue_places(line_chart([Series("", points)], Chart("", "x", "y", True, True)))
    slope = torch.linalg.lstsq(torch.cat([places[:, 1:], torch.ones(len(places), 1)], 1), places[:, :1]).solution
    residual = places[:, 0] - places[:, 1] * slope[0] - slope[1]
    assert float(residual.abs().max()) < 7  # half of a marker and the antialiasing


@pytest.mark.parametrize(("values", "log"), [((0.0, 1.0), False), ((3.0, 3.0), False), ((1e-5, 0.3), True), ((7.0, 9.0), True), ((), True)])
def test_ticks_lie_inside_and_are_round(values, log):
    axis = _axis(values, log)
    assert axis.high > axis.low
    assert all(0 <= axis.place(tick) <= 1 for tick in axis.ticks)
    assert all(float(f"{tick:.1g}") == pytest.approx(tick) or float(f"{tick:.2g}") == pytest.approx(tick) for tick in axis.ticks)
    if len(set(values)) > 1:
        assert 2 <= len(axis.ticks) <= 12


def test_wanted_ticks_are_taken():
    assert _axis((4.0, 32.0), True, (4.0, 8.0)).ticks == (4.0, 8.0)


def test_what_has_no_place_is_left_out():
    points = ((1.0, 1.0), (2.0, math.nan), (3.0, math.inf), (4.0, 0.0), (5.0, 2.0))
    same = line_chart([Series("", ((1.0, 1.0), (5.0, 2.0)))], Chart("", "x", "y", log_y=True))
    assert torch.equal(line_chart([Series("", points)], Chart("", "x", "y", log_y=True)), same)
    assert line_chart([], Chart("", "x", "y")).shape == (1, 480, 880, 3)
