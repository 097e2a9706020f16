"""Inversion: round trips as published, ends that are ordinary points, and the way back through stock samplers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.model_sampling import CONST, ModelSamplingDiscreteFlow
from rectiflow.host.embedded.samplers import KSAMPLER
from rectiflow.nodes.inversion import RectiflowNoiseSlerp
from rectiflow.samplers.inversion import (
    INVERTERS,
    InvertSampler,
    LatentNoise,
    inversion_sigmas,
    noise_slerp,
    sample_fixed_point,
    sample_uni_inv,
    sampling_sigmas,
)
from rectiflow.samplers.multistep import sample_fireflow
from rectiflow.samplers.solvers import sample_euler, sample_midpoint, sample_rf_solver
from rectiflow.tests.samplers.flows import GaussianFlow, MixtureFlow, fitted_order, rk4_reference, rmse


def rising(steps):
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


@pytest.fixture(scope="module")
def mixture():
    flow = MixtureFlow()
    data = flow.data(512)
    return flow, data, rk4_reference(flow, data, 0.0, 1.0, 1000)


def round_trip(mixture, there, back, steps, **options):
    flow, data, _ = mixture
    flow.calls = 0
    error = rmse(back(flow, there(flow, data, rising(steps), **options), rising(steps).flip(0)), data)
    return error, flow.calls


def test_uni_inv_undoes_euler(mixture):
    """Published at 40, 60, 120 evaluations in all: 0.0116, 0.0051, 0.0014; factor 4, since sampling on a mixture is irregular."""
    for nfe, published in ((40, 0.0116), (60, 0.0051), (120, 0.0014)):
        error, calls = round_trip(mixture, sample_uni_inv, sample_euler, nfe // 2)
        assert calls == nfe + 1 and published / 4 < error < published * 4


def test_fireflow_and_rf_solver_beat_euler_eightfold(mixture):
    for nfe in (40, 120):
        euler, _ = round_trip(mixture, sample_euler, sample_euler, nfe // 2)
        assert round_trip(mixture, sample_fireflow, sample_fireflow, nfe // 2 - 1)[0] <= euler / 8
        assert round_trip(mixture, sample_rf_solver, sample_rf_solver, nfe // 4)[0] <= euler / 8


def test_a_converged_fixed_point_is_eulers_exact_inverse():
    """|h|·Lip < 1 needs a gentle flow: the Gaussian of sd 0.5 at 20 steps."""
    flow, x = GaussianFlow(), torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = rising(20)
    grid[0] = 1e-3  # Euler reads no velocity at 0 on the way back, so the round trip lives above it
    back = sample_euler(flow, sample_fixed_point(flow, x, grid, iterations=30), grid.flip(0))
    assert rmse(back, x) < 1e-8
    flow.calls = 0
    sample_fixed_point(flow, x, grid, iterations=3)
    assert flow.calls == 60


def test_more_iterations_invert_better_and_averaging_helps_coarse_grids(mixture):
    gaussian = (GaussianFlow(), torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64), None)
    errors = [round_trip(gaussian, sample_fixed_point, sample_euler, 20, iterations=k)[0] for k in (1, 3, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    plain, _ = round_trip(mixture, sample_fixed_point, sample_euler, 5, iterations=3)
    assert round_trip(mixture, sample_fixed_point, sample_euler, 5, iterations=3, average=True)[0] < plain


def test_order_of_the_inverted_noise(mixture):
    """Uni-Inv and the fixed point find it to first order, RF-Solver and FireFlow to second, as published."""
    flow, data, noise = mixture
    steps = [20, 40, 80, 160]
    for name, order in (("uni_inv", 1), ("fixed_point", 1), ("rf_solver", 2), ("fireflow", 2)):
        options = {"iterations": 8} if name == "fixed_point" else {}
        errors = [rmse(INVERTERS[name](flow, data, rising(n), **options), noise) for n in steps]
        assert fitted_order(steps, errors) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", INVERTERS)
def test_batch_equals_singles_and_ends_are_finite(name):
    flow, x = GaussianFlow(), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = INVERTERS[name](flow, x, rising(10))
    assert torch.isfinite(z).all()
    for row in range(3):
        assert torch.equal(z[row : row + 1], INVERTERS[name](flow, x[row : row + 1], rising(10)))
    assert torch.isfinite(INVERTERS[name](flow, z, rising(10).flip(0))).all()


def test_inversion_sigmas():
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert inversion_sigmas(sigmas).tolist() == pytest.approx([0.001, 0.25, 0.5, 0.75, 1.0])
    assert inversion_sigmas(sigmas, 0.0).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert inversion_sigmas(sigmas, 0.001, 0.6).tolist() == pytest.approx([0.001, 0.25, 0.5, 0.6])
    assert inversion_sigmas(sigmas[1:], 0.001, 0.75).tolist() == pytest.approx([0.001, 0.25, 0.5, 0.75])
    for bad in (sigmas.flip(0), sigmas[:1], torch.zeros(0)):
        with pytest.raises(NodeInputError, match="sigmas"):
            inversion_sigmas(bad)
    with pytest.raises(NodeInputError, match="sigma_floor"):
        inversion_sigmas(sigmas, 0.5, 0.5)
    with pytest.raises(NodeInputError, match="crosses"):
        inversion_sigmas(torch.tensor([1.0, 0.01, 0.0]), 0.05)


class FlowSampling(ModelSamplingDiscreteFlow, CONST):
    pass


class AnalyticGuider:
    def __init__(self):
        self.flow = GaussianFlow()
        self.inner_model = SimpleNamespace(model_sampling=FlowSampling())

    def __call__(self, x, sigma, model_options=None, seed=None):
        return self.flow(x, sigma)


LATENT = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2)) * 0.5 + 0.7
DOWN = torch.linspace(1, 0, 31)


@pytest.mark.parametrize("sigma_end", [1.0, 0.7])
def test_invert_then_sample_with_the_stock_sampler(sigma_end):
    """z as NOISE over an empty latent; the empty latent's share at sigma_end < 1 is (1 − sigma)·0."""
    grid = inversion_sigmas(DOWN, 1e-3, sigma_end)
    inverted = InvertSampler("rf_solver").sample(AnalyticGuider(), grid, {"seed": 0}, None, torch.full_like(LATENT, 99.0), LATENT)
    assert torch.isfinite(inverted).all()
    empty = {"samples": torch.zeros_like(LATENT)}
    noise = LatentNoise(inverted, sigma_end).generate_noise(empty)
    stock = KSAMPLER(sample_midpoint, {})
    back = stock.sample(AnalyticGuider(), sampling_sigmas(grid), {"seed": 0}, None, noise, empty["samples"], None, True)
    # 30 midpoint steps each way on the Gaussian: 5e-6; the floor of 1e-3 adds its square times the bend of the path.
    assert rmse(back, LATENT) < 1e-3


def test_floor_noise_is_added_only_when_asked():
    grid = torch.tensor([0.05, 0.05 + 1e-6])
    noise = torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(4))
    for floor_noise, expected in ((False, 0.95 * LATENT), (True, 0.95 * LATENT + 0.05 * noise)):
        out = InvertSampler("euler", floor_noise=floor_noise).sample(AnalyticGuider(), grid, {}, None, noise, LATENT)
        assert rmse(out, expected) < 1e-4


def test_masks_are_left_out_and_falling_schedules_refused(caplog):
    sampler = InvertSampler("euler")
    grid = inversion_sigmas(DOWN)
    plain = sampler.sample(AnalyticGuider(), grid, {}, None, LATENT, LATENT)
    assert torch.equal(sampler.sample(AnalyticGuider(), grid, {}, None, LATENT, LATENT, torch.zeros_like(LATENT)), plain)
    assert "mask" in caplog.text
    with pytest.raises(NodeInputError, match="rise"):
        sampler.sample(AnalyticGuider(), DOWN, {}, None, LATENT, LATENT)
    with pytest.raises(NodeInputError, match="solver"):
        InvertSampler("rk4")


def test_noise_from_latent_checks_shape_and_sigma():
    noise = LatentNoise(LATENT)
    assert torch.equal(noise.generate_noise({"samples": torch.zeros(2, 1, 6, 6)}), LATENT)
    for shape in ((1, 4, 6, 6), (2, 4, 6, 8)):
        with pytest.raises(NodeInputError, match="NoiseFromLatent"):
            noise.generate_noise({"samples": torch.zeros(shape)})
    for sigma in (0.0, 1.5, float("nan")):
        with pytest.raises(NodeInputError, match="sigma_start"):
            LatentNoise(LATENT, sigma)


def test_slerp_keeps_length_and_angle():
    a, b = (torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)  # equal lengths: every point of the arc has them too
    whole = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).arccos()
    for t in (0.0, 0.25, 0.7, 1.0):
        c = noise_slerp(a, b, t)
        assert torch.allclose(c.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
        assert torch.allclose(torch.nn.functional.cosine_similarity(a.flatten(1), c.flatten(1)).clamp(-1, 1).arccos(), t * whole, atol=1e-6)
    assert torch.allclose(noise_slerp(a, a * (1 + 1e-9), 0.3), a) and torch.isfinite(noise_slerp(a, -a, 0.3)).all()
    assert torch.equal(noise_slerp(a[:1], b, 0.4)[1:], noise_slerp(a[:1], b[1:], 0.4))
    with pytest.raises(NodeInputError, match="Noise Slerp: input 'a, b'"):
        noise_slerp(a, b[:, :3], 0.5)


def test_slerp_as_a_batch():
    a, b = ({"samples": torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(seed))} for seed in (1, 2))
    ((row,), (one,)) = (RectiflowNoiseSlerp().execute(a=a, b=b, t=0.5, count=count) for count in (3, 1))
    assert row["samples"].shape[0] == 3 and torch.equal(row["samples"][1:2], one["samples"])
    assert torch.allclose(row["samples"][0], a["samples"][0]) and torch.allclose(row["samples"][2], b["samples"][0])


@pytest.mark.parametrize("sigmas", [
    torch.linspace(0.9, 0, 5),  # from another sigma
    torch.linspace(0, 1, 5),  # the inversion's own direction
    torch.tensor([1.0, 0.5, 0.5, 0.0]),
    torch.zeros(0),
])
def test_noise_from_a_latent_refuses_a_schedule_that_does_not_fall_from_there(sigmas):
    with pytest.raises(NodeInputError, match="NoiseFromLatent: input 'sigmas'.*fall from sigma_start, 1"):
        LatentNoise(LATENT, 1.0, sigmas)
    rising = inversion_sigmas(torch.linspace(1, 0, 5), sigma_end=0.7)
    assert torch.equal(LatentNoise(LATENT, 0.7, sampling_sigmas(rising)).samples, LATENT / 0.7)
