"""Our solvers beside the host's of the same name: equal where the maths is the same."""

from __future__ import annotations

import pytest
import torch
from rectiflow.host.embedded.k_diffusion_sampling import karras, predictors
from rectiflow.samplers.multistep import sample_dpmpp_2m
from rectiflow.samplers.solvers import sample_euler, sample_heun
from rectiflow.tests.samplers.flows import GaussianFlow

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
LINE = torch.linspace(1, 0, 21)
GRIDS = {"uniform": LINE, "shifted": 3 * LINE / (1 + 2 * LINE), "part": torch.linspace(0.7, 0.1, 9)}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_euler_and_heun_bit_for_bit(grid):
    assert torch.equal(sample_euler(GaussianFlow(), X, grid), karras.sample_euler(GaussianFlow(), X, grid, disable=True))
    # Heun averages the velocities before or after the multiplication with h: one rounding apart.
    assert torch.allclose(sample_heun(GaussianFlow(), X, grid), karras.sample_heun(GaussianFlow(), X, grid, disable=True), atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_dpmpp_2m_is_the_hosts(grid):
    ours, theirs = sample_dpmpp_2m(GaussianFlow(), X, grid), predictors.sample_dpmpp_2m(GaussianFlow(), X, grid, disable=True)
    # float32: the host's clock goes through log and exp; 1e-6 of values up to 4.
    assert (ours - theirs).abs().max() < 4e-6
