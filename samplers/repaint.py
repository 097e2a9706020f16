"""Resampling for masked runs whose given part is noised: go back up by fresh noise and take the step again.

RePaint, arXiv 2201.09865, in flow form. Under noise the given part guides little, and what was drawn early does not fit it later; going
back lets the generated part settle with it. docs/vdt.md has the measured gain.
"""

from __future__ import annotations

import torch

from ..errors import input_error
from .stochastic import RowNoise
from .walk import Walk

__all__ = ["sample_repaint"]


@torch.no_grad()
def sample_repaint(model, x, sigmas, extra_args=None, callback=None, disable=None, resample=5, seed_offset=0):
    """Euler, each step taken `resample` + 1 times: x' = x + h·v, and between two takings back up along the path's own kernel,

    x = k·x' + sqrt(s² − (k·s')²)·n, k = (1 − s)/(1 − s'). At s = 1 that is fresh noise. The given part of a mask
    is noised afresh with it. resample + 1 NFE a step; the last step is taken once, for nothing comes after it. resample 0 is
    Euler exactly.
    """
    if resample < 0:
        raise input_error("RepaintSampler", "resample", resample, "0 or more", "5 is a good start; 0 is Euler.")
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    if bool((walk.sigmas[1:] > walk.sigmas[:-1]).any()):
        raise input_error("RepaintSampler", "sigmas", "a rising schedule", "sigmas that fall", "Invert with Flow Invert Sampler.")
    # With a mask the model is the host's wrapper, which noises the given part by its attribute `noise`.
    masked = (extra_args or {}).get("denoise_mask") is not None
    noise = RowNoise(x, int((extra_args or {}).get("seed") or 0) + seed_offset)
    for s, s_next in walk:
        again = resample if 0 < s_next < s else 0
        for taking in range(again + 1):
            x_next = x + walk.velocity(x, s) * (s_next - s)
            if taking < again:
                kept = (1 - s) / (1 - s_next)
                x = kept * x_next + (s**2 - (kept * s_next) ** 2).sqrt() * noise.draw()
                if masked:
                    model.noise = noise.draw()
        x = x_next
    return x
