"""Every sampler that KSamplerSelect lists, on flows whose result is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from rectiflow.host.embedded import k_diffusion_sampling as k
from rectiflow.host.embedded.model_sampling import CONST, EPS, ModelSamplingDiscrete, ModelSamplingDiscreteFlow
from rectiflow.host.embedded.sampler_names import SAMPLER_NAMES
from rectiflow.host.embedded.samplers import ksampler, sampler_object
from rectiflow.host.embedded.schedulers import calculate_sigmas


class Flow(ModelSamplingDiscreteFlow, CONST):
    pass


class Eps(ModelSamplingDiscrete, EPS):
    pass


SAMPLINGS = {"flow": Flow(), "eps": Eps()}
AVAILABLE = [name for name in SAMPLER_NAMES if name not in k.UNAVAILABLE and name != "ddim"]
STOCHASTIC = {name for name in AVAILABLE if "ancestral" in name}
STOCHASTIC |= {"lcm", "ddpm", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece"}

# On a flow these do not keep the distribution, here as in ComfyUI: the first four add noise as if sigma were variance-exploding, and lcm
# expects a model that jumps to a sample where an ordinary one gives the mean of all.
BIASED = {"ddpm", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "lcm"}


def model(sampling, denoise):
    """What a sampler function is given: `denoise(x, sigma)` behind guider and BaseModel, with the hook that CFG++ reads."""

    def call(x, sigma, model_options=None, seed=None, denoise_mask=None):
        denoised = denoise(x, sigma.view(-1, 1, 1, 1))
        for function in (model_options or {}).get("sampler_post_cfg_function", []):
            denoised = function({"denoised": denoised, "uncond_denoised": denoised, "cond_denoised": denoised})
        return denoised

    patcher = SimpleNamespace(get_model_object=lambda name: sampling)
    call.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling), model_patcher=patcher)
    return call


def run(name, sampling, denoise, sigmas, x, callback=None, **options):
    function = sampler_object(name).sampler_function
    return function(model(sampling, denoise), x, sigmas, extra_args={"seed": 1}, callback=callback, disable=True, **options)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("name", AVAILABLE)
def test_a_known_picture_is_reached_exactly(name, kind, steps):
    """denoised = c everywhere: whatever the noise on the way, the end is c, with a callback each step and x left alone."""
    sampling = SAMPLINGS[kind]
    sigmas = calculate_sigmas(sampling, "simple", steps)
    if name in k.FROM_LIMITS:
        sigmas = torch.cat([sigmas, sigmas[-1:]])[: steps + 1]
    target = torch.full((2, 3, 4, 4), 0.25)
    x = sampling.noise_scaling(sigmas[0], noise(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), True)
    before, reports = x.clone(), []
    result = run(name, sampling, lambda x, sigma: target.expand_as(x), sigmas, x, callback=reports.append)
    last = float(sigmas[-2]) if name in k.FROM_LIMITS else 0.001 if "uni_pc" in name else 0.0
    # uni_pc ends at 0.001, the DPM-Solvers at the last sigma above 0: that much of the start is left.
    remaining = last / float(sigmas[0]) * (before - target).abs().max().item()
    assert (result - target).abs().max().item() <= remaining * 1.05 + 2e-5
    assert torch.equal(x, before) and [report["i"] for report in reports] == list(range(len(reports)))
    if name != "dpm_fast" and name != "dpm_adaptive":
        assert len(reports) == steps
    assert all({"x", "i", "sigma", "sigma_hat", "denoised"} <= report.keys() for report in reports)


def gaussian(mean, std):
    """The exact denoiser of N(mean, std²) on a flow, and where the flow takes a point of sigma = 1."""

    def denoise(x, sigma):
        variance = ((1 - sigma) * std) ** 2 + sigma**2
        return mean + (1 - sigma) * std**2 / variance * (x - (1 - sigma) * mean)

    return denoise, lambda x: mean + std * x


ORDERS = {
    "euler": 1, "euler_cfg_pp": 1, "heun": 2, "dpm_2": 2, "dpmpp_2m": 2, "res_multistep": 2, "ipndm": 2, "ipndm_v": 2, "lms": 2,
    "deis": 2, "heunpp2": 1, "gradient_estimation": 1, "dpmpp_2m_cfg_pp": 1, "uni_pc": 2, "uni_pc_bh2": 2, "res_multistep_cfg_pp": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_order_on_a_gaussian_flow(name):
    """The error falls with the step at the solver's order, at most 2 for multistep solvers, whose first step is Euler's.

    Measured in float64 on sigma 0.9 to 0.2: the ends, where first-order steps are taken, lower every order.
    """
    denoise, _ = gaussian(0.7, 0.5)
    eps = torch.full((1, 1, 1, 1), -0.4, dtype=torch.float64)

    def exact(sigma):  # standardised x is constant along the flow
        return (1 - sigma) * 0.7 + math.sqrt(((1 - sigma) * 0.5) ** 2 + sigma**2) * eps

    errors = []
    for steps in (32, 64):
        sigmas = torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64)
        result = run(name, SAMPLINGS["flow"], denoise, sigmas, exact(0.9))
        errors.append(abs(float(result - exact(0.2))))
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) > ORDERS[name] - 0.35


@pytest.mark.parametrize("name", sorted(STOCHASTIC - BIASED))
def test_stochastic_samplers_keep_the_distribution_of_a_gaussian_flow(name):
    """20000 points, 40 steps: mean and spread of N(0.7, 0.5²) within a few hundredths, and the seed decides the result."""
    denoise, _ = gaussian(0.7, 0.5)
    sigmas = calculate_sigmas(SAMPLINGS["flow"], "simple", 40)
    result = run(name, SAMPLINGS["flow"], denoise, sigmas, noise(20000, 1, 1, 1))
    assert float(result.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(result.std()) == pytest.approx(0.5, abs=0.06)
    assert torch.equal(result, run(name, SAMPLINGS["flow"], denoise, sigmas, noise(20000, 1, 1, 1)))


@pytest.mark.parametrize("name", sorted(set(AVAILABLE) - STOCHASTIC))
def test_deterministic_samplers_map_noise_to_the_gaussian(name):
    denoise, exact = gaussian(0.7, 0.5)
    x = noise(64, 1, 1, 1)
    result = run(name, SAMPLINGS["flow"], denoise, calculate_sigmas(SAMPLINGS["flow"], "simple", 100), x)
    assert (result - exact(x)).abs().max().item() < 0.1


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "heunpp2"])
def test_churn_changes_the_path_but_not_a_known_picture(name):
    sigmas = calculate_sigmas(SAMPLINGS["eps"], "karras", 10)
    result = run(name, SAMPLINGS["eps"], lambda x, sigma: torch.zeros_like(x), sigmas, noise(1, 1, 8, 8) * 14, s_churn=5.0)
    assert result.abs().max().item() < 1e-4


@pytest.mark.parametrize("name", AVAILABLE)
def test_an_empty_or_single_schedule_changes_nothing(name):
    x = noise(1, 1, 2, 2)
    result = run(name, SAMPLINGS["flow"], lambda x, sigma: 0 * x, torch.tensor([1.0]), x)
    assert result is x or torch.allclose(result, x, atol=1e-6)


def test_dpm_adaptive_counts_its_steps():
    denoise, _ = gaussian(0.7, 0.5)
    x, info = k.sample_dpm_adaptive(model(SAMPLINGS["flow"], denoise), noise(4, 1, 1, 1), 0.01, torch.tensor(0.99), return_info=True)
    assert info["steps"] == info["n_accept"] + info["n_reject"] and info["nfe"] == 3 * info["steps"] > 0 and torch.isfinite(x).all()
    with pytest.raises(ValueError, match="order"):
        k.sample_dpm_adaptive(model(SAMPLINGS["flow"], denoise), x, 0.01, 1.0, order=4)
    with pytest.raises(ValueError, match="above 0"):
        k.sample_dpm_fast(model(SAMPLINGS["flow"], denoise), x, 0.0, 1.0, 4)


@pytest.mark.parametrize("name", k.UNAVAILABLE)
def test_what_is_not_here_names_what_is(name):
    with pytest.raises(ValueError, match=f"{name}.*{k.UNAVAILABLE[name]}"):
        sampler_object(name)


def test_every_listed_name_is_here_or_refused_and_others_are_refused():
    assert {name for name in SAMPLER_NAMES if name in k.UNAVAILABLE} == set(k.UNAVAILABLE)
    assert set(k.UNAVAILABLE.values()) <= set(AVAILABLE) and len(AVAILABLE) == 42 - 8 - 1
    with pytest.raises(ValueError, match="eulr.*euler, euler_cfg_pp"):
        ksampler("eulr")


def test_ddim_is_euler_with_fresh_noise_around_a_mask():
    ddim = sampler_object("ddim")
    assert ddim.sampler_function is k.sample_euler and ddim.inpaint_options == {"random": True}


def test_to_d_takes_one_sigma_or_one_each():
    x, denoised = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert torch.equal(k.to_d(x, torch.tensor(0.5), denoised), x * 2)
    assert k.to_d(x, torch.tensor([0.5, 0.25]), denoised)[:, 0, 0, 0].tolist() == [2, 4]
    assert torch.equal(k.to_d(x, 0.5, denoised), x * 2)


def test_ancestral_split_keeps_the_variance():
    down, up = k.get_ancestral_step(torch.tensor(2.0), torch.tensor(1.0))
    assert float(down**2 + up**2) == pytest.approx(1.0) and float(up) == pytest.approx(math.sqrt(0.75))
    assert k.get_ancestral_step(2.0, 1.0, eta=0) == (1.0, 0.0)


def test_log_snr_and_back():
    sigmas = torch.tensor([0.1, 0.5, 0.9])
    for sampling in SAMPLINGS.values():
        lambdas = k.sigma_to_half_log_snr(sigmas, sampling)
        torch.testing.assert_close(k.half_log_snr_to_sigma(lambdas, sampling), sigmas)
    torch.testing.assert_close(k.sigma_to_half_log_snr(sigmas, SAMPLINGS["flow"]), ((1 - sigmas) / sigmas).log())
    full = torch.tensor([1.0, 0.5, 0.0])
    assert 0.999 < float(k.offset_first_sigma_for_snr(full, SAMPLINGS["flow"])[0]) < 1 and full[0] == 1
    assert k.offset_first_sigma_for_snr(full, SAMPLINGS["eps"]) is full
