"""Multistep solvers: one model evaluation a step, order 2 and up from the velocities or estimates of earlier steps.

Same call shape and convention as solvers.py. A history is kept within one run only, in the dtype of x, and dropped where the
schedule turns round, because extrapolating across a turn is extrapolating backwards.
"""

from __future__ import annotations

import torch

from .walk import Walk

__all__ = ["sample_ab2"]


@torch.no_grad()
def sample_ab2(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Adams-Bashforth: x' = x + h·v + h²/2·(v − v_prev)/h_prev, first step Euler. Order 2, 1 NFE a step."""
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    v_prev, h_prev = None, 0.0
    for s, s_next in walk:
        h = s_next - s
        v = walk.velocity(x, s)
        x_next = x + h * v
        if v_prev is not None and h * h_prev > 0:
            x_next = x_next + h * h / 2 * (v - v_prev) / h_prev
        x, v_prev, h_prev = x_next, v, h
    return x
