"""DPM-Solver (Lu et al. 2022, arXiv:2206.00927): exponential integrators of order 1 to 3 in t = −log sigma, with a fixed number of
evaluations ("fast") or an error-controlled step ("adaptive").

Between t and t' = t + h, with eps = (x − denoised)/sigma: x' = x − sigma'·(e^h − 1)·eps − corrections from eps at points inside.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from .common import Denoiser, NoiseSampler, get_ancestral_step

FROM_LIMITS = frozenset(("dpm_fast", "dpm_adaptive"))  # samplers that are given the ends of a schedule, not its steps


def over_schedule(function: Callable, with_steps: bool) -> Callable:
    """Let a sampler of (model, x, sigma_min, sigma_max, …) run from a schedule: its ends, and with `with_steps` its step count.

    A last 0 has no logarithm; the sigma before it is the end then.
    """

    @functools.wraps(function)
    def run(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args=None, callback=None, disable=None, **options) -> torch.Tensor:
        if len(sigmas) <= 1:
            return x
        end = sigmas[-1] if sigmas[-1] != 0 else sigmas[-2]
        steps = (len(sigmas) - 1,) if with_steps else ()
        return function(model, x, end, sigmas[0], *steps, extra_args=extra_args, callback=callback, disable=disable, **options)

    return run


def _sigma(t: torch.Tensor) -> torch.Tensor:
    return t.neg().exp()


class _Interval:
    """Steps of several orders from (x, t) to t_next; they share the evaluation at t and at inner points."""

    def __init__(self, denoise: Denoiser, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor):
        self.denoise, self.x, self.t, self.t_next = denoise, x, t, t_next
        self.h = t_next - t
        self.denoised = denoise(x, _sigma(t))
        self.eps = (x - self.denoised) / _sigma(t)
        self.inner: dict[float, torch.Tensor] = {}

    def _eps_at(self, r: float, x: torch.Tensor) -> torch.Tensor:
        if r not in self.inner:
            sigma = _sigma(self.t + r * self.h)
            self.inner[r] = (x - self.denoise(x, sigma)) / sigma
        return self.inner[r]

    def _euler(self, r: float) -> torch.Tensor:
        return self.x - _sigma(self.t + r * self.h) * (r * self.h).expm1() * self.eps

    def first(self) -> torch.Tensor:
        return self.x - _sigma(self.t_next) * self.h.expm1() * self.eps

    def second(self, r1: float = 1 / 2) -> torch.Tensor:
        change = self._eps_at(r1, self._euler(r1)) - self.eps
        return self.first() - _sigma(self.t_next) / (2 * r1) * self.h.expm1() * change

    def third(self, r1: float = 1 / 3, r2: float = 2 / 3) -> torch.Tensor:
        change_1 = self._eps_at(r1, self._euler(r1)) - self.eps
        h2 = r2 * self.h
        u2 = self._euler(r2) - _sigma(self.t + h2) * (r2 / r1) * (h2.expm1() / h2 - 1) * change_1
        change_2 = self._eps_at(r2, u2) - self.eps
        return self.first() - _sigma(self.t_next) / r2 * (self.h.expm1() / self.h - 1) * change_2


def _ancestral_t(t: torch.Tensor, t_next: torch.Tensor, t_end: torch.Tensor, eta: float) -> tuple[torch.Tensor, Any]:
    """Where to step deterministically so that noise of the second value brings x to t_next."""
    if not eta:
        return t_next, 0.0
    down, _ = get_ancestral_step(_sigma(t), _sigma(t_next), eta)
    t_down = torch.minimum(t_end, -down.log())
    return t_down, (_sigma(t_next) ** 2 - _sigma(t_down) ** 2) ** 0.5


def _limits(sigma_min: Any, sigma_max: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if sigma_min <= 0 or sigma_max <= 0:
        raise ValueError(f"DPM-Solver works in log sigma and needs sigmas above 0, not {float(sigma_max)} to {float(sigma_min)}")
    return -torch.as_tensor(sigma_max).log(), -torch.as_tensor(sigma_min).log()


@torch.no_grad()
def sample_dpm_fast(
    model: Any, x: torch.Tensor, sigma_min: Any, sigma_max: Any, n: int, extra_args: dict | None = None,
    callback: Callable | None = None, disable: bool | None = None, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """n evaluations: third-order steps evenly spaced in t, and lower orders at the end for the remainder."""
    t_start, t_end = _limits(sigma_min, sigma_max)
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    intervals = math.floor(n / 3) + 1
    orders = [3] * (intervals - 2) + [2, 1] if n % 3 == 0 else [3] * (intervals - 1) + [n % 3]
    times = torch.linspace(t_start, t_end, intervals + 1, device=x.device)
    for i, order in enumerate(orders):
        t_down, up = _ancestral_t(times[i], times[i + 1], t_end, eta)
        interval = _Interval(denoise, x, times[i], t_down)
        denoise.report(i, x, _sigma(times[i]), interval.denoised)
        x = (interval.first, interval.second, interval.third)[order - 1]()
        if eta:
            x = x + up * s_noise * noise(_sigma(times[i]), _sigma(times[i + 1]))
    return x


class _StepController:
    """PID control of the step in t (Söderlind 2003): a step is taken when the proposed change is not below `accept_safety`."""

    def __init__(self, h: float, pcoeff: float, icoeff: float, dcoeff: float, order: float, accept_safety: float):
        self.h = h
        self.powers = ((pcoeff + icoeff + dcoeff) / order, -(pcoeff + 2 * dcoeff) / order, dcoeff / order)
        self.accept_safety = accept_safety
        self.inverse_errors: list[float] = []

    def accepts(self, error: float) -> bool:
        inverse = 1 / (error + 1e-8)
        self.inverse_errors = [inverse, *self.inverse_errors[1:]] if self.inverse_errors else [inverse] * 3
        factor = math.prod(value**power for value, power in zip(self.inverse_errors, self.powers))
        factor = 1 + math.atan(factor - 1)
        accepted = factor >= self.accept_safety
        if accepted:
            self.inverse_errors = [inverse, inverse, self.inverse_errors[1]]
        self.h *= factor
        return accepted


@torch.no_grad()
def sample_dpm_adaptive(
    model: Any, x: torch.Tensor, sigma_min: Any, sigma_max: Any, extra_args: dict | None = None, callback: Callable | None = None,
    disable: bool | None = None, order: int = 3, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05, pcoeff: float = 0.0,
    icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, return_info: bool = False,
):  # fmt: skip
    """Steps of order 2 or 3 whose error, measured against the order below, stays within atol + rtol·|x|.

    Returns x, or (x, {"steps", "nfe", "n_accept", "n_reject"}) with `return_info`.
    """
    if order not in (2, 3):
        raise ValueError(f"order is 2 or 3, not {order}")
    t_start, t_end = _limits(sigma_min, sigma_max)
    denoise = Denoiser(model, x, extra_args, callback)
    noise = denoise.noise_sampler(x, noise_sampler)
    forward = bool(t_end > t_start)
    if not forward and eta:
        raise ValueError("eta must be 0 for reverse sampling")
    control = _StepController(abs(h_init) * (1 if forward else -1), pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    t, x_low_before = t_start, x
    while t < t_end - 1e-5 if forward else t > t_end + 1e-5:
        t_next = torch.minimum(t_end, t + control.h) if forward else torch.maximum(t_end, t + control.h)
        t_down, up = _ancestral_t(t, t_next, t_end, eta)
        interval = _Interval(denoise, x, t, t_down)
        x_low = interval.first() if order == 2 else interval.second(r1=1 / 3)
        x_high = interval.second() if order == 2 else interval.third()
        tolerance = torch.clamp(rtol * torch.maximum(x_low.abs(), x_low_before.abs()), min=atol)
        error = torch.linalg.norm((x_low - x_high) / tolerance) / x.numel() ** 0.5
        accepted = control.accepts(float(error))
        info["n_accept" if accepted else "n_reject"] += 1
        if accepted:
            x, x_low_before = x_high, x_low
            if eta:
                x = x + up * s_noise * noise(_sigma(t), _sigma(t_next))
            t = t_next
        info["nfe"] += order
        info["steps"] += 1
        denoise.report(info["steps"] - 1, x, _sigma(t), interval.denoised, error=error, h=control.h, **info)
    return (x, info) if return_info else x
