"""First-order samplers: exact where the noise estimate is constant, on the flow path and on that of epsilon models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.model_sampling import CONST, EPS, ModelSamplingDiscrete, ModelSamplingDiscreteFlow
from rectiflow.samplers.first_order import sample_first_order, sample_one_step
from rectiflow.samplers.solvers import sample_euler
from rectiflow.tests.samplers.flows import GaussianFlow, rmse

DATA, NOISE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Flow(ModelSamplingDiscreteFlow, CONST):
    pass


class Diffusion(ModelSamplingDiscrete, EPS):
    pass


class ConstantNoise:
    """The model of one known pair: its noise estimate is NOISE everywhere. Reached as a host's: wrapper, guider, model."""

    def __init__(self, sampling):
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
        self.flow = isinstance(sampling, CONST)
        self.times: list[float] = []

    def __call__(self, x, sigma):
        self.times.append(float(sigma[0]))
        s = sigma.reshape(-1, 1, 1)
        # At sigma 1 the flow's x is noise alone and holds no data; the pair's own is the answer.
        return DATA.expand_as(x) if self.flow and s[0] == 1 else (x - s * NOISE) / ((1 - s) if self.flow else 1)


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
@pytest.mark.parametrize("kind", [Flow, Diffusion])
def test_constant_noise_gives_the_data_with_any_number_of_steps(kind, steps):
    model, top = ConstantNoise(kind()), 1.0 if kind is Flow else 14.6
    sigmas = torch.linspace(top, 0, steps + 1, dtype=torch.float64)
    start = NOISE if kind is Flow else DATA + top * NOISE
    assert rmse(sample_first_order(model, start, sigmas), DATA) < 1e-6
    assert len(model.times) == steps


def test_on_the_flow_path_it_is_euler():
    x, grid = torch.randn(4, 6, dtype=torch.float64), torch.linspace(1, 0, 9, dtype=torch.float64)
    assert rmse(sample_first_order(GaussianFlow(), x, grid), sample_euler(GaussianFlow(), x, grid)) < 1e-14


@pytest.mark.parametrize("kind", [Flow, Diffusion])
def test_final_sigma_min_stops_at_the_models_table(kind):
    sampling = kind()
    top = float(sampling.sigma_max)
    sigmas = torch.linspace(top, 0, 6, dtype=torch.float64)
    start = NOISE if kind is Flow else DATA + top * NOISE
    low = float(sampling.sigma_min)
    expected = ((1 - low) if kind is Flow else 1) * DATA + low * NOISE
    assert rmse(sample_first_order(ConstantNoise(sampling), start, sigmas, final="sigma_min"), expected) < 1e-6


def test_fresh_noise_keeps_mean_and_spread():
    """DDPM-like noise on the Gaussian flow: bias of order h at 200 steps, standard errors 0.001."""
    x = torch.randn(100, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = sample_first_order(GaussianFlow(), x, torch.linspace(1, 0, 201, dtype=torch.float64), {"seed": 2}, eta=1.0)
    assert float(out.mean()) == pytest.approx(0.7, rel=0.01) and float(out.std()) == pytest.approx(0.5, rel=0.03)
    single = sample_first_order(GaussianFlow(), x[3:4], torch.linspace(1, 0, 201, dtype=torch.float64), {"seed": 5}, eta=1.0)
    assert torch.equal(out[3:4], single)


def test_one_step_is_one_call():
    model = ConstantNoise(Flow())
    assert torch.equal(sample_one_step(model, NOISE, torch.tensor([1.0, 0.0])), DATA)
    assert model.times == [1.0]
    for wrong in ([1.0, 0.5, 0.0], [1.0, 0.5], [0.0, 0.0], [1.0]):
        with pytest.raises(NodeInputError, match="OneStepSampler"):
            sample_one_step(model, NOISE, torch.tensor(wrong))


def test_schedules_beyond_one_belong_to_other_models():
    with pytest.raises(NodeInputError, match="sigmas"):
        sample_first_order(ConstantNoise(Flow()), NOISE, torch.tensor([14.6, 0.0]))
    with pytest.raises(NodeInputError, match="FirstOrderSampler"):
        sample_first_order(ConstantNoise(Flow()), NOISE, torch.tensor([0.0, 1.0]))
