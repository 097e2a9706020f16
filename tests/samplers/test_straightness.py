"""S(Z): 0 for straight paths, the closed form on a Gaussian, quadrature on a mixture, any schedule, equal figures for equal flows."""

from __future__ import annotations

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.samplers.solvers import sample_midpoint
from rectiflow.samplers.straightness import PathRecord, sample_recorded, straightness
from rectiflow.tests.samplers.flows import GaussianFlow, MixtureFlow, StraightFlow, rk4_reference


def measured(flow, noise, sigmas):
    record = PathRecord()
    sample_recorded(flow, noise, sigmas, disable=True, record=record)
    return straightness(record)


def uniform(steps):
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def gaussian_straightness(flow: GaussianFlow, points: int = 20_000) -> float:
    """x_s = (1 − s)·m + r(s)·z with r² = ((1 − s)·sd)² + s², so the deviation is z·((1 − sd) − r'(s)): S = ∫ (1 − sd − r')² ds."""
    s = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    slope = (s - (1 - s) * flow.sd**2) / (((1 - s) * flow.sd) ** 2 + s**2).sqrt()
    return float(((1 - flow.sd - slope) ** 2).mean())


def test_a_straight_flow_has_none():
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(8, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    found = measured(StraightFlow(data, noise), noise, uniform(4))
    assert found.value < 1e-12  # rounding in the quotient at sigma near 0
    assert float(found.line.mean()) == pytest.approx(float((noise - data).square().mean()), rel=1e-9)


def test_the_gaussian_has_its_closed_form():
    """z is drawn once: S of a sample is z²·∫(1 − sd − r')², so dividing by mean z² takes the drawing out. Page: within 1 %."""
    flow = GaussianFlow()
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = gaussian_straightness(flow) * float(noise.square().mean())
    for steps, tolerance in ((10, 0.02), (20, 0.01), (40, 0.002)):
        assert measured(flow, noise, uniform(steps)).value == pytest.approx(exact, rel=tolerance)


def test_the_mixture_agrees_with_quadrature_along_exact_paths():
    """Independent: paths by classical Runge-Kutta on the exact velocity, integral by the midpoint rule. Page: about 0.30."""
    flow = MixtureFlow()
    noise, points = flow.noise(256), 100
    x, deviations = noise, []
    ends = rk4_reference(flow, noise, 1.0, 0.0, steps=2 * points)
    for index in range(points):
        start = 1 - index / points
        x = rk4_reference(flow, x, start, start - 0.5 / points, steps=1)
        velocity = flow.velocity(x, torch.tensor(start - 0.5 / points, dtype=torch.float64))
        deviations.append((noise - ends - velocity).square().mean())
        x = rk4_reference(flow, x, start - 0.5 / points, start - 1 / points, steps=1)
    exact = float(torch.stack(deviations).mean())
    assert measured(flow, noise, uniform(50)).value == pytest.approx(exact, rel=0.01)
    assert 0.2 < exact < 0.4  # the means are drawn anew; the page's drawing gave about 0.30


def test_the_grid_does_not_matter():
    """Steps are weighed by their length: a schedule with shift 3 measures the same S."""
    flow = GaussianFlow()
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = uniform(40)
    assert measured(flow, noise, 3 * u / (1 + 2 * u)).value == pytest.approx(measured(flow, noise, u).value, rel=0.01)


def test_it_is_a_mean_over_coordinates_not_a_sum():
    flow = GaussianFlow()
    noise = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = measured(flow, noise, uniform(10)).value
    assert measured(flow, noise.repeat(1, 1, 2, 2), uniform(10)).value == pytest.approx(small, rel=1e-9)


def test_the_recorded_run_is_the_midpoint_rule_and_costs_one_call_more():
    flow = GaussianFlow()
    noise = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    record = PathRecord()
    end = sample_recorded(flow, noise, uniform(5), disable=True, record=record)
    assert flow.calls == 11
    assert torch.equal(end, sample_midpoint(flow, noise, uniform(5), disable=True)) and torch.equal(record.last, end)


def test_shares_add_up_and_the_table_has_a_line_a_step():
    found = measured(GaussianFlow(), torch.ones(2, 16, dtype=torch.float64), uniform(5))
    assert float(found.shares().sum(1).mean()) == pytest.approx(found.value)
    lines = found.table().splitlines()
    assert len(lines) == 6 and lines[-1].endswith("100.0%")


@pytest.mark.parametrize("sigmas", [[], [1.0], [0.0, 0.5, 1.0], [1.0, 0.5, 0.5, 0.0]])
def test_schedules_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(NodeInputError, match="Flow Straightness: input 'sigmas'"):
        measured(GaussianFlow(), torch.ones(1, 4), torch.tensor(sigmas))
