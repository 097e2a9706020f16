"""Schedules: the shift and its three names, published tables, closed forms, and what every grid must be."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.samplers import schedules as S
from rectiflow.samplers.conversions import log_snr
from rectiflow.samplers.densities import TimestepDensity

U = torch.linspace(0, 1, 1001, dtype=torch.float64)
ALPHAS = [0.1, 0.5, 1.0, 1.649, 3.0, 12.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_shift_is_a_monotone_map_with_an_inverse(alpha):
    shifted = S.shift_sigma(U, alpha)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:] > shifted[:-1]).all()
    assert (S.unshift_sigma(shifted, alpha) - U).abs().max() < 1e-14
    assert (S.shift_sigma(shifted, 2.5) - S.shift_sigma(U, 2.5 * alpha)).abs().max() < 1e-14
    inner = U[1:-1]
    moved = log_snr(S.shift_sigma(inner, alpha)) - log_snr(inner)
    # Half log-SNR moves by −log(alpha); the paper's log-SNR is twice ours and moves by −2·log(alpha).
    assert (2 * moved + 2 * math.log(alpha)).abs().max() < 1e-9


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_three_names_of_the_shift(alpha):
    mu = math.log(alpha)
    for u in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert S.flux_sigma(mu, u) == pytest.approx(S.shift_sigma(u, alpha), abs=1e-12)
    rational = 1 - (1 - U) / ((1 - U) + alpha - alpha * (1 - U))  # t = u/(u + a − a·u) in t = 1 − sigma
    assert (rational - S.shift_sigma(U, alpha)).abs().max() < 1e-12


def test_flux_table():
    for tokens, mu in ((256, 0.5), (1024, 0.63), (4032, 1.1392), (4096, 1.15)):
        assert S.flux_mu(tokens) == pytest.approx(mu, abs=5e-5)
    assert math.exp(S.flux_mu(256)) == pytest.approx(1.649, abs=5e-4) and math.exp(S.flux_mu(4096)) == pytest.approx(3.158, abs=5e-4)
    four_steps = S.as_sigmas(S.shift_sigma(S.uniform_grid(4), math.exp(1.15))).tolist()
    assert four_steps == pytest.approx([1, 0.90453, 0.75951, 0.51284, 0], abs=5e-6)
    assert S.as_sigmas(S.shift_sigma(S.uniform_grid(4), 3.0)).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-7)


def test_resolution_shift():
    assert S.resolution_alpha(1024**2, 256**2) == 4.0
    assert S.resolution_alpha(256**2, 256**2) == 1.0


@pytest.mark.parametrize("kind", S.GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 28, 250])
def test_every_grid_falls_from_one_to_zero(kind, steps):
    sigmas = S.formula_sigmas(kind, steps, 4.0, 1.0)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()


@pytest.mark.parametrize("kind", S.GRIDS)
def test_denoise_keeps_the_last_steps_of_a_longer_schedule(kind):
    whole = S.formula_sigmas(kind, 20, 4.0, 1.0)
    assert torch.equal(S.formula_sigmas(kind, 10, 4.0, 0.5), whole[-11:])
    assert torch.equal(S.formula_sigmas(kind, 14, 4.0, 0.7), whole[-15:])
    assert S.formula_sigmas(kind, 14, 4.0, 0.0).shape == (0,)


def test_uniform_grid_is_exact():
    for steps in (1, 2, 3, 7, 1000):
        assert S.uniform_grid(steps).tolist() == [(steps - i) / steps for i in range(steps + 1)]
        assert (S.uniform_sigmas(steps) == torch.tensor([(steps - i) / steps for i in range(steps + 1)])).all()
    assert S.uniform_sigmas(4, 0.0, 1.0).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert S.uniform_sigmas(2, 0.8, 0.2).tolist() == pytest.approx([0.8, 0.5, 0.2])


def test_rational_is_the_shift():
    for alpha in (0.5, 1.0, 4.0, 7.0):
        assert (S.formula_sigmas("rational", 20, alpha, 1.0) - S.shift_sigma(S.uniform_grid(20), alpha)).abs().max() < 1e-7


def test_sigmoid_is_the_documented_reconstruction():
    def s(w, mu=0.6, alpha=6.0, beta=20.0):
        return 1 / (1 + math.exp(-(alpha if w < mu else beta) * (w - mu)))

    expected = [1 - (s(i / 12) - s(0)) / (s(1) - s(0)) for i in range(13)]
    assert S.sigmoid_grid(12).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("grid", "density"), [
    (S.logit_normal_grid(40), TimestepDensity("logit_normal")),
    (S.logit_normal_grid(40, 0.5, 0.6), TimestepDensity("logit_normal", mean=0.5, std=0.6)),
    (S.mode_grid(40), TimestepDensity("mode")), (S.mode_grid(40, -1.0), TimestepDensity("mode", mode_scale=-1.0)),
    (S.cosmap_grid(40), TimestepDensity("cosmap")), (S.u_shaped_grid(40), TimestepDensity("u_shaped")),
])
def test_quantile_grids_share_the_mass_equally(grid, density):
    mass = density.cdf(grid)
    assert ((mass[:-1] - mass[1:]) - 1 / 40).abs().max() < 1e-8  # the mode map at scale −1 is flat at both ends


def test_beta_is_symmetric_for_equal_parameters_and_uniform_for_one():
    assert (S.beta_grid(30) + S.beta_grid(30).flip(0) - 1).abs().max() < 1e-12
    assert (S.beta_grid(30, 1, 1) - S.uniform_grid(30)).abs().max() < 1e-12


def test_linear_quadratic_starts_linear_and_joins_smoothly():
    grid = 1 - S.linear_quadratic_grid(40)
    assert torch.allclose(grid[:21], 0.025 * torch.arange(21, dtype=torch.float64) / 20)
    curve = grid[20:]
    second = curve[2:] - 2 * curve[1:-1] + curve[:-2]
    assert torch.allclose(second, second[:1].expand_as(second), atol=1e-12)  # one parabola
    # Its slope at the join is the line's: value and first difference fix it up to half the second difference.
    assert float(curve[1] - curve[0] - second[0] / 2) == pytest.approx(0.025 / 20, abs=1e-12)
    with pytest.raises(NodeInputError, match="linear_steps"):
        S.linear_quadratic_grid(8, linear_steps=8)


def test_reshift_is_exact_in_both_directions():
    sigmas = S.as_sigmas(S.shift_sigma(S.uniform_grid(28), 3.0))
    there = S.reshift_sigmas(sigmas, 3.0, 6.0)
    assert (there - S.as_sigmas(S.shift_sigma(S.uniform_grid(28), 6.0))).abs().max() < 2e-7
    assert (S.reshift_sigmas(there, 6.0, 3.0) - sigmas).abs().max() < 2e-7
    assert there[0] == 1 and there[-1] == 0
    rising = S.reshift_sigmas(sigmas.flip(0), 3.0, 6.0)
    assert torch.equal(rising, there.flip(0))


def test_a_grid_that_collapses_in_float32_is_refused():
    with pytest.raises(NodeInputError, match="steps"):
        S.formula_sigmas("sigmoid", 1000, 20.0, 1.0, mu=0.95, alpha=50.0, beta=50.0)
    with pytest.raises(NodeInputError, match="kind"):
        S.formula_sigmas("karras", 10, 1.0, 1.0)
    with pytest.raises(NodeInputError, match="steps"):
        S.uniform_sigmas(0)
