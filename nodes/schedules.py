"""Schedules palette: SIGMAS for flow models, and the shift as a model patch. Every node says which alpha is in force."""

from __future__ import annotations

from .declare import Node, Output, choice, integer, number, socket

GROUP = "schedules"
_SIGMAS = Output("SIGMAS", "sigmas", "Noise levels, steps + 1 of them.")
_ALPHA = Output("FLOAT", "alpha", "The effective shift: sigma = alpha·u/(1 + (alpha − 1)·u). Flux's mu is ln(alpha).")
_STEPS = integer("steps", 28, 1, 1000, "Steps of the schedule.")
_DENOISE = number("denoise", 1.0, 0.0, 1.0,
    "Keep the last part of a longer schedule, as Basic Scheduler does: 0.6 changes the picture less than 1. 0 gives an empty "
    "schedule.",
)
_BASE_PIXELS = integer("base_pixels", 65536, 1, 2**28,
    "resolution: pixels of the size whose shift is 1; 65536 = 256×256.", step=1, advanced=True,
)
_LATENT = socket("latent", "LATENT",
    "Size of the picture: resolution needs it; flux_mu then follows Flux's line over tokens, and value is not used.", optional=True,
)
_VALUE_HELP = "sd3_alpha: alpha (SD3 3, Lumina 2 6). flux_mu: mu = ln(alpha) (Flux at 1024×1024 1.15). Other modes do not use it."


def _samples(latent):
    return None if latent is None else latent["samples"]


def _cell(model) -> int:
    """Pixels on the side of one latent cell; 8 where the host's latent format does not say."""
    return int(getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8))


class RectiflowFlowShiftSigmas(Node):
    """A schedule with the resolution shift, taken from the model, given as SD3's alpha or Flux's mu, or computed from a latent."""

    TITLE = "Flow Shift Sigmas"
    GROUP = GROUP
    SEARCH_ALIASES = ["scheduler", "sd3 shift", "flux shift", "resolution shift", "basic scheduler"]
    INPUTS = (
        socket("model", "MODEL", "The flow model that will sample; its own shift is used by from_model only."),
        choice("scheduler", ("uniform", "simple", "beta", "logit_normal_cdf", "linear_quadratic", "sigmoid"),
            "The grid before the shift. simple with from_model equals Basic Scheduler's simple. sigmoid is experimental.",
        ),
        _STEPS,
        choice("shift_mode", ("from_model", "sd3_alpha", "flux_mu", "resolution"),
            "Where the shift comes from. It replaces the model's own, it is never applied on top of it.",
        ),
        number("value", 3.0, 0.01, 100.0, _VALUE_HELP),
        _BASE_PIXELS,
        number("start", 1.0, 0.0, 1.0, "First sigma. Below 1 the run starts from a less noisy state.", advanced=True),
        number("end", 0.0, 0.0, 1.0, "Last sigma. Above 0 the run leaves noise in.", advanced=True),
        _DENOISE,
        _LATENT,
    )
    OUTPUTS = (_SIGMAS, _ALPHA)

    def run(self, model, scheduler, steps, shift_mode, value, base_pixels, start, end, denoise, latent=None):
        from ..samplers.model_shift import flow_sigmas, resolve_alpha

        model_sampling = model.get_model_object("model_sampling")
        alpha = resolve_alpha(self.TITLE, shift_mode, value, model_sampling, _samples(latent), base_pixels, _cell(model))
        return (flow_sigmas(model_sampling, scheduler, steps, shift_mode, alpha, start, end, denoise, self.TITLE), alpha)


class RectiflowFlowSchedule(Node):
    """A schedule from a formula alone, no model needed: exact fractions, Lumina's time schedules, or quantiles of a training density."""

    TITLE = "Flow Schedule"
    GROUP = GROUP
    SEARCH_ALIASES = ["lumina", "rational", "sigmoid", "logit normal", "mode", "quantile"]
    INPUTS = (
        integer("steps", 20, 1, 1000, "Steps of the schedule."),
        choice("kind", ("uniform", "rational", "sigmoid", "logit_normal", "mode", "cosmap", "u_shaped", "beta", "linear_quadratic"),
            "uniform and rational are the usual ones; sigmoid is experimental; the next four put equal shares of a training "
            "density between sigmas.",
        ),
        number("shift", 4.0, 0.1, 20.0, "Alpha, for every kind but uniform: above 1 steps gather near noise, 1 leaves the kind as it is."),
        number("mu", 0.6, 0.05, 0.95, "sigmoid: where in the run, 0 noise to 1 data, the largest steps are.", advanced=True),
        number("alpha", 6.0, 0.1, 50.0, "sigmoid: how small the steps near noise get.", step=0.1, advanced=True),
        number("beta", 20.0, 0.1, 50.0, "sigmoid: how small the steps near data get.", step=0.1, advanced=True),
        _DENOISE,
        number("mean", 0.0, -5.0, 5.0, "logit_normal: mean of logit(sigma). Above 0 favours noise.", advanced=True, optional=True),
        number("std", 1.0, 0.05, 5.0,
            "logit_normal: spread of logit(sigma). Small values gather in the middle.", advanced=True, optional=True,
        ),
        number("mode_scale", 1.29, -1.0, 1.75, "mode: above 0 favours the middle, below 0 the ends.", advanced=True, optional=True),
        number("a", 4.0, 0.0, 20.0, "u_shaped: how strongly both ends are favoured; 0 is uniform.", step=0.1, advanced=True, optional=True),
    )
    OUTPUTS = (_SIGMAS,)

    def run(self, steps, kind, shift, mu, alpha, beta, denoise, mean=0.0, std=1.0, mode_scale=1.29, a=4.0):
        from ..samplers.schedules import formula_sigmas

        parameters = {
            "sigmoid": {"mu": mu, "alpha": alpha, "beta": beta},
            "logit_normal": {"mean": mean, "std": std},
            "mode": {"mode_scale": mode_scale},
            "u_shaped": {"a": a},
        }
        return (formula_sigmas(kind, steps, shift, denoise, self.TITLE, **parameters.get(kind, {})),)


class RectiflowUniformFlowSigmas(Node):
    """The exact grid start + (end − start)·i/N that InstaFlow, rf++ and other reflowed weights were trained for.

    It rises when end is above start.
    """

    TITLE = "Uniform Flow Sigmas"
    GROUP = GROUP
    SEARCH_ALIASES = ["instaflow", "one step", "reflow", "linear"]
    INPUTS = (
        integer("steps", 1, 1, 1000, "Steps; 1 evaluates the model at the first sigma only."),
        number("start", 1.0, 0.0, 1.0, "First sigma."),
        number("end", 0.0, 0.0, 1.0, "Last sigma."),
    )
    OUTPUTS = (_SIGMAS,)

    def run(self, steps: int, start: float, end: float):
        from ..errors import input_error
        from ..samplers.schedules import uniform_sigmas

        if start == end:
            raise input_error(self.TITLE, "end", end, "another value than start", "Set 1 and 0 to sample, 0 and 1 to invert.")
        return (uniform_sigmas(steps, start, end),)


class RectiflowReshiftSigmas(Node):
    """Takes one shift out of a finished schedule and puts another in: exact in both directions, end points stay."""

    TITLE = "Reshift Sigmas"
    GROUP = GROUP
    SEARCH_ALIASES = ["shift", "resolution"]
    INPUTS = (
        socket("sigmas", "SIGMAS", "A schedule of a flow model, values from 0 to 1."),
        number("from_alpha", 1.0, 0.01, 100.0, "The shift that is in it now; 1 where none is. From Flux's mu: e^mu."),
        number("to_alpha", 3.0, 0.01, 100.0, "The shift it shall have: larger gathers steps near noise."),
    )
    OUTPUTS = (_SIGMAS, _ALPHA)

    def run(self, sigmas, from_alpha: float, to_alpha: float):
        from ..samplers.schedules import reshift_sigmas
        from ..samplers.walk import check_sigmas

        return (reshift_sigmas(check_sigmas(sigmas, self.TITLE), from_alpha, to_alpha), to_alpha)


class RectiflowFlowModelShift(Node):
    """Gives a flow model another shift, in its own terms (SD3-type or Flux-type), so that every scheduler after it uses that shift."""

    TITLE = "Flow Model Shift"
    GROUP = GROUP
    SEARCH_ALIASES = ["ModelSamplingSD3", "ModelSamplingFlux", "shift"]
    INPUTS = (
        socket("model", "MODEL", "A flow model."),
        choice("shift_mode", ("sd3_alpha", "flux_mu", "resolution"), "How the shift is given. It replaces the model's own."),
        number("value", 3.0, 0.01, 100.0, _VALUE_HELP),
        _BASE_PIXELS,
        _LATENT,
    )
    OUTPUTS = (Output("MODEL", "model", "The model with the new shift."), _ALPHA)

    def run(self, model, shift_mode, value, base_pixels, latent=None):
        from ..samplers.model_shift import resolve_alpha, shifted_model_sampling

        model_sampling = model.get_model_object("model_sampling")
        alpha = resolve_alpha(self.TITLE, shift_mode, value, model_sampling, _samples(latent), base_pixels, _cell(model))
        patched = model.clone()
        patched.add_object_patch("model_sampling", shifted_model_sampling(model_sampling, alpha))
        return (patched, alpha)
