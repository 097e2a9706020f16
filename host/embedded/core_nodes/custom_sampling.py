"""Sampling in parts: NOISE, GUIDER, SAMPLER and SIGMAS are made by nodes of their own and meet in SamplerCustomAdvanced.

SIGMAS are (n + 1,) float32 on the CPU, descending, for n steps.
"""

from __future__ import annotations

from ..sampler_names import SAMPLER_NAMES
from .declare import CONDITIONING, GUIDER, LATENT, MODEL, NOISE, SAMPLER, SIGMAS, CoreNode, boolean, combo, number, seed

_GROUP = "sampling/custom_sampling"
_CFG = number(8.0, 0.0, 100.0, 0.1, round=0.01)


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
