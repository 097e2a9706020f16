"""Stochastic samplers that keep the marginals of the flow, and one that does not and says when to use it.

"The Principles of Diffusion Models", arXiv 2510.21890; rf++: "Improving the Training of Rectified Flows", arXiv 2405.20320. Same call
shape and convention as solvers.py. All randomness comes from extra_args["seed"], drawn on the CPU, one generator a row: row r of a
batch equals a run of that row alone with seed + r.
"""

from __future__ import annotations

import torch

from ..errors import input_error
from .walk import Walk

__all__ = ["RowNoise", "sample_ancestral", "sample_carry_noise", "sample_sde"]


class RowNoise:
    """Standard normal draws shaped like x, `(b, …)`, from one CPU generator a row."""

    def __init__(self, x: torch.Tensor, seed: int):
        self.like = x
        self.generators = [torch.Generator().manual_seed((seed + row) % 2**64) for row in range(x.shape[0])]

    def draw(self) -> torch.Tensor:
        rows = [torch.randn(self.like.shape[1:], generator=generator, dtype=self.like.dtype) for generator in self.generators]
        return torch.stack(rows).to(self.like.device)


def _noise(x: torch.Tensor, extra_args, seed_offset: int) -> RowNoise:
    return RowNoise(x, int((extra_args or {}).get("seed") or 0) + seed_offset)


def _falling(walk: Walk, name: str) -> None:
    if bool((walk.sigmas[1:] > walk.sigmas[:-1]).any()):
        raise input_error(name, "sigmas", "a rising schedule", "sigmas that fall", "Invert with Flow ODE Sampler or RF-Solver Sampler.")


@torch.no_grad()
def sample_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=0.5, s_noise=1.0, sigma_lo=0.0, sigma_hi=1.0, seed_offset=0,
):
    """The reverse SDE with the flow's marginals: with ds = s − s', n normal, eps = x + (1 − s)·v and w2 = 2·eta·s/(1 − s),

    x' = x − ds·v − w2/2·ds·eps/s + sqrt(w2·ds)·s_noise·n. Noise only for sigma_lo <= s <= sigma_hi and never in a step to 0; w2 is
    capped at 2s/ds, where the explicit step would overshoot. eta 0 is Euler exactly. 1 NFE a step.
    """
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    _falling(walk, "FlowSDESampler")
    noise = _noise(x, extra_args, seed_offset)
    for s, s_next in walk:
        v = walk.velocity(x, s)
        ds = float(s - s_next)
        x_next = x + v * (s_next - s)
        if eta > 0 and s_next > 0 and ds > 0 and sigma_lo <= s <= sigma_hi:
            limit = 2 * float(s) / ds
            w2 = min(2 * eta * float(s) / (1 - float(s)), limit) if s < 1 else limit
            x_next = x_next - w2 / 2 * ds / float(s) * (x + (1 - s) * v) + (w2 * ds) ** 0.5 * s_noise * noise.draw()
        x = x_next
    return x


@torch.no_grad()
def sample_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=0.5, s_noise=1.0, sigma_lo=0.0, sigma_hi=1.0, seed_offset=0,
    solver="euler",
):
    """Go further down than asked, then add noise back along the path's own kernel: a step of `solver` to s_d = s'·(1 + (s'/s − 1)·eta),

    then x' = (1 − s')/(1 − s_d)·x_d + sqrt(s'² − s_d²·((1 − s')/(1 − s_d))²)·s_noise·n. The kernel is exact whatever the flow, so the
    marginals err by the solver's step alone: "euler" (1 NFE a step; eta 0 is Euler exactly) loses spread to first order in the step,
    "midpoint" (2 NFE; eta 0 is the midpoint rule exactly) to second.
    """
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    _falling(walk, "FlowSDESampler")
    noise = _noise(x, extra_args, seed_offset)
    for s, s_next in walk:
        v = walk.velocity(x, s)
        inside = eta > 0 and 0 < s_next < s and sigma_lo <= s <= sigma_hi
        s_down = s_next * (1 + (s_next / s - 1) * eta) if inside else s_next
        h = s_down - s
        x = x + h * (walk.velocity(x + h / 2 * v, s + h / 2, first=v) if solver == "midpoint" else v)
        if inside:
            keep = (1 - s_next) / (1 - s_down)
            x = keep * x + (s_next**2 - (s_down * keep) ** 2).clamp(min=0).sqrt() * s_noise * noise.draw()
    return x


@torch.no_grad()
def sample_carry_noise(model, x, sigmas, extra_args=None, callback=None, disable=None, solver="euler", max_steps=8, force=False):
    """rf++'s few-step rule: x' = (1 − s')·x0_hat + s'·z with z the noise of the start, never estimated again. 1 NFE a step.

    z = (x − (1 − s)·x0_hat)/s at the first sigma, which is x itself at sigma 1. solver "heun" averages v with the velocity at the
    mapped point (2N − 1 NFE). It does not converge to the flow: on a curved one its spread grows with every step, so more than
    `max_steps` steps are refused unless `force`.
    """
    steps = len(sigmas) - 1
    if steps > max_steps and not force:
        remedy = "Use Uniform Flow Sigmas with few steps."
        raise input_error("CarryNoiseSampler", "sigmas", f"{steps} steps", f"at most max_steps = {max_steps}", remedy)
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    _falling(walk, "CarryNoiseSampler")
    z = None
    for s, s_next in walk:
        v = walk.velocity(x, s)
        x0 = x - s * v
        z = x + (1 - s) * v if z is None else z
        x_next = (1 - s_next) * x0 + s_next * z
        if solver == "heun" and s_next > 0:
            v = (v + walk.velocity(x_next, s_next, first=v)) / 2
            x_next = (1 - s_next) * (x - s * v) + s_next * z
        x = x_next
    return x
