"""Checks that the papers' pages ask for and no other file of this folder holds; docs/done_when_samplers.md lists them all."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.samplers.inversion import inversion_sigmas
from rectiflow.samplers.registry import SOLVERS
from rectiflow.samplers.solvers import sample_euler, sample_rf_solver
from rectiflow.tests.samplers.flows import GaussianFlow, fitted_order, rmse


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def falling(steps):
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def test_euler_on_the_gaussian_is_first_order_with_the_published_errors():
    """Flow Straight and Fast: order 1.0 ± 0.05 over 10 to 160 steps, 6.9e-2 down to 4.6e-3."""
    steps, noise = [10, 20, 40, 80, 160], normal(2048, 16)
    errors = [rmse(sample_euler(GaussianFlow(), noise, falling(n)), GaussianFlow().clean(noise)) for n in steps]
    assert errors[0] == pytest.approx(6.9e-2, rel=0.05) and errors[-1] == pytest.approx(4.6e-3, rel=0.05)
    assert fitted_order(steps, errors) == pytest.approx(1.0, abs=0.05)


class LinearField:
    """dx/ds = A·x with a rotation and a decay in A: the end of every path is a matrix exponential."""

    matrix = torch.tensor([[-0.5, 2.0], [-2.0, -0.5]], dtype=torch.float64)

    def __call__(self, x, sigma, **extra):
        return x - sigma.reshape(-1, 1) * (x @ self.matrix.T)


@pytest.mark.parametrize(("name", "order"), [("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_orders_on_a_linear_field(name, order):
    """Lumina-Next: global slopes 1.9 to 2.1 for midpoint; the same tenth for the others."""
    x, steps = normal(64, 2), [20, 40, 80, 160]
    exact = x @ torch.linalg.matrix_exp(-0.9 * LinearField.matrix).T  # from s = 1 to s = 0.1
    grid = [torch.linspace(1, 0.1, n + 1, dtype=torch.float64) for n in steps]
    errors = [rmse(SOLVERS[name].function(LinearField(), x, sigmas), exact) for sigmas in grid]
    assert fitted_order(steps, errors) == pytest.approx(order, abs=0.1)


def test_norms_of_inverted_data_are_those_of_noise():
    """rf++: ‖z‖² of inverted samples has the mean and variance of chi-square with d degrees, within 3 standard errors."""
    count, d = 4000, 64
    data = 0.7 + 0.5 * normal(count, d)
    z = sample_rf_solver(GaussianFlow(), data, inversion_sigmas(falling(40), 1e-4).double())
    squares = (z**2).sum(1)
    assert abs(float(squares.mean()) - d) < 3 * math.sqrt(2 * d / count)
    spread_of_variance = math.sqrt((12 * d * (d + 4) - 4 * d * d) / count)
    assert abs(float(squares.var()) - 2 * d) < 3 * spread_of_variance
