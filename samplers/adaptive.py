"""An adaptive solver: Bogacki and Shampine's embedded pair of orders 3 and 2 with error control and a cap on evaluations."""

from __future__ import annotations

import logging

import torch

from ..errors import input_error
from .walk import Walk

__all__ = ["sample_adaptive"]


@torch.no_grad()
def sample_adaptive(model, x, sigmas, extra_args=None, callback=None, disable=None, rtol=1e-2, atol=1e-2, max_nfe=200):
    """k2 = v(x + h/2·k1, s + h/2), k3 = v(x + 3h/4·k2, s + 3h/4), x' = x + h/9·(2k1 + 3k2 + 4k3), k4 = v(x', s') = k1 of the next step,
    error = h·(−5/72·k1 + 1/12·k2 + 1/9·k3 − 1/8·k4).

    Only the ends of `sigmas` bind the path; its inner values set the first step's length and what the callback counts. A step is
    taken when the root mean square of error/(atol + rtol·max(|x|, |x'|)) is at most 1 in every row: a batch walks in step with its
    hardest row. When `max_nfe` (at least 4) no longer allows that, the rest is walked in equal steps without control, and a
    warning says so.
    """
    if max_nfe < 4 or not (rtol > 0 and atol > 0):
        got = (rtol, atol, max_nfe)
        raise input_error("sample_adaptive", "rtol, atol, max_nfe", got, "above 0, above 0, 4 or more", "Try 0.01, 0.01, 200.")
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    if len(walk.sigmas) < 2:
        return x
    grid = walk.sigmas.double()
    end, s = float(grid[-1]), float(grid[0])
    length = float(grid[1] - grid[0]) or (end - s)
    k1, capped = walk.velocity(x, _scalar(s, walk)), False
    while s != end:
        left = end - s
        allowed = max((max_nfe - walk.nfe) // 3, 1)  # three evaluations a step, the first is the last step's fourth
        if abs(left) >= abs(length) * allowed:
            length, capped = left / allowed, True
        elif abs(length) >= 0.999 * abs(left):
            length = left
        x_new, k4, error = _step(walk, x, s, length, k1, rtol, atol)
        if error <= 1 or capped:
            s = end if length == left else s + length
            x, k1 = x_new, k4
            walk.reached(s)
        length *= min(max(0.9 * max(error, 1e-8) ** (-1 / 3), 0.2), 5.0)
    if capped:
        logging.warning("Rectiflow: the adaptive solver reached its cap of %d model evaluations before its tolerance", max_nfe)
    return x


def _scalar(s: float, walk: Walk) -> torch.Tensor:
    return torch.tensor(s, dtype=walk.sigmas.dtype)


def _step(walk: Walk, x, s: float, h: float, k1, rtol: float, atol: float):
    """(x', k4, error) where error is the worst row's, in units of the tolerance."""
    k2 = walk.velocity(x + h / 2 * k1, _scalar(s + h / 2, walk), first=k1)
    k3 = walk.velocity(x + 3 * h / 4 * k2, _scalar(s + 3 * h / 4, walk), first=k1)
    x_new = x + h / 9 * (2 * k1 + 3 * k2 + 4 * k3)
    k4 = walk.velocity(x_new, _scalar(s + h, walk), first=k1)
    error = h * (-5 / 72 * k1 + k2 / 12 + k3 / 9 - k4 / 8)
    allowed = atol + rtol * torch.maximum(x.abs(), x_new.abs())
    rows = ((error / allowed) ** 2).flatten(1).mean(1).sqrt()  # (b,)
    return x_new, k4, float(rows.max())
