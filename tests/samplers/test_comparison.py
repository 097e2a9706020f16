"""Comparing solvers: budgets are kept, calls are counted, errors fall, the reference states its own."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.samplers.comparison import compare, parse_budgets, parse_solvers, planned_steps, steps_within, table_csv
from rectiflow.samplers.registry import SOLVERS
from rectiflow.tests.samplers.flows import GaussianFlow

NOISE = torch.randn(32, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian_run(function, options, steps):
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return function(GaussianFlow(), NOISE, sigmas, extra_args={}, disable=True, **options)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_keeps_its_budget_and_uses_all_it_can(solver):
    found = compare(gaussian_run, (solver,), tuple(range(1, 14)), 4)
    for finished in found.runs:
        row = finished.row
        assert row.nfe <= row.budget, row
        assert row.nfe + SOLVERS[solver].nfe_per_step > row.budget, row
        assert row.steps == steps_within(solver, row.budget)
    cheapest = min(finished.row.budget for finished in found.runs)
    assert all(steps_within(solver, budget) == 0 for budget in range(1, cheapest))


def test_errors_fall_and_higher_orders_win_on_a_smooth_flow():
    found = compare(gaussian_run, ("euler", "rf_solver", "rk4"), (16, 64), 200)
    error = {(finished.row.solver, finished.row.budget): finished.row.rmse for finished in found.runs}
    assert error["rk4", 64] < error["rf_solver", 64] < error["euler", 64] < error["euler", 16]
    exact = GaussianFlow().clean(NOISE)
    assert float((found.reference - exact).square().mean().sqrt()) < found.reference_error < 1e-5


def test_the_reference_states_what_it_may_be_off():
    coarse = compare(gaussian_run, ("euler",), (4,), 4)
    exact = GaussianFlow().clean(NOISE)
    assert float((coarse.reference - exact).square().mean().sqrt()) < coarse.reference_error


def test_the_csv_has_a_line_a_run():
    rows = [finished.row for finished in compare(gaussian_run, ("euler", "rk4"), (2, 8), 8).runs]
    lines = list(csv.DictReader(io.StringIO(table_csv(rows, {"psnr": [10.0, float("inf"), 30.0]}))))
    found = [(line["solver"], line["nfe"], line["psnr"]) for line in lines]
    assert found == [("euler", "2", "10.000"), ("euler", "8", "inf"), ("rk4", "7", "30.000")]
    assert float(lines[0]["rmse"]) == pytest.approx(rows[0].rmse, rel=1e-5) and float(lines[0]["seconds"]) >= 0


def test_lists_are_read_as_people_write_them():
    assert parse_solvers("euler, rk4\nheun euler,") == ("euler", "rk4", "heun")
    assert parse_budgets("32, 8 8\n16") == (8, 16, 32)
    assert planned_steps(("euler", "rk4"), (8, 16), 10) == 8 + 16 + 2 + 4 + 10 + 5


@pytest.mark.parametrize("text", ["", ",", "euler; rk4", "eular", "Euler"])
def test_other_solvers_are_refused(text):
    with pytest.raises(NodeInputError, match="here: input 'solvers'.*rf_solver"):
        parse_solvers(text, "here")


@pytest.mark.parametrize("text", ["", "0", "-4", "8.5", "eight", "99999", "8e3", "10001", "²", "9" * 50])
def test_other_budgets_are_refused(text):
    with pytest.raises(NodeInputError, match="here: input 'nfe'"):
        parse_budgets(text, "here")
