"""Samplers for models whose trajectories are first order: one step, or a few exact ones.

"Rectified Diffusion", arXiv 2410.07303: where the noise estimate is constant along a trajectory, the deterministic DDIM step is exact
with any number of steps, on the flow path (alpha = 1 − s) and on the variance-exploding path of epsilon models (alpha = 1) alike. One-step
weights: "InstaFlow", arXiv 2309.06380.
"""

from __future__ import annotations

import torch

from ..errors import input_error
from .stochastic import RowNoise
from .walk import Walk

__all__ = ["sample_first_order", "sample_one_step"]


@torch.no_grad()
def sample_one_step(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """x0 = x − s·v(x, s): one call, one jump to the clean picture.

    Raises:
        NodeInputError: the schedule is not one step that ends at 0; more steps make one-step weights worse.
    """
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    if len(walk.sigmas) != 2 or walk.sigmas[1] != 0 or walk.sigmas[0] == 0:
        got = [round(float(s), 4) for s in walk.sigmas[:6]]
        raise input_error("OneStepSampler", "sigmas", got, "two values, the second 0", "Use Uniform Flow Sigmas with steps 1.")
    for s, _ in walk:
        x = walk.denoise(x, s)
    return x


@torch.no_grad()
def sample_first_order(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=0.0, final="zero", seed_offset=0):
    """DDIM in noise-to-signal form: with D = denoised, eps = (x − alpha·D)/s and r = (NSR'/NSR)², NSR = s/alpha,

    x' = alpha'·D + s'·(sqrt(1 − eta²·(1 − r))·eps + eta·sqrt(1 − r)·n). With eta 0 this is (s'/s)·x + (1 − s'/s)·D, which on the
    flow path is Euler. final "sigma_min" ends at the model's smallest sigma instead of 0, as DDIM with alpha_cumprod[0] does. 1 NFE a step.
    """
    sampling = _model_sampling(model)
    flow = sampling is None or float(sampling.percent_to_sigma(0.0)) <= 1
    walk = Walk(model, x, sigmas, extra_args, callback, disable, sigma_limit=1.0 if flow else float("inf"))
    if final == "sigma_min" and sampling is not None and len(walk.sigmas) and walk.sigmas[-1] == 0:
        walk.sigmas = torch.cat([walk.sigmas[:-1], walk.sigmas.new_tensor([float(sampling.sigma_min)])])
    noise = RowNoise(x, int((extra_args or {}).get("seed") or 0) + seed_offset)
    for s, s_next in walk:
        if s == 0:
            remedy = "Invert with Flow Invert Sampler."
            raise input_error("FirstOrderSampler", "sigmas", "a schedule that leaves 0", "sigmas that fall", remedy)
        d = walk.denoise(x, s)
        ratio = s_next / s
        if eta > 0 and 0 < s_next < s:
            alpha, alpha_next = (1 - s, 1 - s_next) if flow else (1.0, 1.0)
            fresh = 1 - (ratio * alpha / alpha_next) ** 2  # 1 − r
            keep = (1 - eta**2 * fresh).sqrt()
            x = alpha_next * d + s_next * (keep * (x - alpha * d) / s + eta * fresh.sqrt() * noise.draw())
        else:
            x = ratio * x + (1 - ratio) * d
    return x


def _model_sampling(model):
    """The host's model_sampling behind the wrapper and the guider; None where the caller is no host."""
    return getattr(getattr(getattr(model, "inner_model", None), "inner_model", None), "model_sampling", None)
