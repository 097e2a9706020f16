"""Stochastic and few-step samplers on the Gaussian flow, whose mean and spread are known."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.samplers.solvers import sample_euler, sample_midpoint
from rectiflow.samplers.stochastic import RowNoise, sample_ancestral, sample_carry_noise, sample_sde
from rectiflow.tests.samplers.flows import GaussianFlow, StraightFlow, rmse

renoised = partial(sample_ancestral, solver="midpoint")
FORMS = [pytest.param(sample_sde, id="sde"), pytest.param(sample_ancestral, id="ancestral")]
ALL_FORMS = [*FORMS, pytest.param(renoised, id="renoised")]


def falling(steps, dtype=torch.float64):
    return torch.linspace(1, 0, steps + 1, dtype=dtype)


def start(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(form, steps: int, eta: float) -> tuple[float, float]:
    """The exact mean and spread that a form leaves on the Gaussian flow.

    Each of its steps is affine, x' = a·x + c + b·n, so mean' = a·mean + c and var' = a²·var + b²; a and c are read from two states
    without noise, b from what the noise adds.
    """
    flow, mean, variance, grid = GaussianFlow(), 0.0, 1.0, falling(steps)
    pair = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    drawn = RowNoise(pair, 1).draw()
    for place in range(steps):
        part = grid[place : place + 2]
        silent = form(flow, pair, part, {"seed": 1}, eta=eta, s_noise=0.0)
        a, c = float(silent[1] - silent[0]), float(silent[0])
        b = float(((form(flow, pair, part, {"seed": 1}, eta=eta) - silent) / drawn)[0])
        mean, variance = a * mean + c, a * a * variance + b * b
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("form", [pytest.param(sample_sde, id="sde"), pytest.param(renoised, id="renoised")])
def test_draws_have_the_exact_moments(form):
    """100 × 2000 draws: standard error of the mean 0.0011, of the spread 0.0008."""
    x = form(GaussianFlow(), start(100, 2000), falling(50), {"seed": 1}, eta=0.6)
    mean, spread = moments(form, 50, 0.6)
    assert abs(float(x.mean()) - mean) < 0.0034 and abs(float(x.std()) - spread) < 0.0025


@pytest.mark.parametrize(("form", "eta"), [
    *((renoised, eta) for eta in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)), (sample_sde, 0.5), (sample_sde, 0.8), (sample_sde, 1.0),
])  # fmt: skip
def test_mean_and_spread_are_kept_within_one_percent(form, eta):
    mean, spread = moments(form, 50, eta)
    assert mean == pytest.approx(0.7, rel=0.01) and spread == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(("form", "eta", "at_fifty", "order"), [
    (sample_sde, 0.0, -0.0292, 1.0),
    (sample_ancestral, 0.0, -0.0292, 1.0),
    (sample_ancestral, 1.0, -0.0606, 1.0),
    (sample_sde, 1.0, 0.0003, 1.9),
    (renoised, 0.3, -8e-6, 2.9),
    (renoised, 1.0, -1e-5, 2.9),
])  # fmt: skip
def test_the_error_of_the_spread_is_the_step_alone(form, eta, at_fifty, order):
    """It falls to nothing with the step, at the order of the form's solver; so what is missing at 50 steps is discretisation.

    On one Gaussian the midpoint rule looks third order; its order on a mixture is test_solvers'."""
    errors = [moments(form, steps, eta)[1] / 0.5 - 1 for steps in (50, 100, 200)]
    assert errors[0] == pytest.approx(at_fifty, rel=0.2, abs=2e-5)
    fitted = math.log2(errors[0] / errors[2]) / 2
    assert fitted == pytest.approx(order, abs=0.3)


def test_a_little_sde_noise_converges_slowly():
    """Near sigma 1 its drift grows as 1/(1 − s): at eta 0.3 the spread is 1.4 % high at 50 steps and comes down as the root of the step."""
    errors = [moments(sample_sde, steps, 0.3)[1] / 0.5 - 1 for steps in (50, 200, 400)]
    assert errors[0] == pytest.approx(0.0137, rel=0.05) and errors[0] > 1.5 * errors[1] > 1.5 * 1.3 * errors[2] > 0


def test_published_spreads_at_twenty_steps():
    noise = start(100, 2000)
    assert float(sample_sde(GaussianFlow(), noise, falling(20), {"seed": 1}, eta=1.0).std()) == pytest.approx(0.500, abs=0.01)
    assert float(sample_euler(GaussianFlow(), noise, falling(20)).std()) == pytest.approx(0.464, abs=0.003)
    assert float(sample_ancestral(GaussianFlow(), noise, falling(20), {"seed": 1}, eta=1.0).std()) == pytest.approx(0.435, abs=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_without_noise_it_is_euler_exactly(form):
    x = start(3, 8)
    euler = sample_euler(GaussianFlow(), x, falling(12))
    assert torch.equal(form(GaussianFlow(), x, falling(12), eta=0.0), euler)
    assert torch.equal(form(GaussianFlow(), x, falling(12), eta=1.0, sigma_lo=2.0, sigma_hi=3.0), euler)


def test_renoised_without_noise_is_the_midpoint_rule_exactly():
    x = start(3, 8)
    flow = GaussianFlow()
    assert torch.equal(renoised(flow, x, falling(12), eta=0.0), sample_midpoint(GaussianFlow(), x, falling(12)))
    assert flow.calls == 24


@pytest.mark.parametrize("form", ALL_FORMS)
def test_rows_draw_their_own_noise(form):
    x = start(4, 3, 5)
    together = form(GaussianFlow(), x, falling(9), {"seed": 40}, eta=1.0)
    for row in range(4):
        assert torch.equal(together[row : row + 1], form(GaussianFlow(), x[row : row + 1], falling(9), {"seed": 40 + row}, eta=1.0))
    assert torch.equal(together, form(GaussianFlow(), x, falling(9), {"seed": 39}, eta=1.0, seed_offset=1))
    assert not torch.equal(together, form(GaussianFlow(), x, falling(9), {"seed": 41}, eta=1.0))
    state = torch.random.get_rng_state()
    form(GaussianFlow(), x, falling(9), {"seed": 1}, eta=1.0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_seeds_near_the_limit_are_seeds_too():
    assert torch.isfinite(RowNoise(torch.zeros(3, 2), 2**64 - 1).draw()).all()


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 5, 4, 4)])
def test_finite_from_one_to_zero_in_float32(form, shape):
    x = form(GaussianFlow(), start(*shape).float(), falling(15, torch.float32), {"seed": 3}, eta=1.0)
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("function", [sample_sde, sample_ancestral, sample_carry_noise])
def test_rising_schedules_are_refused(function):
    with pytest.raises(NodeInputError, match="sigmas"):
        function(GaussianFlow(), start(1, 2), falling(4).flip(0))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_carried_noise_is_exact_on_a_straight_flow(solver):
    data, noise = start(2, 4, 5, seed=1), start(2, 4, 5, seed=2)
    for grid in (falling(1), falling(7), falling(8)[3:]):
        at = (1 - grid[0]) * data + grid[0] * noise
        assert rmse(sample_carry_noise(StraightFlow(data, noise), at, grid, solver=solver), data) < 1e-12


def test_carried_noise_grows_on_a_curved_flow_as_published():
    """RMSE of the rule and of Euler at 5, 20, 100, 400 steps: 0.062/0.130, 0.348/0.035, 1.08/0.007, 2.09/0.002."""
    noise = start(1, 20000)
    for steps, carried, euler in ((5, 0.062, 0.130), (20, 0.348, 0.035), (100, 1.08, 0.007), (400, 2.09, 0.002)):
        clean = GaussianFlow().clean(noise)
        assert rmse(sample_carry_noise(GaussianFlow(), noise, falling(steps), force=True), clean) == pytest.approx(carried, rel=0.1)
        assert rmse(sample_euler(GaussianFlow(), noise, falling(steps)), clean) == pytest.approx(euler, rel=0.1)
    with pytest.raises(NodeInputError, match="max_steps"):
        sample_carry_noise(GaussianFlow(), noise, falling(9))


def test_evaluations_are_counted():
    for solver, expected in (("euler", 6), ("heun", 11)):
        flow = GaussianFlow()
        sample_carry_noise(flow, start(1, 4), falling(6), solver=solver)
        assert flow.calls == expected
    for form in (sample_sde, sample_ancestral):
        flow = GaussianFlow()
        form(flow, start(1, 4), falling(6), eta=1.0)
        assert flow.calls == 6
