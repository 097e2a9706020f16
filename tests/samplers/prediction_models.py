"""Networks with known answers behind the host's own BaseModel: Gaussian data read as noise, velocity or mean velocity, and a random net."""

from __future__ import annotations

import torch
from rectiflow.host.embedded.latent_formats import LatentFormat
from rectiflow.host.embedded.model_base import BaseModel, ModelConfig, ModelType
from rectiflow.host.embedded.model_patcher import ModelPatcher
from rectiflow.host.embedded.model_sampling import EPS
from rectiflow.samplers.flow_maps import TARGET

CPU = torch.device("cpu")
MEAN, SD = 0.7, 0.5


class ContinuousEps(EPS, torch.nn.Module):
    """An epsilon model's levels without a table of times: the network's time is log sigma, levels from 0.0005 to 1000."""

    def __init__(self):
        super().__init__()
        self.sigma_data = 1.0
        self.register_buffer("sigmas", torch.logspace(-3.3, 3, 1000, dtype=torch.float64))

    sigma_min = property(lambda self: self.sigmas[0])
    sigma_max = property(lambda self: self.sigmas[-1])

    def timestep(self, sigma):
        return sigma.log()

    def sigma(self, timestep):
        return timestep.exp()

    def percent_to_sigma(self, percent):
        return 999999999.9 if percent <= 0 else 0.0 if percent >= 1 else float(self.sigmas[int((1 - percent) * 999)])


def gaussian_noise_estimate(network_input: torch.Tensor, ve: torch.Tensor) -> torch.Tensor:
    """E[noise | x_ve] for data N(MEAN, SD²), from the input x_ve/sqrt(ve² + 1)."""
    ve = ve.reshape(-1, *[1] * (network_input.ndim - 1))
    x = network_input * torch.sqrt(ve**2 + 1)
    return (x - (SD**2 * x + ve**2 * MEAN) / (SD**2 + ve**2)) / ve


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dtype = torch.float32
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs):
        self.calls.append((x.clone(), timestep.clone()))
        return self.answer(x, timestep, transformer_options)


class RandomUNet(_Net):
    """One random convolution of the state and the cosine of the time: nothing about its output is special."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3, generator=generator) / 6, requires_grad=False)

    def answer(self, x, timestep, options):
        return torch.nn.functional.conv2d(x, self.weight, padding=1) + torch.cos(timestep / 300).reshape(-1, 1, 1, 1)


class KnownPair(_Net):
    """Puts out `difference`, whatever it is asked: the straight flow of one pair."""

    def __init__(self, difference: torch.Tensor):
        super().__init__()
        self.difference = difference

    def answer(self, x, timestep, options):
        return self.difference.expand_as(x)


class GaussianMap(_Net):
    """The exact flow map of N(MEAN, SD²): the mean velocity from its time to the second one, the velocity where both are equal."""

    def answer(self, x, timestep, options):
        s = timestep.double().reshape(-1, 1, 1, 1)
        t = options[TARGET].double() if TARGET in options else s

        def spread(level):
            return torch.sqrt(((1 - level) * SD) ** 2 + level**2)

        # With x = (1 − s)·MEAN + spread(s)·z the map keeps z; the difference of spreads is written so that t → s loses nothing.
        z = (x.double() - (1 - s) * MEAN) / spread(s)
        slope = ((s + t) * (1 + SD**2) - 2 * SD**2) / (spread(s) + spread(t))
        return (slope * z - MEAN).float()


class PlainLatent(LatentFormat):
    """Model space is the codec's."""


def made_model(network: _Net, kind: ModelType = ModelType.EPS) -> ModelPatcher:
    settings = {} if kind == ModelType.EPS else {"shift": 1.0, "multiplier": 1.0}
    config = ModelConfig(
        image_model="toy", unet_config={}, latent_format=PlainLatent(), model_type=kind, sampling_settings=settings,
        memory_usage_factor=1.0,
    )  # fmt: skip
    return ModelPatcher(BaseModel(config, network), CPU, CPU)
