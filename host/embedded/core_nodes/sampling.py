"""The classic sampling nodes: model, steps, solver and schedule in one place."""

from __future__ import annotations

from ..sampler_names import SAMPLER_NAMES, SCHEDULER_NAMES
from .declare import CONDITIONING, LATENT, MODEL, CoreNode, combo, integer, number, seed, tip

__all__ = ["KSampler", "KSamplerAdvanced", "common_ksampler"]

_CFG = {"step": 0.1, "round": 0.01}


def common_ksampler(
    model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent, denoise=1.0, disable_noise=False,
    start_step=None, last_step=None, force_full_denoise=False,
):  # fmt: skip
    """Sample a LATENT; noise is drawn on the CPU from `seed`, or is zero with `disable_noise`."""
    import torch

    from .. import latent_preview, sample

    latent_image = sample.fix_empty_latent_channels(model, latent["samples"])
    if disable_noise:
        noise = torch.zeros(latent_image.shape, dtype=latent_image.dtype, device="cpu")
    else:
        noise = sample.prepare_noise(latent_image, seed, latent.get("batch_index"))
    samples = sample.sample(
        model, noise, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise,
        disable_noise=disable_noise, start_step=start_step, last_step=last_step, force_full_denoise=force_full_denoise,
        noise_mask=latent.get("noise_mask"), callback=latent_preview.prepare_callback(model, steps), disable_pbar=True, seed=seed,
    )  # fmt: skip
    return ({**latent, "samples": samples},)


class KSampler(CoreNode):
    """Noise on the latent, then `steps` steps towards the conditioning; `denoise` below 1 starts part of the way."""

    DISPLAY_NAME = "KSampler"
    DESCRIPTION = "Uses the provided model, positive and negative conditioning to denoise the latent image."
    CATEGORY = "sampling"
    REQUIRED = {
        "model": tip(MODEL, "The model used for denoising the input latent."),
        "seed": seed(tooltip="The random seed used for creating the noise."),
        "steps": integer(20, 1, 10000, tooltip="The number of steps used in the denoising process."),
        "cfg": number(
            8.0,
            0.0,
            100.0,
            **_CFG,
            tooltip="The Classifier-Free Guidance scale balances creativity and adherence to the prompt. Higher values result in images "
            "more closely matching the prompt however too high values will negatively impact quality.",
        ),
        "sampler_name": combo(
            *SAMPLER_NAMES,
            tooltip="The algorithm used when sampling, this can affect the quality, speed, and style of the generated output.",
        ),
        "scheduler": combo(*SCHEDULER_NAMES, tooltip="The scheduler controls how noise is gradually removed to form the image."),
        "positive": tip(CONDITIONING, "The conditioning describing the attributes you want to include in the image."),
        "negative": tip(CONDITIONING, "The conditioning describing the attributes you want to exclude from the image."),
        "latent_image": tip(LATENT, "The latent image to denoise."),
        "denoise": number(
            1.0,
            0.0,
            1.0,
            0.01,
            tooltip="The amount of denoising applied, lower values will maintain the structure of the initial image allowing for image to "
            "image sampling.",
        ),
    }
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The denoised latent.",)
    FUNCTION = "sample"

    def sample(self, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=1.0):
        return common_ksampler(model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise)


class KSamplerAdvanced(CoreNode):
    """KSampler over a part of the schedule, so that two of them can share it."""

    DISPLAY_NAME = "KSampler (Advanced)"
    CATEGORY = "sampling"
    REQUIRED = {
        "model": MODEL,
        "add_noise": combo("enable", "disable"),
        "noise_seed": seed(),
        "steps": integer(20, 1, 10000),
        "cfg": number(8.0, 0.0, 100.0, **_CFG),
        "sampler_name": combo(*SAMPLER_NAMES),
        "scheduler": combo(*SCHEDULER_NAMES),
        "positive": CONDITIONING,
        "negative": CONDITIONING,
        "latent_image": LATENT,
        "start_at_step": integer(0, 0, 10000),
        "end_at_step": integer(10000, 0, 10000),
        "return_with_leftover_noise": combo("disable", "enable"),
    }
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"

    def sample(
        self, model, add_noise, noise_seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, start_at_step,
        end_at_step, return_with_leftover_noise, denoise=1.0,
    ):  # fmt: skip
        return common_ksampler(
            model, noise_seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise,
            disable_noise=add_noise == "disable", start_step=start_at_step, last_step=end_at_step,
            force_full_denoise=return_with_leftover_noise != "enable",
        )  # fmt: skip
