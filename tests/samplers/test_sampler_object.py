"""FlowSampler on the embedded host's KSAMPLER: what is left to the host, and what a flow needs instead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rectiflow.host.embedded.model_sampling import CONST, ModelSamplingDiscreteFlow
from rectiflow.host.embedded.samplers import KSAMPLER
from rectiflow.samplers.registry import SOLVERS
from rectiflow.samplers.sampler_object import FlowSampler
from rectiflow.tests.samplers.flows import GaussianFlow, rmse


class FlowSampling(ModelSamplingDiscreteFlow, CONST):
    pass


class AnalyticGuider:
    """A guider whose denoised is known: the Gaussian flow behind the calls a sampler makes."""

    def __init__(self):
        self.flow = GaussianFlow()
        self.inner_model = SimpleNamespace(model_sampling=FlowSampling())

    def __call__(self, x, sigma, model_options=None, seed=None):
        return self.flow(x, sigma)


def sampler(name="midpoint", start_from="noise") -> FlowSampler:
    return FlowSampler(KSAMPLER(SOLVERS[name].function, {}), start_from)


def run(flow_sampler, sigmas, noise, latent, mask=None, callback=None):
    extra_args = {"model_options": {}, "seed": 0}
    return flow_sampler.sample(AnalyticGuider(), torch.tensor(sigmas), extra_args, callback, noise, latent, mask, True)


NOISE, LATENT = torch.randn(2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
DOWN = torch.linspace(1, 0, 21).tolist()


def test_sampling_is_left_to_the_host():
    stock = KSAMPLER(SOLVERS["midpoint"].function, {})
    for sigmas in (DOWN, DOWN[5:], DOWN[:10]):
        assert torch.equal(run(sampler(), sigmas, NOISE, LATENT), run(stock, sigmas, NOISE, LATENT))


def test_inversion_ends_at_one_without_infinity_and_comes_back():
    seen = []
    z = run(sampler(), DOWN[::-1], torch.zeros_like(LATENT), LATENT, callback=lambda *report: seen.append(report))
    # midpoint with 20 steps on the Gaussian: 1.5e-5 in float64, rounding at the floor adds 1e-4 in float32.
    assert rmse(z, (LATENT - 0.7) / 0.5) < 1e-3
    assert [report[0] for report in seen] == list(range(20)) and seen[0][3] == 20
    back = run(sampler(start_from="latent"), DOWN, torch.zeros_like(z), z)
    assert rmse(back, LATENT) < 1e-3


def test_a_run_may_stop_and_go_on():
    half = run(sampler(start_from="latent"), DOWN[:11], NOISE, NOISE)
    whole = run(sampler(start_from="latent"), DOWN, NOISE, NOISE)
    assert rmse(run(sampler(start_from="latent"), DOWN[10:], NOISE, half), whole) < 1e-6


def test_starting_from_a_latent_leaves_it_and_its_mask_alone(caplog):
    before = LATENT.clone()
    mask = torch.zeros_like(LATENT)
    out = run(sampler(start_from="latent"), DOWN, NOISE, LATENT, mask)
    assert torch.equal(LATENT, before)
    assert torch.equal(out, run(sampler(start_from="latent"), DOWN, NOISE, LATENT))
    assert "noise mask" in caplog.text


def test_names_that_other_packs_look_up_are_there():
    flow_sampler = FlowSampler(KSAMPLER(SOLVERS["heun"].function, {"last_step": "exact"}))
    assert flow_sampler.sampler_function is SOLVERS["heun"].function
    assert flow_sampler.extra_options == {"last_step": "exact"} and flow_sampler.inpaint_options == {}


@pytest.mark.parametrize("start_from", ["noise", "latent"])
def test_interrupts_pass_through(start_from):
    def interrupt(*report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sampler(start_from=start_from), DOWN, NOISE, LATENT, callback=interrupt)
