"""The shift of a model: read, replaced, and schedules made with it, on both kinds of flow tables."""

from __future__ import annotations

import json
import math
import subprocess

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.model_sampling import CONST, EPS, ModelSamplingDiscrete, ModelSamplingDiscreteFlow, ModelSamplingFlux
from rectiflow.host.embedded.schedulers import calculate_sigmas
from rectiflow.samplers import schedules as S
from rectiflow.samplers.model_shift import SCHEDULERS, effective_alpha, flow_sigmas, latent_tokens, resolve_alpha, shifted_model_sampling


class DiscreteFlow(ModelSamplingDiscreteFlow, CONST):
    pass


class FluxFlow(ModelSamplingFlux, CONST):
    pass


class Diffusion(ModelSamplingDiscrete, EPS):
    pass


def discrete(shift: float, multiplier: float = 1000) -> DiscreteFlow:
    sampling = DiscreteFlow()
    sampling.set_parameters(shift=shift, multiplier=multiplier)
    return sampling


def flux(mu: float) -> FluxFlow:
    sampling = FluxFlow()
    sampling.set_parameters(shift=mu)
    return sampling


KINDS = [
    pytest.param(discrete(3.0), 3.0, id="sd3"), pytest.param(discrete(1.0), 1.0, id="no-shift"),
    pytest.param(discrete(1.73, 1.0), 1.73, id="aura"), pytest.param(flux(1.15), math.exp(1.15), id="flux"),
    pytest.param(flux(0.0), 1.0, id="flux-0"),
]


@pytest.mark.parametrize(("sampling", "alpha"), KINDS)
def test_effective_alpha_is_read_off_either_kind(sampling, alpha):
    assert effective_alpha(sampling) == pytest.approx(alpha, rel=1e-12)


@pytest.mark.parametrize(("sampling", "alpha"), KINDS)
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 28, 333, 1000])
@pytest.mark.parametrize("denoise", [1.0, 0.6, 0.35])
def test_simple_equals_the_basic_scheduler_bit_for_bit(sampling, alpha, steps, denoise):
    basic = calculate_sigmas(sampling, "simple", steps if denoise == 1 else int(steps / denoise))[-(steps + 1):]
    assert torch.equal(flow_sigmas(sampling, "simple", steps, "from_model", alpha, denoise=denoise), basic)
    assert flow_sigmas(sampling, "simple", steps, "from_model", alpha, denoise=0.0).shape == (0,)


@pytest.mark.parametrize(("sampling", "alpha"), KINDS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedules_of_a_model_fall_from_one_to_zero_and_carry_its_shift(sampling, alpha, scheduler):
    sigmas = flow_sigmas(sampling, scheduler, 20, "from_model", alpha)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (21,)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas[1:] < sigmas[:-1]).all()
    grid = {"logit_normal_cdf": S.logit_normal_grid, "simple": None, **S.GRIDS}[scheduler]
    if grid is not None:
        assert torch.equal(sigmas, S.as_sigmas(S.shift_sigma(grid(20), effective_alpha(sampling))))


def test_linear_quadratic_equals_the_hosts_on_an_unshifted_model():
    ours = flow_sigmas(discrete(1.0), "linear_quadratic", 20, "from_model", 1.0)
    assert (ours - calculate_sigmas(discrete(1.0), "linear_quadratic", 20)).abs().max() < 1e-6


def test_beta_is_the_hosts_within_two_entries_of_its_table():
    ours = flow_sigmas(flux(1.15), "beta", 20, "from_model", math.exp(1.15))
    # The host rounds to a table of 10000 and counts its entries from 0, so u is off by 1.5 entries; the shift stretches by alpha.
    assert (ours - calculate_sigmas(flux(1.15), "beta", 20)).abs().max() < math.exp(1.15) * 1.6e-4


def test_the_shift_asked_for_replaces_the_models_own():
    expected = S.as_sigmas(S.shift_sigma(S.uniform_grid(10), 5.0))
    for sampling in (discrete(3.0), flux(1.15)):
        assert torch.equal(flow_sigmas(sampling, "uniform", 10, "sd3_alpha", 5.0), expected)
        assert (flow_sigmas(sampling, "simple", 10, "sd3_alpha", 5.0) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_window_keeps_the_steps_and_its_ends(scheduler):
    sigmas = flow_sigmas(discrete(3.0), scheduler, 12, "from_model", 3.0, start=0.8, end=0.1)
    assert sigmas.shape == (13,) and sigmas[0] == torch.tensor(0.8) and sigmas[-1] == torch.tensor(0.1)
    assert (sigmas[1:] < sigmas[:-1]).all()
    for start, end in ((0.1, 0.8), (0.5, 0.5), (1.2, 0.0), (1.0, -0.1), (float("nan"), 0.0)):
        with pytest.raises(NodeInputError, match="start, end"):
            flow_sigmas(discrete(3.0), scheduler, 12, "from_model", 3.0, start=start, end=end)


def test_modes_give_the_alpha_they_name():
    model, square = flux(1.15), torch.zeros(1, 16, 128, 128)

    def alpha(mode, value=3.0, samples=None, base=65536, cell=8):
        return resolve_alpha("test", mode, value, model, samples, base, cell)

    assert alpha("from_model") == pytest.approx(math.exp(1.15))
    assert alpha("sd3_alpha", 6.0) == 6.0
    assert alpha("flux_mu", 1.15) == pytest.approx(3.158, abs=1e-3)
    assert alpha("flux_mu", 99.0, square) == pytest.approx(math.exp(1.15))
    assert alpha("flux_mu", 99.0, torch.zeros(1, 16, 96, 168)) == pytest.approx(math.exp(1.1392), rel=1e-4)
    assert alpha("resolution", samples=square) == 4.0
    assert alpha("resolution", samples=torch.zeros(1, 16, 16, 16), cell=4, base=64 * 64) == 1.0
    for mode, value in (("flux_mu", 20.0), ("sd3_alpha", 1e-9), ("sd3_alpha", float("nan")), ("flux_mu", float("nan"))):
        with pytest.raises(NodeInputError, match="value"):
            alpha(mode, value)
    with pytest.raises(NodeInputError, match="latent"):
        alpha("resolution")
    with pytest.raises(NodeInputError, match="shift_mode"):
        alpha("mu")


def test_tokens_count_padded_patches_and_frames():
    assert latent_tokens(torch.zeros(1, 16, 128, 128)) == 4096
    assert latent_tokens(torch.zeros(1, 16, 33, 40)) == 17 * 20
    assert latent_tokens(torch.zeros(1, 16, 5, 32, 32)) == 5 * 256


def test_other_models_are_refused():
    with pytest.raises(NodeInputError, match="flow model"):
        effective_alpha(Diffusion())


@pytest.mark.parametrize(("sampling", "alpha"), KINDS)
@pytest.mark.parametrize("new", [1.0, 2.0, 6.0])
def test_a_new_shift_keeps_everything_else(sampling, alpha, new):
    before = sampling.sigmas.clone()
    changed = shifted_model_sampling(sampling, new)
    assert type(changed) is type(sampling) and len(changed.sigmas) == len(before)
    assert effective_alpha(changed) == pytest.approx(new, rel=1e-12)
    assert torch.equal(sampling.sigmas, before)
    half = torch.tensor(0.5)
    assert changed.timestep(half) == sampling.timestep(half)
    assert torch.equal(changed.sigmas, type(changed).sigma(changed, changed.timestep(1.0) * torch.arange(1, len(before) + 1) / len(before)))


_IN_COMFYUI = """
import comfy.options, json, torch
comfy.options.enable_args_parsing()
import comfy.samplers, comfy.model_sampling as m
def make(base, **options):
    sampling = type("Sampling", (base, m.CONST), {})()
    sampling.set_parameters(**options)
    return sampling
models = {"sd3": make(m.ModelSamplingDiscreteFlow, shift=3.0), "flux": make(m.ModelSamplingFlux, shift=1.15)}
print(json.dumps({name: {str(n): comfy.samplers.calculate_sigmas(model, "simple", n).tolist() for n in (1, 4, 20, 28)}
                  for name, model in models.items()}))
"""


@pytest.mark.comfyui
def test_simple_equals_real_comfyui_bit_for_bit(comfyui, comfyui_python):
    program = "import sys; sys.argv.append('--cpu')\n" + _IN_COMFYUI
    run = subprocess.run([comfyui_python, "-c", program], cwd=comfyui, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.strip().splitlines()[-1])
    for name, model in (("sd3", discrete(3.0)), ("flux", flux(1.15))):
        for steps, sigmas in answers[name].items():
            assert torch.equal(flow_sigmas(model, "simple", int(steps), "from_model", 1.0), torch.tensor(sigmas)), (name, steps)
