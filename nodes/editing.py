"""Editing palette: samplers that turn a given picture into another one under a new prompt."""

from __future__ import annotations

from .declare import Node, Output, choice, integer, number, socket

GROUP = "editing"
_SAMPLER = Output("SAMPLER", "sampler", "For SamplerCustom or SamplerCustomAdvanced.")


class RectiflowRFEditSampler(Node):
    """Draws an inverted picture again under a new prompt and shares the old picture's attention features, so that its layout stays."""

    TITLE = "RF-Edit Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["rf edit", "feature sharing", "value injection", "taming rectified flow"]
    INPUTS = (
        socket("features", "FLOW_FEATURES", "Of Flow Invert, with save_steps of at least inject_steps."),
        integer("inject_steps", 3, 0, 1000, "First steps in which features are shared. 0: none; more keeps more of the picture."),
        choice("match", ("interval", "exact_sigma"),
            "interval: features of the same step, as the authors released. exact_sigma: only features of the very same sigma.",
        ),
        choice("tokens", ("all", "image_only"), "all: text tokens too, which needs prompts of equal length. image_only: the picture's."),
        choice("rows", ("cond_and_uncond", "cond"), "Whether the negative prompt's half shares features too."),
        number("strength", 1.0, 0.0, 1.0, "0 keeps the new features, 1 replaces them, between mixes both."),
        choice("start_from", ("latent", "noise"),
            "latent: the inverted latent is the sampler's latent. noise: it comes as NOISE through Noise from Latent.", optional=True,
        ),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, features, inject_steps, match, tokens, rows, strength, start_from="latent"):
        from ..host import KSAMPLER, calc_cond_batch
        from ..samplers.feature_sharing import ReplayPlan, sample_rf_edit
        from ..samplers.sampler_object import FlowSampler

        plan = ReplayPlan(inject_steps, match, tokens, rows, strength)
        options = {"bank": features, "plan": plan, "calc_cond_batch": calc_cond_batch}
        return (FlowSampler(KSAMPLER(sample_rf_edit, options), start_from),)
