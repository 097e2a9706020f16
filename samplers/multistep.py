"""Multistep solvers: one model evaluation a step, order 2 and up from the velocities or estimates of earlier steps.

Same call shape and convention as solvers.py, h = s' − s. A history is kept within one run only, in the dtype of x, and dropped
where the schedule turns round, because extrapolating across a turn is extrapolating backwards.

Exponential solvers integrate dx/dtau = D − x, D = denoised, which is exact in the clock tau = −log s and makes s = 1 an ordinary
point ("The Principles of Diffusion Models", arXiv 2510.21890). FireFlow: arXiv 2412.07517. UniPC: arXiv 2302.04867.
"""

from __future__ import annotations

import math

import torch

from ..errors import input_error
from .walk import Walk

__all__ = ["sample_ab2", "sample_ab3", "sample_fireflow", "sample_dpmpp_2m", "sample_unipc"]


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


@torch.no_grad()
def sample_ab3(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Adams-Bashforth of order 3 on any grid: the parabola through the last three velocities, integrated over the step.

    With divided differences d1 = (v − v1)/h1, d2 = (d1 − (v1 − v2)/h2)/(h1 + h2):
    x' = x + h·v + h²/2·d1 + (h³/3 + h1·h²/2)·d2. The first step is a midpoint step, the second AB2. N + 1 NFE.
    """
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    past: list[tuple[torch.Tensor, torch.Tensor]] = []  # (v, h) of earlier steps, newest first
    for s, s_next in walk:
        h = s_next - s
        if past and not h * past[0][1] > 0:
            past = []
        v = walk.velocity(x, s)
        if not past:
            x = x + h * walk.velocity(x + h / 2 * v, s + h / 2, first=v)
        else:
            v1, h1 = past[0]
            d1 = (v - v1) / h1
            x = x + h * v + h**2 / 2 * d1
            if len(past) == 2:
                v2, h2 = past[1]
                x = x + (h**3 / 3 + h1 * h**2 / 2) * (d1 - (v1 - v2) / h2) / (h1 + h2)
        past = [(v, h), *past[:1]]
    return x


@torch.no_grad()
def sample_fireflow(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """FireFlow: the midpoint rule whose half step reuses the last midpoint velocity: vm = v(x + h/2·v_half, s + h/2), x' = x + h·vm,
    v_half ← vm; v_half starts as v(x, s). Order 2, N + 1 NFE."""
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    v_half, h_prev = None, 0.0
    for s, s_next in walk:
        h = s_next - s
        if v_half is None or not h * h_prev > 0:
            v_half = walk.velocity(x, s)
        v_half = walk.velocity(x + h / 2 * v_half, s + h / 2, first=v_half)
        x, h_prev = x + h * v_half, h
    return x


def _clock(s: torch.Tensor, name: str) -> float:
    """tau = −log s, or lambda = log((1 − s)/s) read at s <= 1 − 1e-4, since lambda(1) is infinite."""
    value = float(s)
    if value == 0:
        return math.inf
    return -math.log(value) if name == "tau" else math.log(max(1 - value, 1e-4) / value)


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None, clock="tau"):
    """DPM-Solver++(2M) in flow form: x' = (s'/s)·x + (1 − s'/s)·D~, D~ = D + (D − D_prev)·h_clock/(2·h_prev_clock). 1 NFE a step.

    clock "tau" is what ComfyUI's dpmpp_2m computes on flow models; "lambda" measures steps in half log-SNR. Steps from or to
    sigma 0 use D alone, in the Euler form x + h·(x − D)/s where s is 0. Order 2 away from sigma 0.
    """
    if clock not in ("tau", "lambda"):
        raise input_error("sample_dpmpp_2m", "clock", clock, "tau or lambda", "Pick one of the two.")
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    d_prev, h_prev = None, 0.0
    for s, s_next in walk:
        if s == 0:
            x = x + (s_next - s) * walk.velocity(x, s)
            continue
        d = walk.denoise(x, s)
        h = _clock(s_next, clock) - _clock(s, clock)
        estimate = d
        if d_prev is not None and s_next != 0 and h * h_prev > 0:
            estimate = d + (d - d_prev) * (h / (2 * h_prev))
        ratio = s_next / s
        x, d_prev, h_prev = ratio * x + (1 - ratio) * estimate, d, h
    return x


@torch.no_grad()
def sample_unipc(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Predictor-corrector in tau after UniPC: the evaluation at the predicted point first corrects the step that led there.

    x' = e^−h·x + integral of e^−(h−u)·P(u) du over the step, h = tau' − tau. Predictor: P is the line through D_prev, D;
    corrector: the parabola through D_prev, D and D at the predicted point. Order 3 away from sigma 0, 1 NFE a step; steps from or to
    sigma 0 are first order.
    """
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    last = None  # (x before the step, D there, h of the step, D one step earlier, its h)
    for s, s_next in walk:
        if s == 0:
            x, last = x + (s_next - s) * walk.velocity(x, s), None
            continue
        d = walk.denoise(x, s)
        if last is not None:
            x = _unipc_correct(*last, d)
        h = _clock(s_next, "tau") - _clock(s, "tau")
        i0, i1, _ = _exponential_moments(h)
        d_prev, h_prev = (last[1], last[2]) if last is not None and h * last[2] > 0 else (None, 0.0)
        predicted = (1 - i0) * x + i0 * d
        if d_prev is not None and s_next != 0:
            predicted = predicted + i1 * (d - d_prev) / h_prev
        last = (x, d, h, d_prev, h_prev) if h != 0 and s_next != 0 else None
        x = predicted
    return x


def _exponential_moments(h: float) -> tuple[float, float, float]:
    """Integrals of e^−(h−u)·(1, u, u²) over 0..h; an infinite step keeps only the first, which is 1."""
    if math.isinf(h):
        return 1.0, 0.0, 0.0
    i0 = -math.expm1(-h)
    # h − i0 and h² − 2·i1 cancel for small steps; three terms of the series are exact to 1e-12 below 1e-3.
    i1 = h - i0 if abs(h) > 1e-3 else h * h * (1 / 2 - h / 6 + h * h / 24)
    i2 = h * h - 2 * i1 if abs(h) > 1e-2 else h**3 * (1 / 3 - h / 12 + h * h / 60 - h**3 / 360)
    return i0, i1, i2


def _unipc_correct(x, d, h, d_prev, h_prev, d_new):
    """The step from x over h once more, now knowing D at its end."""
    i0, i1, i2 = _exponential_moments(h)
    slope = (d_new - d) / h
    corrected = (1 - i0) * x + i0 * d + i1 * slope
    if d_prev is not None:
        corrected = corrected + (i2 - h * i1) * (slope - (d - d_prev) / h_prev) / (h + h_prev)
    return corrected
