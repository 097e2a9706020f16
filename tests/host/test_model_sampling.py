"""Flow tables, prediction types and schedules against closed forms and ComfyUI's published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.host.embedded import model_sampling as ms
from rectiflow.host.embedded.sampler_names import SCHEDULER_NAMES
from rectiflow.host.embedded.schedulers import SCHEDULER_HANDLERS, beta_cdf, beta_quantile, calculate_sigmas


class Flux(ms.ModelSamplingFlux, ms.CONST):
    pass


class SD3(ms.ModelSamplingDiscreteFlow, ms.CONST):
    def __init__(self, shift=3.0):
        super().__init__()
        self.set_parameters(shift=shift)


class Eps(ms.ModelSamplingDiscrete, ms.EPS):
    pass


class V(ms.ModelSamplingDiscrete, ms.V_PREDICTION):
    pass


def test_tables():
    flux, sd3 = Flux(), SD3()
    assert flux.sigmas.shape == (10000,) and sd3.sigmas.shape == (1000,)
    assert float(flux.sigma_max) == 1.0 and float(sd3.sigma_max) == 1.0
    assert float(flux.sigma_min) == pytest.approx(0.000316, abs=5e-7)
    assert float(sd3.sigma_min) == pytest.approx(3e-3 / (1 + 2e-3), rel=1e-6)
    assert torch.all(flux.sigmas.diff() > 0) and torch.all(sd3.sigmas.diff() > 0)


@pytest.mark.parametrize(("sampling", "expected"), [(Flux(), [1, 0.90453, 0.75951, 0.51284, 0]), (SD3(), [1, 0.9, 0.75, 0.5, 0])])
def test_simple_schedule_of_four_steps(sampling, expected):
    assert calculate_sigmas(sampling, "simple", 4).tolist() == pytest.approx(expected, abs=5e-6)


def test_flow_times():
    sd3, aura = SD3(), ms.ModelSamplingDiscreteFlow()
    aura.set_parameters(shift=1.73, multiplier=1.0)
    sigma = torch.tensor([0.25, 1.0])
    assert torch.equal(sd3.timestep(sigma), sigma * 1000) and torch.equal(aura.timestep(sigma), sigma)
    assert float(sd3.sigma(torch.tensor(500.0))) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    mu = 1.15
    assert float(Flux().sigma(torch.tensor(0.5))) == pytest.approx(math.exp(mu) / (math.exp(mu) + 1))
    assert ms.time_snr_shift(1.0, 0.3) == 0.3


@pytest.mark.parametrize("sampling", [Flux(), SD3(), Eps()])
def test_percent_to_sigma_runs_from_everything_to_nothing(sampling):
    values = [sampling.percent_to_sigma(p / 10) for p in range(11)]
    assert values[0] >= float(sampling.sigma_max) and values[-1] == 0.0
    assert all(a > b for a, b in zip(values, values[1:]))


def test_percent_to_sigma_on_flows_is_the_shifted_time():
    assert SD3().percent_to_sigma(0.25) == pytest.approx(3 * 0.75 / (1 + 2 * 0.75))
    assert [SD3().percent_to_sigma(p) for p in (-1, 0, 1, 2)] == [1.0, 1.0, 0.0, 0.0]


def test_const_is_the_straight_line():
    x0, noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    x0, noise = x0.unsqueeze(0), noise.unsqueeze(0)
    sampling, sigma = SD3(), torch.tensor([0.3])
    x = sampling.noise_scaling(sigma, noise, x0)
    torch.testing.assert_close(x, 0.7 * x0 + 0.3 * noise)
    torch.testing.assert_close(sampling.calculate_denoised(sigma, noise - x0, x), x0)
    assert sampling.calculate_input(sigma, x) is x
    torch.testing.assert_close(sampling.inverse_noise_scaling(sigma, sampling.noise_scaling(sigma, 0 * noise, x0)), x0)
    assert torch.equal(sampling.inverse_noise_scaling(torch.tensor(0.0), x), x)
    assert torch.isinf(sampling.inverse_noise_scaling(torch.tensor(1.0), torch.ones(1, 1))).all()  # the trap inversion must avoid


def test_eps_and_v_predictions_recover_the_picture():
    x0, noise = torch.ones(1, 2, 2, 2), torch.full((1, 2, 2, 2), -0.5)
    sigma = torch.tensor([2.0])
    eps, v = Eps(), V()
    x = eps.noise_scaling(sigma, noise, x0)
    torch.testing.assert_close(x, x0 + 2 * noise)
    torch.testing.assert_close(eps.calculate_denoised(sigma, noise, x), x0)
    torch.testing.assert_close(eps.calculate_input(sigma, x), x / math.sqrt(5))
    alpha, std = 1 / math.sqrt(5), 2 / math.sqrt(5)
    torch.testing.assert_close(v.calculate_denoised(sigma, alpha * noise - std * x0, x), x0)
    torch.testing.assert_close(eps.noise_scaling(sigma, noise, 0 * x0, max_denoise=True), noise * math.sqrt(5))


def test_discrete_table_and_its_inverse():
    sampling = Eps()
    assert float(sampling.sigma_min) == pytest.approx(0.0292, abs=1e-4) and float(sampling.sigma_max) == pytest.approx(14.6146, abs=1e-3)
    steps = torch.tensor([0, 17, 500, 999])
    assert torch.equal(sampling.timestep(sampling.sigma(steps)), steps)
    zero_snr = ms.ModelSamplingDiscrete(zsnr=True)
    assert float(zero_snr.sigma_max) > 4000 and float(zero_snr.sigma_min) == pytest.approx(float(sampling.sigma_min), rel=1e-4)


def test_reshape_sigma():
    assert ms.reshape_sigma(torch.tensor([0.5]), 4).shape == ()
    assert ms.reshape_sigma(torch.tensor([0.5, 0.6]), 4).shape == (2, 1, 1, 1)


# Schedules


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("sampling", [Flux(), SD3(), Eps()], ids=["flux", "sd3", "eps"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_schedules_descend_to_zero(name, sampling, steps):
    sigmas = calculate_sigmas(sampling, name, steps)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu"
    assert torch.all(sigmas.diff() <= 0) and sigmas[-1] == 0 and torch.isfinite(sigmas).all()
    if name not in ("ddim_uniform", "beta"):  # these two may round to more or fewer table entries
        assert len(sigmas) == steps + 1
    if name != "ddim_uniform":
        assert float(sigmas[0]) == pytest.approx(float(sampling.sigma_max), rel=1e-5)


def test_the_handlers_are_the_listed_names():
    assert tuple(SCHEDULER_HANDLERS) == SCHEDULER_NAMES


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="simpel.*simple, sgm_uniform"):
        calculate_sigmas(SD3(), "simpel", 4)


def test_sgm_uniform_and_normal_differ_by_the_last_time():
    sgm, normal = calculate_sigmas(SD3(1.0), "sgm_uniform", 4), calculate_sigmas(SD3(1.0), "normal", 4)
    assert sgm.tolist() == pytest.approx([1.0, 0.75025, 0.5005, 0.25075, 0.0], abs=1e-5)
    assert normal.tolist() == pytest.approx([1.0, 0.667, 0.334, 0.001, 0.0], abs=1e-5)


def test_karras_and_exponential_are_even_in_their_own_scale():
    sigmas = calculate_sigmas(Eps(), "karras", 5)[:-1].double() ** (1 / 7)
    torch.testing.assert_close(sigmas.diff(), sigmas.diff().mean().expand(4), rtol=1e-5, atol=0)
    logs = calculate_sigmas(Eps(), "exponential", 5)[:-1].double().log()
    torch.testing.assert_close(logs.diff(), logs.diff().mean().expand(4), rtol=1e-5, atol=0)


def test_linear_quadratic_is_linear_first_and_smooth_at_the_seam():
    progress = 1 - calculate_sigmas(SD3(), "linear_quadratic", 40).double()
    assert progress[20] == pytest.approx(0.025, abs=1e-6)
    torch.testing.assert_close(progress[:21].diff(), torch.full((20,), 0.025 / 20, dtype=torch.float64), atol=1e-6, rtol=0)
    second = progress[20:].diff().diff()
    torch.testing.assert_close(second, second.mean().expand_as(second), atol=1e-6, rtol=0)


@pytest.mark.parametrize("x", [1e-12, 0.001, 0.3, 0.5, 0.9, 1 - 1e-9])
def test_beta_distribution_where_it_has_a_closed_form(x):
    assert beta_cdf(x, 1, 1) == pytest.approx(x, rel=1e-12)
    assert beta_cdf(x, 2, 1) == pytest.approx(x * x, rel=1e-11)
    assert beta_cdf(x, 0.5, 0.5) == pytest.approx(2 / math.pi * math.asin(math.sqrt(x)), rel=1e-11)
    assert beta_cdf(beta_quantile(x, 0.6, 0.6), 0.6, 0.6) == pytest.approx(x, rel=1e-9)
    assert beta_quantile(x, 0.6, 0.6) == pytest.approx(1 - beta_quantile(1 - x, 0.6, 0.6), abs=1e-7)


def test_beta_schedule_is_dense_at_both_ends():
    sigmas = calculate_sigmas(SD3(1.0), "beta", 20)
    steps = sigmas.diff().abs()
    assert steps[0] < steps[10] > steps[-2]
