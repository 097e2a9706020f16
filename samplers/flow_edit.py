"""FlowEdit, "Inversion-Free Text-Based Editing Using Pre-Trained Flow Models", arXiv 2412.08629.

The picture is never turned into noise. At every sigma both prompts are asked about noisy versions of the old and the new picture that
share one noise, and the new picture moves by the difference of the two velocities:

    zs = (1 − s)·x_src + s·n,   n ~ N(0, I) fresh in every step        zt = z + zs − x_src
    z' = z + (s' − s)·mean over n of (v(zt, s, target) − v(zs, s, source))        z starts as x_src

`skip` first steps are left out: the more, the closer the picture stays. The last `refine` steps are plain Euler steps of the target
prompt from z + zs − x_src. With equal prompts and scales z stays x_src exactly. A mask keeps everything outside exactly, which the
paper does not have.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from ..errors import input_error
from .source_target import seeded_noise, two_sided
from .walk import check_sigmas

__all__ = ["FlowEditSampler"]

NAME = "FlowEdit Sampler"


class FlowEditSampler:
    """The SAMPLER of FlowEdit; its latent is the picture, its guider a Source Target Guider, its schedule falls.

    Evaluations: 2·n_avg·(steps − skip − refine) + refine; joined pairs count two of them in one model call.
    """

    inpaint_options = MappingProxyType({})

    def __init__(self, skip: int = 4, refine: int = 0, n_avg: int = 1, seed: int = 0, batch_pairs: bool = False):
        self.skip, self.refine, self.n_avg, self.seed, self.batch_pairs = skip, refine, n_avg, seed, batch_pairs

    def max_denoise(self, guider, sigmas) -> bool:
        return False

    @torch.no_grad()
    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """`latent_image`: `(b, …)` in model space, the picture; `noise` is not used. What the host's guider calls."""
        guider = two_sided(guider, NAME)
        sigmas = check_sigmas(sigmas, NAME)
        steps = len(sigmas) - 1
        if not bool((sigmas[1:] < sigmas[:-1]).all()):
            remedy = "Connect the schedule you would sample with."
            raise input_error(NAME, "sigmas", "a schedule that does not fall", "falling sigmas", remedy)
        if self.skip + self.refine >= steps:
            got, allowed = f"skip {self.skip}, refine {self.refine}", f"together fewer than the {steps} steps"
            raise input_error(NAME, "skip", got, allowed, "Lower skip or refine, or use more steps.")
        options = {key: extra_args.get(key) for key in ("model_options", "seed")}
        source, z = latent_image, latent_image.clone()
        supply = seeded_noise(z, self.seed)
        offset = None  # zt − z
        for index in range(self.skip, steps):
            s, s_next = sigmas[index], sigmas[index + 1]
            if index < steps - self.refine:
                z = z + (s_next - s) * self._difference(guider, source, z, s, supply, options)
                shown = z
            else:
                if offset is None:
                    offset = s * (next(supply) - source)
                    z = z + offset
                shown = guider(z, s * z.new_ones([len(z)]), **options)
                z = z + (s_next - s) * (z - shown) / s
            if callback is not None:
                callback(index, shown, z, steps)
        return z if denoise_mask is None else source + denoise_mask * (z - source)

    def _difference(self, guider, source, z, s, supply, options) -> torch.Tensor:
        """The target's velocity less the source's, averaged over n_avg noises."""
        total = torch.zeros_like(z)
        for _ in range(self.n_avg):
            zs = (1 - s) * source + s * next(supply)
            zt = zs + (z - source)  # in this order, equal prompts cancel to the last bit
            d_source, d_target = guider.both(zs, zt, s * z.new_ones([len(z)]), **options, joined=self.batch_pairs)
            total += ((zt - d_target) - (zs - d_source)) / s
        return total / self.n_avg
