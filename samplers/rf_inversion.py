"""RF-Inversion, "Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations", arXiv 2410.10792 (its ODE form).

A controller is mixed into the velocity. On the way up it leads to one drawn noise y1, on the way down to the source picture y0:

    up     u = v + gamma·((y1 − x)/(1 − s) − v)        down   u = v + eta·((x − y0)/s − v)        x' = x + h·u

gamma 0 is Euler's inversion, gamma 1 ends at y1; eta 1 to the end returns y0. Both quotients are read at the start of a step, where
1 − s and s are not 0. The published inversion counts time evenly while it steps on a shifted schedule; here one schedule serves both.
"""

from __future__ import annotations

import torch

from ..errors import input_error
from .source_target import seeded_noise
from .walk import Walk

__all__ = ["TRENDS", "sample_rf_inversion_forward", "sample_rf_inversion_reverse", "window_strengths"]

TRENDS = ("constant", "linear_up", "linear_down")


@torch.no_grad()
def sample_rf_inversion_forward(model, x, sigmas, extra_args=None, callback=None, disable=None, gamma=0.5, seed=0):
    """Inversion along rising sigmas, 1 NFE a step. y1 is drawn from `seed`."""
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    y1 = next(seeded_noise(x, seed))
    for s, s_next in walk:
        v = walk.velocity(x, s)
        x = x + (s_next - s) * (v + gamma * ((y1 - x) / (1 - s) - v))
    return x


def window_strengths(steps: int, eta: float, start: float, end: float, trend: str) -> list[float]:
    """eta of every step: 0 outside the steps from start·steps to end·steps, inside constant, or rising to or falling from eta.

    Raises: NodeInputError for a window that ends before it starts, or an unknown trend.
    """
    if not 0 <= start <= end <= 1:
        remedy = "0 to 0.25 is usual."
        raise input_error("RF-Inversion Reverse Sampler", "start_percent, end_percent", (start, end), "0 <= start <= end <= 1", remedy)
    if trend not in TRENDS:
        raise input_error("RF-Inversion Reverse Sampler", "trend", trend, ", ".join(TRENDS), "Pick one of them.")
    inside = range(round(start * steps), round(end * steps))
    count = len(inside)
    shares = {"constant": [1.0] * count, "linear_up": [(i + 1) / count for i in range(count)]}
    shares["linear_down"] = shares["linear_up"][::-1]
    return [eta * shares[trend][i - inside.start] if i in inside else 0.0 for i in range(steps)]


@torch.no_grad()
def sample_rf_inversion_reverse(
    model, x, sigmas, extra_args=None, callback=None, disable=None, source=None, eta=0.9, start=0.0, end=0.25, trend="constant",
):
    """Sampling along falling sigmas with the pull towards `source`, 1 NFE a step.

    Args:
        source: y0 as a LATENT's samples `(b or 1, …)`, in the space of the codec; the host's model turns it into its own.
    """
    if source.shape[1:] != x.shape[1:] or source.shape[0] not in (1, x.shape[0]):
        remedy = "Link the latent that was inverted."
        raise input_error("RF-Inversion Reverse Sampler", "source", tuple(source.shape), f"the run's shape {tuple(x.shape)}", remedy)
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    y0 = model.inner_model.inner_model.process_latent_in(source).to(x)
    strengths = window_strengths(len(walk.sigmas) - 1, eta, start, end, trend)
    for s, s_next in walk:
        v = walk.velocity(x, s)
        pull = strengths[walk.index]
        x = x + (s_next - s) * (v + pull * ((x - y0) / s - v) if pull else v)
    return x
