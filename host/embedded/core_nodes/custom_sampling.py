"""Sampling in parts: NOISE, GUIDER, SAMPLER and SIGMAS are made by nodes of their own and meet in SamplerCustomAdvanced.

SIGMAS are (n + 1,) float32 on the CPU, descending, for n steps.
"""

from __future__ import annotations

import math

from ....errors import input_error
from ..sampler_names import SAMPLER_NAMES, SCHEDULER_NAMES
from .declare import (
    CONDITIONING,
    GUIDER,
    LATENT,
    MODEL,
    NOISE,
    SAMPLER,
    SIGMAS,
    CoreNode,
    boolean,
    combo,
    integer,
    number,
    seed,
)  # fmt: skip

_GROUP = "sampling/custom_sampling"
_CFG = number(8.0, 0.0, 100.0, 0.1, round=0.01)
_STEPS = integer(20, 1, 10000)


class _CustomSampling(CoreNode):
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_custom_sampler"


# Noise


class Noise_EmptyNoise:
    """NOISE of zeros."""

    def __init__(self):
        self.seed = 0

    def generate_noise(self, input_latent: dict):
        import torch

        latent = input_latent["samples"]
        return torch.zeros(latent.shape, dtype=latent.dtype, layout=latent.layout, device="cpu")


class Noise_RandomNoise:
    """NOISE drawn on the CPU from a seed."""

    def __init__(self, seed: int):
        self.seed = seed

    def generate_noise(self, input_latent: dict):
        from ..sample import prepare_noise

        return prepare_noise(input_latent["samples"], self.seed, input_latent.get("batch_index"))


class DisableNoise(_CustomSampling):
    """No noise: sampling goes on from the latent as it is."""

    CATEGORY = f"{_GROUP}/noise"
    RETURN_TYPES = ("NOISE",)
    FUNCTION = "get_noise"

    def get_noise(self):
        return (Noise_EmptyNoise(),)


class RandomNoise(_CustomSampling):
    """Noise from a seed."""

    CATEGORY = f"{_GROUP}/noise"
    REQUIRED = {"noise_seed": seed()}
    RETURN_TYPES = ("NOISE",)
    FUNCTION = "get_noise"

    def get_noise(self, noise_seed):
        return (Noise_RandomNoise(noise_seed),)


class AddNoise(_CustomSampling):
    """The latent with the noise of the first sigma (of the difference between first and last, if there are more)."""

    CATEGORY = "_for_testing/custom_sampling/noise"
    REQUIRED = {"model": MODEL, "noise": NOISE, "sigmas": SIGMAS, "latent_image": LATENT}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "add_noise"

    def add_noise(self, model, noise, sigmas, latent_image):
        import torch

        if len(sigmas) == 0:
            return (latent_image,)
        latent = latent_image["samples"]
        if torch.count_nonzero(latent) > 0:  # an empty latent is not a grey picture and is not shifted
            latent = model.get_model_object("process_latent_in")(latent)
        scale = torch.abs(sigmas[0] - sigmas[-1]) if len(sigmas) > 1 else sigmas[0]
        noisy = model.get_model_object("model_sampling").noise_scaling(scale, noise.generate_noise(latent_image), latent)
        noisy = model.get_model_object("process_latent_out")(noisy)
        return ({**latent_image, "samples": torch.nan_to_num(noisy, nan=0.0, posinf=0.0, neginf=0.0)},)


# Samplers


class KSamplerSelect(_CustomSampling):
    """A solver by name."""

    CATEGORY = f"{_GROUP}/samplers"
    REQUIRED = {"sampler_name": combo(*SAMPLER_NAMES)}
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"

    def get_sampler(self, sampler_name):
        from ..samplers import sampler_object

        return (sampler_object(sampler_name),)


class SamplerEulerAncestral(_CustomSampling):
    """Euler steps that go too far down and add noise again; `eta` 0 is plain Euler."""

    CATEGORY = f"{_GROUP}/samplers"
    REQUIRED = {"eta": number(1.0, 0.0, 100.0, 0.01, round=False), "s_noise": number(1.0, 0.0, 100.0, 0.01, round=False)}
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"

    def get_sampler(self, eta, s_noise):
        from ..samplers import ksampler

        return (ksampler("euler_ancestral", {"eta": eta, "s_noise": s_noise}),)


# Schedules


class BasicScheduler(_CustomSampling):
    """A named schedule of the model's own sigmas; `denoise` below 1 takes the last steps of a longer one, 0 none."""

    CATEGORY = f"{_GROUP}/schedulers"
    REQUIRED = {"model": MODEL, "scheduler": combo(*SCHEDULER_NAMES), "steps": _STEPS, "denoise": number(1.0, 0.0, 1.0, 0.01)}
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"

    def get_sigmas(self, model, scheduler, steps, denoise):
        import torch

        from ..samplers import calculate_sigmas

        if denoise <= 0.0:
            return (torch.zeros(0),)
        total = int(steps / denoise) if denoise < 1.0 else steps
        sigmas = calculate_sigmas(model.get_model_object("model_sampling"), scheduler, total).cpu()
        return (sigmas[-(steps + 1) :],)


class BetaSamplingScheduler(_CustomSampling):
    """Times at the quantiles of a beta distribution: more of them at both ends."""

    CATEGORY = f"{_GROUP}/schedulers"
    REQUIRED = {
        "model": MODEL,
        "steps": _STEPS,
        "alpha": number(0.6, 0.0, 50.0, 0.01, round=False),
        "beta": number(0.6, 0.0, 50.0, 0.01, round=False),
    }
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"

    def get_sigmas(self, model, steps, alpha, beta):
        from ..schedulers import beta_scheduler

        for name, value in (("alpha", alpha), ("beta", beta)):
            if not value > 0:
                raise input_error("BetaSamplingScheduler", name, value, "a number above 0", "A beta distribution needs one.")
        return (beta_scheduler(model.get_model_object("model_sampling"), steps, alpha=alpha, beta=beta),)


class SplitSigmas(_CustomSampling):
    """A schedule in two at a step, which belongs to both."""

    CATEGORY = f"{_GROUP}/sigmas"
    REQUIRED = {"sigmas": SIGMAS, "step": integer(0, 0, 10000)}
    RETURN_TYPES = ("SIGMAS", "SIGMAS")
    RETURN_NAMES = ("high_sigmas", "low_sigmas")
    FUNCTION = "get_sigmas"

    def get_sigmas(self, sigmas, step):
        return (sigmas[: step + 1], sigmas[step:])


class SplitSigmasDenoise(_CustomSampling):
    """A schedule in two; the second part holds `denoise` of the steps."""

    CATEGORY = f"{_GROUP}/sigmas"
    REQUIRED = {"sigmas": SIGMAS, "denoise": number(1.0, 0.0, 1.0, 0.01)}
    RETURN_TYPES = ("SIGMAS", "SIGMAS")
    RETURN_NAMES = ("high_sigmas", "low_sigmas")
    FUNCTION = "get_sigmas"

    def get_sigmas(self, sigmas, denoise):
        steps = max(sigmas.shape[-1] - 1, 0)
        low = round(steps * denoise)
        high_end = len(sigmas) - low if low else 0  # without a low part ComfyUI leaves the high one empty too
        return (sigmas[:high_end], sigmas[-(low + 1) :])


class FlipSigmas(_CustomSampling):
    """A schedule backwards, for inversion; it starts at 0.0001 instead of 0."""

    CATEGORY = f"{_GROUP}/sigmas"
    REQUIRED = {"sigmas": SIGMAS}
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"

    def get_sigmas(self, sigmas):
        flipped = sigmas.flip(0)
        if len(flipped) and flipped[0] == 0:
            flipped[0] = 0.0001
        return (flipped,)


class SetFirstSigma(_CustomSampling):
    """A schedule that starts at another sigma."""

    CATEGORY = f"{_GROUP}/sigmas"
    REQUIRED = {"sigmas": SIGMAS, "sigma": number(136.0, 0.0, 20000.0, 0.001, round=False)}
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "set_first_sigma"

    def set_first_sigma(self, sigmas, sigma):
        if len(sigmas) == 0:
            raise input_error("SetFirstSigma", "sigmas", "an empty schedule", "at least one sigma", "Use a denoise above 0.")
        changed = sigmas.clone()
        changed[0] = sigma
        return (changed,)


class ExtendIntermediateSigmas(_CustomSampling):
    """`steps` − 1 more sigmas between any two whose upper one lies from end_at_sigma to start_at_sigma (−1: no upper bound)."""

    CATEGORY = f"{_GROUP}/sigmas"
    REQUIRED = {
        "sigmas": SIGMAS,
        "steps": integer(2, 1, 100),
        "start_at_sigma": number(-1.0, -1.0, 20000.0, 0.01, round=False),
        "end_at_sigma": number(12.0, 0.0, 20000.0, 0.01, round=False),
        "spacing": combo("linear", "cosine", "sine"),
    }
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "extend"

    def extend(self, sigmas, steps, start_at_sigma, end_at_sigma, spacing):
        import torch

        between = torch.linspace(0, 1, steps + 1, device=sigmas.device)[1:-1]
        if spacing == "cosine":
            between = torch.sin(between * math.pi / 2)
        elif spacing == "sine":
            between = 1 - torch.cos(between * math.pi / 2)
        highest = math.inf if start_at_sigma < 0 else start_at_sigma
        parts = []
        for upper, lower in zip(sigmas[:-1], sigmas[1:]):
            parts.append(upper[None])
            if end_at_sigma <= upper <= highest:
                parts.append(between * (lower - upper) + upper)
        return (torch.cat([*parts, sigmas[-1:]]).float().cpu(),)


class SamplingPercentToSigma(_CustomSampling):
    """The sigma at a fraction of the way from noise to picture."""

    CATEGORY = f"{_GROUP}/sigmas"
    REQUIRED = {
        "model": ("MODEL", {}),
        "sampling_percent": number(0.0, 0.0, 1.0, 0.0001),
        "return_actual_sigma": boolean(
            False,
            tooltip="Return the actual sigma value instead of the value used for interval checks.\n"
            "This only affects results at 0.0 and 1.0.",
        ),
    }
    RETURN_TYPES = ("FLOAT",)
    RETURN_NAMES = ("sigma_value",)
    FUNCTION = "get_sigma"

    def get_sigma(self, model, sampling_percent, return_actual_sigma):
        model_sampling = model.get_model_object("model_sampling")
        if return_actual_sigma and sampling_percent in (0.0, 1.0):
            return ((model_sampling.sigma_max if sampling_percent == 0.0 else model_sampling.sigma_min).item(),)
        return (model_sampling.percent_to_sigma(sampling_percent),)


# Guiders


class BasicGuider(_CustomSampling):
    """One conditioning, no CFG."""

    CATEGORY = f"{_GROUP}/guiders"
    REQUIRED = {"model": MODEL, "conditioning": CONDITIONING}
    RETURN_TYPES = ("GUIDER",)
    FUNCTION = "get_guider"

    def get_guider(self, model, conditioning):
        from .guiders import Guider_Basic

        guider = Guider_Basic(model)
        guider.set_conds(conditioning)
        return (guider,)


class CFGGuider(_CustomSampling):
    """Classifier-free guidance: negative + cfg · (positive − negative)."""

    CATEGORY = f"{_GROUP}/guiders"
    REQUIRED = {"model": MODEL, "positive": CONDITIONING, "negative": CONDITIONING, "cfg": _CFG}
    RETURN_TYPES = ("GUIDER",)
    FUNCTION = "get_guider"

    def get_guider(self, model, positive, negative, cfg):
        from .. import samplers

        guider = samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return (guider,)


class DualCFGGuider(_CustomSampling):
    """Two conditionings with a scale each."""

    CATEGORY = f"{_GROUP}/guiders"
    REQUIRED = {
        "model": MODEL,
        "cond1": CONDITIONING,
        "cond2": CONDITIONING,
        "negative": CONDITIONING,
        "cfg_conds": _CFG,
        "cfg_cond2_negative": _CFG,
        "style": combo("regular", "nested"),
    }
    RETURN_TYPES = ("GUIDER",)
    FUNCTION = "get_guider"

    def get_guider(self, model, cond1, cond2, negative, cfg_conds, cfg_cond2_negative, style):
        from .guiders import Guider_DualCFG

        guider = Guider_DualCFG(model)
        guider.set_conds(cond1, cond2, negative)
        guider.set_cfg(cfg_conds, cfg_cond2_negative, nested=style == "nested")
        return (guider,)


# The run


def _with_outputs(latent: dict, samples, model_patcher, last: dict) -> tuple[dict, dict]:
    """(output, denoised_output); the second is the last denoised latent that a step reported, or the output when none did."""
    output = {**latent, "samples": samples}
    if "x0" not in last:
        return (output, output)
    return (output, {**latent, "samples": model_patcher.model.process_latent_out(last["x0"].cpu())})


class SamplerCustom(_CustomSampling):
    """A SAMPLER over SIGMAS with CFG."""

    CATEGORY = _GROUP
    REQUIRED = {
        "model": MODEL,
        "add_noise": boolean(True),
        "noise_seed": seed(),
        "cfg": _CFG,
        "positive": CONDITIONING,
        "negative": CONDITIONING,
        "sampler": SAMPLER,
        "sigmas": SIGMAS,
        "latent_image": LATENT,
    }
    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("output", "denoised_output")
    FUNCTION = "sample"

    def sample(self, model, add_noise, noise_seed, cfg, positive, negative, sampler, sigmas, latent_image):
        from .. import latent_preview
        from ..sample import fix_empty_latent_channels, sample_custom

        latent = {**latent_image, "samples": fix_empty_latent_channels(model, latent_image["samples"])}
        noise = (Noise_RandomNoise(noise_seed) if add_noise else Noise_EmptyNoise()).generate_noise(latent)
        last = {}
        samples = sample_custom(
            model, noise, cfg, sampler, sigmas, positive, negative, latent["samples"], noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, sigmas.shape[-1] - 1, last), disable_pbar=True, seed=noise_seed,
        )  # fmt: skip
        return _with_outputs(latent, samples, model, last)


class SamplerCustomAdvanced(_CustomSampling):
    """A SAMPLER over SIGMAS with any GUIDER and NOISE."""

    CATEGORY = _GROUP
    REQUIRED = {"noise": NOISE, "guider": GUIDER, "sampler": SAMPLER, "sigmas": SIGMAS, "latent_image": LATENT}
    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("output", "denoised_output")
    FUNCTION = "sample"

    def sample(self, noise, guider, sampler, sigmas, latent_image):
        from .. import latent_preview
        from ..model_management import intermediate_device
        from ..sample import fix_empty_latent_channels

        model = guider.model_patcher
        latent = {**latent_image, "samples": fix_empty_latent_channels(model, latent_image["samples"])}
        last = {}
        samples = guider.sample(
            noise.generate_noise(latent), latent["samples"], sampler, sigmas, denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, sigmas.shape[-1] - 1, last), disable_pbar=True, seed=noise.seed,
        )  # fmt: skip
        return _with_outputs(latent, samples.to(intermediate_device()), model, last)
