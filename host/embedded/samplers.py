"""Guiders and samplers: who asks the model, and who walks along the schedule.

guider.sample → OUTER_SAMPLE → outer_sample (models loaded, pre_run … cleanup) → inner_sample (model latent space, conditions
processed) → SAMPLER_SAMPLE → sampler.sample → per step guider(x, sigma) → PREDICT_NOISE → predict_noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...errors import input_error
from . import k_diffusion_sampling, sampler_helpers
from .cond_processing import (
    apply_empty_x_to_equal_area,
    calculate_start_end_timesteps,
    create_cond_with_same_area_if_none,
    encode_model_conds,
    get_mask_aabb,
    pre_run_control,
    process_conds,
    resolve_areas_and_cond_masks_multidim,
)
from .model_management import throw_exception_if_processing_interrupted
from .model_options import create_model_options_clone
from .patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from .sampler_names import SAMPLER_NAMES as _SAMPLER_NAMES
from .sampler_names import SCHEDULER_NAMES as _SCHEDULER_NAMES
from .sampling_function import calc_cond_batch, cfg_function, get_area_and_mult, sampling_function
from .schedulers import SCHEDULER_HANDLERS, SchedulerHandler, calculate_sigmas

__all__ = [
    "CFGGuider", "sample", "Sampler", "KSAMPLER", "KSamplerX0Inpaint", "ksampler", "sampler_object", "KSampler", "KSAMPLER_NAMES",
    "SAMPLER_NAMES", "SCHEDULER_NAMES", "SCHEDULER_HANDLERS", "SchedulerHandler", "calculate_sigmas", "calc_cond_batch", "cfg_function",
    "sampling_function", "get_area_and_mult", "process_conds", "apply_empty_x_to_equal_area", "calculate_start_end_timesteps",
    "create_cond_with_same_area_if_none", "encode_model_conds", "get_mask_aabb", "pre_run_control",
    "resolve_areas_and_cond_masks_multidim",
]  # fmt: skip

SAMPLER_NAMES = list(_SAMPLER_NAMES)
SCHEDULER_NAMES = list(_SCHEDULER_NAMES)
KSAMPLER_NAMES = [name for name in SAMPLER_NAMES if name not in ("ddim", "uni_pc", "uni_pc_bh2")]


class KSamplerX0Inpaint:
    """The denoiser that sampler functions call: outside the mask x follows the original latent's own path.

    `noise` and `latent_image` are set by KSAMPLER; `inner_model` is the guider.
    """

    def __init__(self, model: Any, sigmas: torch.Tensor):
        self.inner_model = model
        self.sigmas = sigmas

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, denoise_mask: torch.Tensor | None, model_options: dict | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        model_options = model_options or {}
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if "denoise_mask_function" in model_options:
            extra = {"model": self.inner_model, "sigmas": self.sigmas}
            denoise_mask = model_options["denoise_mask_function"](sigma, denoise_mask, extra_options=extra)
        kept = 1.0 - denoise_mask
        original = self.inner_model.inner_model.scale_latent_inpaint(x=x, sigma=sigma, noise=self.noise, latent_image=self.latent_image)
        out = self.inner_model(x * denoise_mask + original * kept, sigma, model_options=model_options, seed=seed)
        return out * denoise_mask + self.latent_image * kept


class Sampler:
    """Base of SAMPLER objects; `sample(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)`."""

    def sample(self, *args, **kwargs) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no sample method")

    def max_denoise(self, model_wrap: Any, sigmas: torch.Tensor) -> bool:
        """Whether the schedule starts at pure noise."""
        highest = float(model_wrap.inner_model.model_sampling.sigma_max)
        return math.isclose(highest, float(sigmas[0]), rel_tol=1e-05) or float(sigmas[0]) > highest


class KSAMPLER(Sampler):
    """A SAMPLER made of a k-diffusion style function (see k_diffusion_sampling).

    extra_options go to the function; inpaint_options {"random": True} keeps the unmasked part on another noise (seed + 1).
    """

    def __init__(self, sampler_function: Callable, extra_options: dict | None = None, inpaint_options: dict | None = None):
        self.sampler_function = sampler_function
        self.extra_options = extra_options or {}
        self.inpaint_options = inpaint_options or {}

    def sample(
        self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict, callback: Callable | None, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        extra_args["denoise_mask"] = denoise_mask
        model_k = KSamplerX0Inpaint(model_wrap, sigmas)
        model_k.latent_image = latent_image
        model_k.noise = noise
        if self.inpaint_options.get("random", False):
            generator = torch.manual_seed(extra_args.get("seed", 41) + 1)
            model_k.noise = torch.randn(noise.shape, generator=generator, device="cpu").to(noise)
        model_sampling = model_wrap.inner_model.model_sampling
        x = model_sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))

        k_callback = None
        if callback is not None:
            total_steps = len(sigmas) - 1

            def k_callback(state: dict) -> None:
                callback(state["i"], state["denoised"], state["x"], total_steps)

        samples = self.sampler_function(
            model_k, x, sigmas, extra_args=extra_args, callback=k_callback, disable=disable_pbar, **self.extra_options
        )
        return model_sampling.inverse_noise_scaling(sigmas[-1], samples)


def ksampler(sampler_name: str, extra_options: dict | None = None, inpaint_options: dict | None = None) -> KSAMPLER:
    """KSAMPLER for `sample_<sampler_name>`.

    Raises: NodeInputError for a name that is unknown, or known to ComfyUI and not available here; it names the nearest.
    """
    nearest = k_diffusion_sampling.UNAVAILABLE.get(sampler_name)
    if nearest is not None:
        reason = "it draws from a Brownian tree (package torchsde), which this host does not have"
        raise input_error("sampler", "sampler_name", sampler_name, f"{nearest} is the nearest here; {reason}", f"Choose {nearest}.")
    function = getattr(k_diffusion_sampling, f"sample_{sampler_name}", None)
    if function is None:
        available = ", ".join(name for name in SAMPLER_NAMES if name not in k_diffusion_sampling.UNAVAILABLE)
        raise input_error("sampler", "sampler_name", sampler_name, available, "Choose one of these samplers.")
    if sampler_name in k_diffusion_sampling.FROM_LIMITS:
        function = k_diffusion_sampling.over_schedule(function, with_steps=sampler_name == "dpm_fast")
    return KSAMPLER(function, extra_options, inpaint_options)


def sampler_object(name: str) -> KSAMPLER:
    """The SAMPLER that KSamplerSelect returns for a name of SAMPLER_NAMES; ddim is euler with fresh noise around an inpainting mask."""
    return ksampler("euler", inpaint_options={"random": True}) if name == "ddim" else ksampler(name)


class CFGGuider:
    """Classifier-free guidance over two conditions, and the base of other guiders.

    A subclass sets its conditions with `inner_set_conds({name: CONDITIONING})` and overrides `predict_noise`, where
    `self.conds[name]` are processed conditions and `self.inner_model` is the BaseModel. Calling the guider returns denoised.
    """

    def __init__(self, model_patcher: Any):
        self.model_patcher = model_patcher
        self.model_options = model_patcher.model_options
        self.original_conds: dict[str, list[dict]] = {}
        self.cfg = 1.0

    def set_conds(self, positive: list, negative: list) -> None:
        self.inner_set_conds({"positive": positive, "negative": negative})

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def inner_set_conds(self, conds: dict[str, list]) -> None:
        for name, conditioning in conds.items():
            self.original_conds[name] = sampler_helpers.convert_cond(conditioning)

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        return self.outer_predict_noise(*args, **kwargs)

    def outer_predict_noise(self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict | None = None, seed: int | None = None):
        """One evaluation. A request to stop is honoured here, so that a solver without callback stops within a step too."""
        throw_exception_if_processing_interrupted()
        wrappers = get_all_wrappers(WrappersMP.PREDICT_NOISE, self.model_options, is_model_options=True)
        executor = WrapperExecutor.new_class_executor(self.predict_noise, self, wrappers)
        return executor.execute(x, timestep, {} if model_options is None else model_options, seed)

    def predict_noise(self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict | None = None, seed: int | None = None):
        negative, positive = self.conds.get("negative"), self.conds.get("positive")
        return sampling_function(self.inner_model, x, timestep, negative, positive, self.cfg, model_options=model_options, seed=seed)

    def inner_sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, device: Any, sampler: Any, sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None, callback: Callable | None, disable_pbar: bool, seed: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """The run in model latent space. An all-zero latent is "empty", not a grey picture, and is not shifted."""
        if latent_image is not None and torch.count_nonzero(latent_image) > 0:
            latent_image = self.inner_model.process_latent_in(latent_image)
        self.conds = process_conds(self.inner_model, noise, self.conds, device, latent_image, denoise_mask, seed)
        model_options = create_model_options_clone(self.model_options)
        model_options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        extra_args = {"model_options": model_options, "seed": seed}
        wrappers = get_all_wrappers(WrappersMP.SAMPLER_SAMPLE, model_options, is_model_options=True)
        executor = WrapperExecutor.new_class_executor(sampler.sample, sampler, wrappers)
        samples = executor.execute(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        return self.inner_model.process_latent_out(samples.to(torch.float32))

    def outer_sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None, callback: Callable | None = None, disable_pbar: bool = False, seed: int | None = None,
        latent_shapes: list | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Models on their devices, then the run between pre_run and cleanup; nothing of the run outlives it."""
        self.inner_model, self.conds, self.loaded_models = sampler_helpers.prepare_sampling(
            self.model_patcher, noise.shape, self.conds, self.model_options
        )
        try:
            device = self.model_patcher.load_device
            if denoise_mask is not None:
                denoise_mask = sampler_helpers.prepare_mask(denoise_mask, noise.shape, device)
            noise, latent_image, sigmas = noise.to(device), latent_image.to(device), sigmas.to(device)
            sampler_helpers.move_wrappers(self.model_options, device, self.model_patcher.model_dtype())
            try:
                self.model_patcher.pre_run()
                return self.inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
            finally:
                self.model_patcher.cleanup()
        finally:
            sampler_helpers.cleanup_models(self.conds, self.loaded_models)
            del self.inner_model
            del self.loaded_models

    def sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None, callback: Callable | None = None, disable_pbar: bool = False, seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Run `sampler` over `sigmas` from noise and latent (b, c, …), both in the codec's space; an empty schedule changes nothing.

        `latent_shapes` goes to OUTER_SAMPLE as a keyword, as newer ComfyUI cores pass it.
        """
        if sigmas.shape[-1] == 0:
            return latent_image
        self.conds = {name: [dict(cond) for cond in conds] for name, conds in self.original_conds.items()}
        original_options = self.model_options
        self.model_options = create_model_options_clone(original_options)
        try:
            sampler_helpers.prepare_model_patcher(self.model_patcher, self.conds, self.model_options)
            wrappers = get_all_wrappers(WrappersMP.OUTER_SAMPLE, self.model_options, is_model_options=True)
            executor = WrapperExecutor.new_class_executor(self.outer_sample, self, wrappers)
            return executor.execute(
                noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, latent_shapes=[latent_image.shape]
            )
        finally:
            sampler_helpers.move_wrappers(self.model_options, self.model_patcher.offload_device)
            self.model_options = original_options
            del self.conds


def sample(
    model: Any, noise: torch.Tensor, positive: list, negative: list, cfg: float, device: Any, sampler: Any, sigmas: torch.Tensor,
    model_options: dict | None = None, latent_image: torch.Tensor | None = None, denoise_mask: torch.Tensor | None = None,
    callback: Callable | None = None, disable_pbar: bool = False, seed: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Guide `model` by CFG and run `sampler`; device and model_options are the patcher's own."""
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider.sample(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)


class KSampler:
    """The classic sampler: a named solver on a named schedule, from `denoise` of its length."""

    SCHEDULERS = SCHEDULER_NAMES
    SAMPLERS = SAMPLER_NAMES
    DISCARD_PENULTIMATE_SIGMA_SAMPLERS = frozenset(("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"))

    def __init__(
        self, model: Any, steps: int, device: Any, sampler: str | None = None, scheduler: str | None = None,
        denoise: float | None = None, model_options: dict | None = None,
    ):  # fmt: skip
        self.model = model
        self.device = device
        self.scheduler = scheduler or self.SCHEDULERS[0]
        self.sampler = sampler or self.SAMPLERS[0]
        self.denoise = denoise
        self.model_options = model_options or {}
        self.set_steps(steps, denoise)

    def calculate_sigmas(self, steps: int) -> torch.Tensor:
        """n + 1 sigmas; solvers with an inner point skip the last but one, which lies too near 0 for them."""
        discard = self.sampler in self.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
        sigmas = calculate_sigmas(self.model.get_model_object("model_sampling"), self.scheduler, steps + discard)
        return torch.cat([sigmas[:-2], sigmas[-1:]]) if discard else sigmas

    def set_steps(self, steps: int, denoise: float | None = None) -> None:
        """With denoise below 1, the last `steps` steps of a schedule of int(steps / denoise)."""
        self.steps = steps
        if denoise is None or denoise > 0.9999:
            self.sigmas = self.calculate_sigmas(steps).to(self.device)
        elif denoise <= 0.0:
            self.sigmas = torch.FloatTensor([])
        else:
            self.sigmas = self.calculate_sigmas(int(steps / denoise)).to(self.device)[-(steps + 1) :]

    def sample(
        self, noise: torch.Tensor, positive: list, negative: list, cfg: float, latent_image: torch.Tensor | None = None,
        start_step: int | None = None, last_step: int | None = None, force_full_denoise: bool = False,
        denoise_mask: torch.Tensor | None = None, sigmas: torch.Tensor | None = None, callback: Callable | None = None,
        disable_pbar: bool = False, seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Steps `start_step` to `last_step`; force_full_denoise ends the last one at 0."""
        sigmas = self.sigmas if sigmas is None else sigmas
        if last_step is not None and last_step < len(sigmas) - 1:
            sigmas = sigmas[: last_step + 1].clone()
            if force_full_denoise:
                sigmas[-1] = 0
        if start_step is not None:
            if start_step >= len(sigmas) - 1:
                return torch.zeros_like(noise) if latent_image is None else latent_image
            sigmas = sigmas[start_step:]
        return sample(
            self.model, noise, positive, negative, cfg, self.device, sampler_object(self.sampler), sigmas, self.model_options,
            latent_image=latent_image, denoise_mask=denoise_mask, callback=callback, disable_pbar=disable_pbar, seed=seed,
        )  # fmt: skip
