"""Noise and the two calls that sampling nodes make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import samplers
from .model_management import intermediate_device
from .utils import repeat_to_batch_size

__all__ = ["prepare_noise", "fix_empty_latent_channels", "sample", "sample_custom"]


def prepare_noise(latent_image: torch.Tensor, seed: int, noise_inds: list[int] | None = None) -> torch.Tensor:
    """Gaussian noise of the latent's shape and dtype, drawn on the CPU from the global generator seeded with `seed`.

    With `noise_inds` (a latent's batch_index) entry i is the noise_inds[i]-th single draw, so that a picture of a batch can be
    made again alone.
    """
    generator = torch.manual_seed(seed)

    def draw(shape: list[int]) -> torch.Tensor:
        return torch.randn(shape, dtype=latent_image.dtype, layout=latent_image.layout, generator=generator, device="cpu")

    if noise_inds is None:
        return draw(list(latent_image.shape))
    wanted = set(noise_inds)
    draws = {}
    for index in range(max(wanted) + 1):
        noise = draw([1, *latent_image.shape[1:]])
        if index in wanted:
            draws[index] = noise
    return torch.cat([draws[index] for index in noise_inds])


def fix_empty_latent_channels(model: Any, latent_image: torch.Tensor) -> torch.Tensor:
    """Give an all-zero latent the model's channel count, and a picture latent the time axis of a video model."""
    latent_format = model.get_model_object("latent_format")
    if latent_format.latent_channels != latent_image.shape[1] and torch.count_nonzero(latent_image) == 0:
        latent_image = repeat_to_batch_size(latent_image, latent_format.latent_channels, dim=1)
    if latent_format.latent_dimensions == 3 and latent_image.ndim == 4:
        latent_image = latent_image.unsqueeze(2)
    return latent_image


def sample(
    model: Any, noise: torch.Tensor, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: list, negative: list,
    latent_image: torch.Tensor, denoise: float = 1.0, disable_noise: bool = False, start_step: int | None = None,
    last_step: int | None = None, force_full_denoise: bool = False, noise_mask: torch.Tensor | None = None,
    sigmas: torch.Tensor | None = None, callback: Callable | None = None, disable_pbar: bool = False, seed: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """What KSampler runs (see samplers.KSampler); the result lies on the intermediate device."""
    ksampler = samplers.KSampler(
        model, steps, model.load_device, sampler=sampler_name, scheduler=scheduler, denoise=denoise, model_options=model.model_options
    )
    samples = ksampler.sample(
        noise, positive, negative, cfg=cfg, latent_image=latent_image, start_step=start_step, last_step=last_step,
        force_full_denoise=force_full_denoise, denoise_mask=noise_mask, sigmas=sigmas, callback=callback, disable_pbar=disable_pbar,
        seed=seed,
    )  # fmt: skip
    return samples.to(intermediate_device())


def sample_custom(
    model: Any, noise: torch.Tensor, cfg: float, sampler: Any, sigmas: torch.Tensor, positive: list, negative: list,
    latent_image: torch.Tensor, noise_mask: torch.Tensor | None = None, callback: Callable | None = None, disable_pbar: bool = False,
    seed: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """What SamplerCustom runs: a SAMPLER over SIGMAS; the result lies on the intermediate device."""
    samples = samplers.sample(
        model, noise, positive, negative, cfg, model.load_device, sampler, sigmas, model_options=model.model_options,
        latent_image=latent_image, denoise_mask=noise_mask, callback=callback, disable_pbar=disable_pbar, seed=seed,
    )  # fmt: skip
    return samples.to(intermediate_device())
