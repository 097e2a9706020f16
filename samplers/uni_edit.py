"""Uni-Edit, "UniEdit-Flow", arXiv 2504.13109.

The picture is inverted along the lower share alpha of the schedule under the source prompt (Uni-Inv). On the way back both prompts are
asked at the same state; where they differ, the target leads:

    d = v_target − v_source        m = |d| averaged over channels, stretched to 0 … 1 in each picture
    x' = x + h·(m·v_target + (1 − m)·v_source + omega·(1 + m)·d)

We stretch each picture by itself and keep the quotient finite where d is 0, so that equal prompts give Uni-Inv's reconstruction.
Evaluations: 3·alpha·N + 1.
"""

from __future__ import annotations

import logging
from types import MappingProxyType

import torch

from .inversion import inversion_sigmas, sample_uni_inv
from .source_target import SideModel, picture_mask, two_sided

__all__ = ["UniEditSampler", "difference_mask"]

NAME = "Uni-Edit Sampler"


def difference_mask(d: torch.Tensor) -> torch.Tensor:
    """|d| `(b, c, …)` averaged over channels and stretched to 0 … 1 in each picture, `(b, 1, …)`; 0 where d is 0 everywhere."""
    size = d.abs().mean(dim=1, keepdim=True)
    flat = size.flatten(1)
    low, high = (edge.reshape(-1, *[1] * (d.ndim - 1)) for edge in (flat.amin(1), flat.amax(1)))
    return (size - low) / (high - low).clamp_min(torch.finfo(d.dtype).tiny ** 0.5)


class UniEditSampler:
    """The SAMPLER of Uni-Edit; its latent is the picture, its guider a Source Target Guider, its schedule falls to 0.

    mask: `(b or 1, h, w)` in place of the difference's own mask.
    """

    inpaint_options = MappingProxyType({})

    def __init__(self, alpha: float = 0.6, omega: float = 5.0, mask: torch.Tensor | None = None):
        self.alpha, self.omega, self.mask = alpha, omega, mask

    def max_denoise(self, guider, sigmas) -> bool:
        return False

    @torch.no_grad()
    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """`latent_image`: `(b, …)` in model space, the picture; `noise` is not used. What the host's guider calls."""
        guider = two_sided(guider, NAME)
        if denoise_mask is not None:
            logging.warning("Rectiflow: Uni-Edit leaves the latent's noise mask out; link it to the sampler's mask")
        steps = len(sigmas) - 1
        kept = round(self.alpha * steps)
        if kept == 0:
            return latent_image.clone()
        rising = inversion_sigmas(sigmas[steps - kept :].cpu(), where=NAME)
        options = {key: extra_args.get(key) for key in ("model_options", "seed")}
        x = sample_uni_inv(SideModel(guider), (1 - rising[0]) * latent_image, rising, options, disable=True)
        given = None if self.mask is None else picture_mask(self.mask, x, NAME)
        falling = sigmas[steps - kept :].cpu()
        for index, (s, s_next) in enumerate(zip(falling[:-1], falling[1:])):
            d_source, d_target = guider.both(x, x, s * x.new_ones([len(x)]), **options)
            v_source, v_target = (x - d_source) / s, (x - d_target) / s
            d = v_target - v_source
            m = difference_mask(d) if given is None else given
            x = x + (s_next - s) * (m * v_target + (1 - m) * v_source + self.omega * (1 + m) * d)
            if callback is not None:
                callback(steps - kept + index, d_target, x, steps)
        return x
