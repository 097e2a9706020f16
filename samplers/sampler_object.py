"""The SAMPLER object behind our sampler nodes: the host's KSAMPLER when noise becomes a picture, its own scaling otherwise.

A host's KSAMPLER mixes noise and latent at the start and divides by 1 − sigma at the end. Both are right for sampling down to
sigma 0 and wrong for everything else a flow can do: an inversion ends at sigma 1, where the division gives infinity, and an
inverted latent already is the state at sigmas[0] and must not be mixed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["START_FROM", "FlowSampler", "GuiderModel", "report_steps"]

START_FROM = ("noise", "latent")


class GuiderModel:
    """What a solver calls when no KSAMPLER stands between it and the guider; offers the names that sampler functions look up."""

    def __init__(self, guider, sigmas: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor):
        self.inner_model = guider
        self.sigmas = sigmas
        self.noise = noise
        self.latent_image = latent_image

    def __call__(self, x, sigma, denoise_mask=None, model_options=None, seed=None):
        return self.inner_model(x, sigma, model_options=model_options or {}, seed=seed)


def report_steps(callback: Callable | None, total: int) -> Callable | None:
    """A solver's callback that tells the host's: (step, denoised, x, total)."""
    if callback is None:
        return None
    return lambda state: callback(state["i"], state["denoised"], state["x"], total)


class FlowSampler:
    """A solver with its options, usable on any SAMPLER socket.

    Args:
        stock: the host's KSAMPLER around the same function; sampling (falling sigmas, start_from "noise") is left to it, so masks,
            noise and scaling are the host's own.
        start_from: "noise" mixes noise and latent at sigmas[0]; "latent" takes the latent as the state at sigmas[0].
    """

    def __init__(self, stock, start_from: str = "noise"):
        self.stock = stock
        self.start_from = start_from

    @property
    def sampler_function(self):
        return self.stock.sampler_function

    @property
    def extra_options(self) -> dict[str, Any]:
        return self.stock.extra_options

    @property
    def inpaint_options(self) -> dict[str, Any]:
        return self.stock.inpaint_options

    def max_denoise(self, guider, sigmas) -> bool:
        return self.stock.max_denoise(guider, sigmas)

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """Run from sigmas[0] to sigmas[-1] in model space; `noise`, `latent_image`: `(b, …)`. What ComfyUI's guider calls."""
        rising = bool(sigmas[-1] > sigmas[0])
        if self.start_from == "noise" and not rising:
            return self.stock.sample(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        if denoise_mask is not None:
            logging.warning("Rectiflow: the latent's noise mask is left out; it has no meaning when a run does not start from noise")
        if self.start_from == "latent":
            x = latent_image.clone()
        else:
            x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image)
        model = GuiderModel(guider, sigmas, noise, latent_image)
        arguments = {key: value for key, value in extra_args.items() if key != "denoise_mask"}
        report = report_steps(callback, len(sigmas) - 1)
        return self.sampler_function(model, x, sigmas, extra_args=arguments, callback=report, disable=disable_pbar, **self.extra_options)
