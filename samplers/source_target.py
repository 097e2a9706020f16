"""A guider that knows two prompts, what a picture shows and what it shall show, and answers for either.

FlowEdit and Uni-Edit walk on the difference of both answers. To any other sampler the guider is the host's own, with the target prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import input_error

__all__ = ["SideModel", "SourceTarget", "picture_mask", "seeded_noise", "source_target_guider", "two_sided"]


class SourceTarget:
    """The part of the guider that is ours; stands before the host's CFGGuider among the bases."""

    cfg_source = 1.0
    host_calls: tuple[Callable, Callable] = ()  # the host's calc_cond_batch and cfg_function

    def source(self, x, sigma, model_options=None, seed=None) -> torch.Tensor:
        """denoised under the source prompt, through the same wrappers and hooks as every evaluation."""
        conds, cfg = self.conds, self.cfg
        self.conds = {"positive": conds["source"], "negative": conds["source_negative"]}
        self.cfg = self.cfg_source
        try:
            return self(x, sigma, model_options=model_options or {}, seed=seed)
        finally:
            self.conds, self.cfg = conds, cfg

    def both(self, x_source, x_target, sigma, model_options=None, seed=None, joined=False) -> tuple[torch.Tensor, torch.Tensor]:
        """denoised of each state under its own prompt.

        joined asks for both in one model call where memory allows. It leaves PREDICT_NOISE wrappers out, and falls back to two calls where
        another node wraps the model function.
        """
        options = model_options or {}
        if joined and "model_function_wrapper" not in options and "sampler_calc_cond_batch_function" not in options:
            return self._joined(x_source, x_target, sigma, options)
        return self.source(x_source, sigma, options, seed), self(x_target, sigma, model_options=options, seed=seed)

    def _joined(self, x_source, x_target, sigma, options):
        calc_cond_batch, cfg_function = self.host_calls
        names = ("source", "source_negative", "positive", "negative")
        scales = {"source_negative": self.cfg_source, "negative": self.cfg}
        conds = [None if math.isclose(scales.get(name, 0.0), 1.0) else self.conds[name] for name in names]
        states = (x_source, x_source, x_target, x_target)

        def with_own_states(apply_model, args):
            """The host joins the conditions over one state; each is given its own here."""
            own = torch.cat([states[kind] for kind in args["cond_or_uncond"]])
            if own.shape != args["input"].shape:
                remedy = "Set batch_pairs to false, or use prompts without areas."
                raise input_error("Source Target Guider", "source, target", "a prompt for a part of the picture", "whole pictures", remedy)
            return apply_model(own, args["timestep"], **args["c"])

        d = calc_cond_batch(self.inner_model, conds, x_source, sigma, {**options, "model_function_wrapper": with_own_states})
        mixed = []
        for positive, scale, x in ((0, self.cfg_source, x_source), (2, self.cfg, x_target)):
            pair = {"cond": conds[positive], "uncond": conds[positive + 1]}
            mixed.append(cfg_function(self.inner_model, d[positive], d[positive + 1], scale, x, sigma, options, **pair))
        return mixed[0], mixed[1]


def source_target_guider(cfg_guider: type, model: Any, host_calls: tuple[Callable, Callable], cfg_source: float, cfg_target: float):
    """A GUIDER for `model` with its own base class `cfg_guider`; set conditions with inner_set_conds: source, source_negative, positive
    and negative, the last two those of the target."""

    class SourceTargetGuider(SourceTarget, cfg_guider):
        pass

    guider = SourceTargetGuider(model)
    guider.host_calls = host_calls
    guider.cfg_source = cfg_source
    guider.set_cfg(cfg_target)
    return guider


def two_sided(guider: Any, where: str) -> Any:
    """`guider`, or a NodeInputError when it knows one prompt only."""
    if not isinstance(guider, SourceTarget):
        remedy = "Put a Source Target Guider between the prompts and SamplerCustomAdvanced."
        raise input_error(where, "guider", type(guider).__name__, "a Source Target Guider", remedy)
    return guider


class SideModel:
    """The source side of a guider as the model that solvers call."""

    def __init__(self, guider: SourceTarget):
        self.inner_model = guider

    def __call__(self, x, sigma, denoise_mask=None, model_options=None, seed=None):
        return self.inner_model.source(x, sigma, model_options, seed)


def seeded_noise(like: torch.Tensor, seed: int):
    """An endless supply of N(0, 1) in the shape of `like`, drawn on the CPU; row r has a generator of its own, seeded seed + r, so that a
    picture's noise does not depend on how many others run with it."""
    generators = [torch.Generator().manual_seed((seed + row) % 2**64) for row in range(len(like))]
    while True:
        yield torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators]).to(like)


def picture_mask(mask: torch.Tensor, x: torch.Tensor, where: str) -> torch.Tensor:
    """A picture's mask `(b or 1, h, w)` at the size of a latent `(b, c, …, h, w)`: `(b or 1, 1, …, h, w)`.

    Raises: NodeInputError for another number of masks.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(x)
    if mask.shape[0] not in (1, x.shape[0]):
        raise input_error(where, "mask", f"{mask.shape[0]} masks", f"1 or {x.shape[0]} masks", "Give one mask, or one for each picture.")
    mask = F.interpolate(mask, size=x.shape[-2:], mode="area")
    return mask if x.ndim == 4 else mask.unsqueeze(2)
