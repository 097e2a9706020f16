"""One-step solvers of the flow ODE dx/ds = v(x, s), for sampling (s falls) and inversion (s rises) alike.

Every function has the shape ComfyUI calls: `sample_<name>(model, x, sigmas, extra_args, callback, disable, **options)`, where
`denoised = model(x, sigma_of_each_row, **extra_args)`. x is `(b, …)` of any rank, rows never mix. h = s' − s.

RF-Solver: "Taming Rectified Flow for Inversion and Editing", arXiv 2411.04746. The others are the textbook's; how the paper's
step and the midpoint rule are the same one is shown in docs/rf-solver.md.
"""

from __future__ import annotations

import torch

from ..errors import input_error
from .walk import Walk

__all__ = ["sample_euler", "sample_heun", "sample_midpoint", "sample_rf_solver", "sample_rk4"]


@torch.no_grad()
def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """x' = x + h·v(x, s). Order 1, 1 NFE a step."""
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    for s, s_next in walk:
        x = x + walk.velocity(x, s) * (s_next - s)
    return x


@torch.no_grad()
def sample_midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """x' = x + h·v(x + h/2·v(x, s), s + h/2). Order 2, 2 NFE a step; s + h/2 is never 0, so no step is special."""
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    for s, s_next in walk:
        h = s_next - s
        v = walk.velocity(x, s)
        v_mid = walk.velocity(x + h / 2 * v, s + h / 2, first=v)
        x = x + h * v_mid
    return x


@torch.no_grad()
def sample_rf_solver(model, x, sigmas, extra_args=None, callback=None, disable=None, derivative="midpoint", probe=0.01):
    """Second-order Taylor step x' = x + h·v + h²/2·d, d = (v(x + e·v, s + e) − v)/e ≈ dv/ds. 2 NFE a step.

    derivative "midpoint" takes e = h/2, as the released code does: order 2. "fixed_probe" takes |e| = min(probe, |h|) with the
    sign of h, so that s + e never leaves the step: order 2 while |h| is well above the probe, order 1 below.
    """
    if derivative not in ("midpoint", "fixed_probe"):
        raise input_error("sample_rf_solver", "derivative", derivative, "midpoint or fixed_probe", "Pick one of the two.")
    if not 0 < probe <= 1:
        raise input_error("sample_rf_solver", "probe", probe, "a sigma distance above 0, at most 1", "0.01 is the paper's.")
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    for s, s_next in walk:
        h = s_next - s
        e = h / 2 if derivative == "midpoint" or h == 0 else h * min(probe / abs(float(h)), 1.0)
        v = walk.velocity(x, s)
        d = (walk.velocity(x + e * v, s + e, first=v) - v) / e if h != 0 else 0.0
        x = x + h * v + h * h / 2 * d
    return x


@torch.no_grad()
def sample_heun(model, x, sigmas, extra_args=None, callback=None, disable=None, last_step="euler"):
    """x~ = x + h·v(x, s), x' = x + h/2·(v(x, s) + v(x~, s')). Order 2, 2 NFE a step.

    A step that ends at s' = 0 is an Euler step when last_step is "euler" (2N − 1 NFE, as in k-diffusion); "exact" reads the
    velocity of sigma 0 at the floor instead (2N NFE).
    """
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    for s, s_next in walk:
        h = s_next - s
        v = walk.velocity(x, s)
        x_euler = x + h * v
        if s_next == 0 and last_step == "euler":
            x = x_euler
            continue
        x = x + h / 2 * (v + walk.velocity(x_euler, s_next, first=v))
    return x


@torch.no_grad()
def sample_rk4(model, x, sigmas, extra_args=None, callback=None, disable=None, last_step="euler"):
    """The classical Runge-Kutta rule: k1 … k4, x' = x + h/6·(k1 + 2·k2 + 2·k3 + k4). Order 4, 4 NFE a step.

    A step that ends at s' = 0 is Heun's third-order rule (stages at s, s + h/3, s + 2h/3; 3 NFE) when last_step is "euler",
    since it needs no velocity at sigma 0; "exact" reads that velocity at the floor.
    """
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    for s, s_next in walk:
        h = s_next - s
        k1 = walk.velocity(x, s)
        if s_next == 0 and last_step == "euler":
            k2 = walk.velocity(x + h / 3 * k1, s + h / 3, first=k1)
            k3 = walk.velocity(x + h * 2 / 3 * k2, s + h * 2 / 3, first=k1)
            x = x + h / 4 * (k1 + 3 * k3)
            continue
        k2 = walk.velocity(x + h / 2 * k1, s + h / 2, first=k1)
        k3 = walk.velocity(x + h / 2 * k2, s + h / 2, first=k1)
        k4 = walk.velocity(x + h * k3, s_next, first=k1)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x
