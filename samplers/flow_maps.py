"""Samplers of models that learned the flow's map itself: one call jumps from one noise level to another.

"The Principles of Diffusion Models", arXiv 2510.21890. Psi(s→t) takes a state at s to the state at t, and composes:
Psi(u→t)·Psi(s→u) = Psi(s→t). Consistency models (arXiv 2303.01469) learn Psi(s→0); CTM (arXiv 2310.02279) learns g with
Psi = (t/s)·x + (1 − t/s)·g(x, s, t); MeanFlow (arXiv 2505.13447) learns the mean velocity h with Psi = x + (t − s)·h(x, s, t). Both are one
jump, since g = x − s·h; at t = s, h is the velocity and g the denoised picture.

A model of two times finds t in transformer_options["flow_map_target"], a tensor `(1,)` that holds for all rows. Its host returns
denoised = x − s·h, which is g.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import input_error
from .stochastic import RowNoise
from .walk import Walk

__all__ = ["FLOW_MAPS", "TARGET", "sample_flow_map"]

FLOW_MAPS = ("cm", "ctm", "meanflow")
TARGET = "flow_map_target"


def _aimed_at(extra_args: dict[str, Any], target: torch.Tensor) -> dict[str, Any]:
    """The arguments of a model call with the second time in their transformer_options; the run's own dictionaries stay as they are."""
    model_options = extra_args.get("model_options") or {}
    transformer_options = {**model_options.get("transformer_options", {}), TARGET: target.reshape(1)}
    return {**extra_args, "model_options": {**model_options, "transformer_options": transformer_options}}


@torch.no_grad()
def sample_flow_map(
    model, x, sigmas, extra_args=None, callback=None, disable=None, kind="meanflow", restart_noise=False, seed_offset=0
):
    """One jump a step, 1 NFE each, exact on any grid for an exact map. D = denoised, aimed at t:

    cm: t = 0, x' = (s'/s)·x + (1 − s'/s)·D.  ctm: t = s', the same jump.  meanflow: t = s', x' = x + (s' − s)·(x − D)/s.
    restart_noise: t = 0 and x' = (1 − s')·D + s'·n with fresh n, as consistency models are sampled in several steps.

    Raises:
        NodeInputError: unknown kind, or a schedule that rises or leaves sigma 0.
    """
    if kind not in FLOW_MAPS:
        raise input_error("FlowMapSampler", "kind", kind, ", ".join(FLOW_MAPS), "Pick one of them.")
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    if bool((walk.sigmas[1:] > walk.sigmas[:-1]).any() or (walk.sigmas[:-1] == 0).any()):
        raise input_error("FlowMapSampler", "sigmas", "a rising schedule", "sigmas that fall", "Connect a sampling schedule.")
    run_args = walk.extra_args
    noise = RowNoise(x, int(run_args.get("seed") or 0) + seed_offset)
    to_clean = kind == "cm" or restart_noise
    for s, s_next in walk:
        walk.extra_args = _aimed_at(run_args, torch.zeros_like(s_next) if to_clean else s_next)
        d = walk.denoise(x, s)
        if restart_noise:
            x = (1 - s_next) * d + s_next * noise.draw() if s_next > 0 else d
        elif kind == "meanflow":
            x = x + (s_next - s) * ((x - d) / s)
        else:
            x = s_next / s * x + (1 - s_next / s) * d
    return x
