"""Schedules: making them from a model, and cutting, turning and refining them.

SIGMAS are (n + 1,) float32 on the CPU, descending, for n steps.
"""

from __future__ import annotations

import math

from ....errors import input_error
from ..sampler_names import SCHEDULER_NAMES
from .declare import MODEL, SIGMAS, CoreNode, boolean, combo, integer, number

_GROUP = "sampling/custom_sampling"
_STEPS = integer(20, 1, 10000)


class _SigmasNode(CoreNode):
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_custom_sampler"


class BasicScheduler(_SigmasNode):
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


class BetaSamplingScheduler(_SigmasNode):
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


class SplitSigmas(_SigmasNode):
    """A schedule in two at a step, which belongs to both."""

    CATEGORY = f"{_GROUP}/sigmas"
    REQUIRED = {"sigmas": SIGMAS, "step": integer(0, 0, 10000)}
    RETURN_TYPES = ("SIGMAS", "SIGMAS")
    RETURN_NAMES = ("high_sigmas", "low_sigmas")
    FUNCTION = "get_sigmas"

    def get_sigmas(self, sigmas, step):
        return (sigmas[: step + 1], sigmas[step:])


class SplitSigmasDenoise(_SigmasNode):
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


class FlipSigmas(_SigmasNode):
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


class SetFirstSigma(_SigmasNode):
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


class ExtendIntermediateSigmas(_SigmasNode):
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


class SamplingPercentToSigma(_SigmasNode):
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
