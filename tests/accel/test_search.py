"""The schedule search against every plan there is, against worked examples, and against even spacing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from rectiflow.accel.cache.search import best_forecast_plans, best_reuse_plans, even_steps, forbid, gap_costs, improve, plan_cost


def every_plan(steps: int, budget: int):
    return ((0, *rest) for rest in itertools.combinations(range(1, steps), budget - 1))


def reuse_cost(gaps):
    return lambda history, end: float(gaps[history[-1], end])


def line_cost(first, gaps):
    return lambda history, end: float(first[end] if len(history) == 1 else gaps[history[-2], history[-1], end])


def cheapest(steps, budget, cost):
    return min(plan_cost(plan, steps, cost) for plan in every_plan(steps, budget))


@pytest.mark.parametrize("variant", ["plain", "weights", "longest gap", "forced steps", "all of them"])
def test_reuse_plans_are_optimal(variant):
    """50 random error matrices, every budget, against all plans."""
    draw = torch.Generator().manual_seed(len(variant))
    for trial in range(50):
        steps = 4 + trial % 7 if trial else 12
        errors = torch.rand(steps, steps, generator=draw)
        weights = torch.rand(steps, generator=draw) if variant in ("weights", "all of them") else None
        gaps = gap_costs(errors, weights)
        if variant in ("longest gap", "all of them"):
            gaps = forbid(gaps, longest=3)
        if variant in ("forced steps", "all of them"):
            gaps = forbid(gaps, forced=(1, steps - 1))
        for budget, plan in enumerate(best_reuse_plans(gaps), start=1):
            best = cheapest(steps, budget, reuse_cost(gaps))
            assert plan.cost == pytest.approx(best, abs=1e-9) or plan.cost == best == math.inf
            if plan.cost < math.inf:
                assert len(plan.computed) == budget and plan_cost(plan.computed, steps, reuse_cost(gaps)) == pytest.approx(plan.cost)
                assert plan.cost <= plan_cost(even_steps(steps, budget), steps, reuse_cost(gaps)) + 1e-12


def test_forecast_plans_are_optimal():
    """Random costs of a line through the two latest steps, with and without bounds, against all plans of up to ten steps."""
    draw = torch.Generator().manual_seed(5)
    for trial in range(20):
        steps = 3 + trial % 8
        first = gap_costs(torch.rand(steps, steps, generator=draw))[0]
        gaps = gap_costs(torch.rand(steps, steps, steps, generator=draw))
        if trial % 2:
            first, gaps = forbid(first[None], (steps - 1,), 4)[0], forbid(gaps, (steps - 1,), 4)
        for budget, plan in enumerate(best_forecast_plans(first, gaps), start=1):
            best = cheapest(steps, budget, line_cost(first, gaps))
            assert plan.cost == pytest.approx(best, abs=1e-9) or plan.cost == best == math.inf
            if plan.cost < math.inf:
                assert len(plan.computed) == budget
                assert plan_cost(plan.computed, steps, line_cost(first, gaps)) == pytest.approx(plan.cost)


PARABOLA = [3 * (i / 11) ** 2 for i in range(12)]
LINE = [0.25 * i for i in range(12)]
STEEP = list(itertools.accumulate([0, 0.1, 0.1, 0.1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1]))


@pytest.mark.parametrize("phi, budget, computed, cost, even", [
    (PARABOLA, 3, (0, 6, 9), 3.843, 4.612), (PARABOLA, 4, (0, 5, 8, 10), 2.554, None), (PARABOLA, 6, None, 1.314, None),
    (LINE, 4, (0, 3, 6, 9), 3.0, 3.0), (STEEP, 4, (0, 4, 5, 6), 2.1, 3.9), (STEEP, 12, tuple(range(12)), 0.0, 0.0),
])  # fmt: skip
def test_worked_examples_of_reuse(phi, budget, computed, cost, even):
    """A feature that moves along a line: errors are |phi_l − phi_j|."""
    phi = torch.tensor(phi, dtype=torch.float64)
    gaps = gap_costs((phi - phi[:, None]).abs())
    plan = best_reuse_plans(gaps)[budget - 1]
    assert plan.cost == pytest.approx(cost, abs=1e-3) and plan.computed == (computed or plan.computed)
    if even is not None:
        assert plan_cost(even_steps(12, budget), 12, reuse_cost(gaps)) == pytest.approx(even, abs=1e-3)


@pytest.fixture(scope="module")
def sines():
    """(reuse gaps, first, line gaps) of 64 sines of one phase that runs fast over three of sixteen steps."""
    rate = torch.full((16,), 0.08, dtype=torch.float64)
    rate[6:9] = 0.6
    channels = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
    features = torch.sin(rate.cumsum(0)[:, None] + channels)  # (t, c)
    reuse = (features[:, None] - features).abs().mean(-1)
    gaps = gap_costs(reuse)
    lines = torch.zeros(16, 16, 16, dtype=torch.float64)
    for j, i in itertools.combinations(range(16), 2):
        x = (torch.arange(16, dtype=torch.float64) - i) / (i - j)
        lines[j, i] = (features[i] + x[:, None] * (features[i] - features[j]) - features).abs().mean(-1)
    return gaps, gaps[0], gap_costs(lines)


@pytest.mark.parametrize("budget, computed, cost, even, by_reuse, reuse_plan, mistaken", [
    (4, (0, 6, 8, 9), 1.302, 2.805, 1.747, (0, 6, 8, 12), 3.083),
    (5, (0, 1, 6, 8, 9), 0.613, 2.237, 1.292, (0, 3, 6, 8, 12), 2.462),
    (6, (0, 1, 6, 7, 8, 9), 0.308, 2.083, 0.916, (0, 3, 6, 7, 8, 12), 2.238),
])  # fmt: skip
def test_worked_examples_of_lines(sines, budget, computed, cost, even, by_reuse, reuse_plan, mistaken):
    """A plan made for repetition costs more under lines than repetition does, so the search has to know the order."""
    gaps, first, lines = sines
    plan = best_forecast_plans(first, lines)[budget - 1]
    assert plan.computed == computed and plan.cost == pytest.approx(cost, abs=1e-3)
    assert plan_cost(even_steps(16, budget), 16, line_cost(first, lines)) == pytest.approx(even, abs=1e-3)
    reuse = best_reuse_plans(gaps)[budget - 1]
    assert reuse.cost == pytest.approx(by_reuse, abs=1e-3)
    assert plan_cost(reuse_plan, 16, reuse_cost(gaps)) == pytest.approx(by_reuse, abs=1e-3)
    assert plan_cost(reuse_plan, 16, line_cost(first, lines)) == pytest.approx(mistaken, abs=1e-3)


def test_moving_steps_never_harms_and_keeps_forced_ones(sines):
    _, first, lines = sines
    cost = line_cost(first, lines)
    optimal = best_forecast_plans(first, lines)
    for budget in (3, 5, 8):
        from rectiflow.accel.cache.search import Plan

        start = tuple(range(budget - 1)) + (15,)
        moved = improve(Plan(start, math.inf), 16, cost, forced=(15,))
        assert moved.cost <= plan_cost(start, 16, cost) and moved.computed[-1] == 15 and len(moved.computed) == budget
        assert moved.cost >= optimal[budget - 1].cost - 1e-12
        assert improve(optimal[budget - 1], 16, cost).cost == pytest.approx(optimal[budget - 1].cost)


def test_a_gap_of_nothing_costs_nothing_and_backwards_is_impossible():
    gaps = gap_costs(torch.rand(5, 5, generator=torch.Generator().manual_seed(1)))
    assert all(gaps[i, i + 1] == 0 for i in range(5)) and gaps[3, 2] == gaps[3, 3] == math.inf
