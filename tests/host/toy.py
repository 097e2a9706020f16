"""A velocity network small enough to know its every output, inside the host's own BaseModel, patcher and host."""

from __future__ import annotations

import torch
from rectiflow.host.embedded.context import Host, HostSettings
from rectiflow.host.embedded.latent_formats import LatentFormat
from rectiflow.host.embedded.model_base import BaseModel, ModelConfig, ModelType
from rectiflow.host.embedded.model_management import MemoryManager
from rectiflow.host.embedded.model_patcher import ModelPatcher
from rectiflow.host.embedded.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from rectiflow.host.embedded.sample import sample_custom
from rectiflow.host.embedded.samplers import sampler_object

CPU = torch.device("cpu")
SIGMAS = torch.tensor([1.0, 0.7, 0.3, 0.0])
NOISE = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(0))
EMPTY = torch.zeros(2, 2, 4, 6)
KINDS = [value for name, value in vars(WrappersMP).items() if name.isupper()]


class ToyNet(torch.nn.Module):
    """v = sigma·x + gain·(mean of the context's tokens) [+ control], pixel by pixel: joining conditions cannot change it.

    Context channels are latent channels. `calls` records what each forward saw.
    """

    def __init__(self, channels: int = 2, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(channels, dtype=dtype), requires_grad=False)
        self.dtype = dtype
        self.calls: list[dict] = []

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs):
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, control, transformer_options, **kwargs)

    def _forward(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options
        self.calls.append({"x": x, "timestep": timestep, "options": options, "dtype": x.dtype, "control": control, **kwargs})
        velocity = x * timestep.view(-1, 1, 1, 1).to(x) + (context.mean(dim=1) * self.gain.to(x))[:, :, None, None]
        return velocity if control is None else velocity + control["output"][0]


def make_host(**settings) -> Host:
    settings = HostSettings(device="cpu", **settings)
    return Host(paths=None, registry=None, memory=MemoryManager(settings), settings=settings)


def cond(value: float, tokens: int = 2, channels: int = 2, **options) -> list:
    """CONDITIONING whose context is `value` everywhere."""
    return [[torch.full((1, tokens, channels), float(value)), options]]


class ToyLatent(LatentFormat):
    """A latent space whose scaling shows: model latents are 2·(codec latents − 0.5)."""

    latent_channels = 2
    scale_factor = 2.0
    shift_factor = 0.5
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]

    def process_in(self, latent):
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent):
        return latent / self.scale_factor + self.shift_factor


def toy_model(dtype: torch.dtype = torch.float32, manual_cast: torch.dtype | None = None) -> ModelPatcher:
    """A flow model (shift 1, time = sigma) on the CPU as a MODEL."""
    config = ModelConfig(
        image_model="toy", unet_config={}, latent_format=ToyLatent(), model_type=ModelType.FLOW, manual_cast_dtype=manual_cast,
        sampling_settings={"shift": 1.0, "multiplier": 1.0}, memory_usage_factor=1.0,
    )  # fmt: skip
    return ModelPatcher(BaseModel(config, ToyNet(dtype=dtype)), CPU, CPU)


def run(model, positive=None, negative=None, cfg=2.0, sigmas=SIGMAS, latent=EMPTY, mask=None, callback=None, name="euler", noise=NOISE):
    positive, negative = positive or cond(0.5), negative or cond(-0.25)
    return sample_custom(
        model, noise, cfg, sampler_object(name), sigmas, positive, negative, latent, noise_mask=mask, callback=callback, seed=7
    )


def net(model):
    return model.model.diffusion_model


def euler(velocity, sigmas=SIGMAS, x=NOISE):
    """What Euler makes of a velocity, in codec space."""
    for now, following in zip(sigmas[:-1], sigmas[1:]):
        x = x + (following - now) * velocity(x, now)
    return x / 2 + 0.5
