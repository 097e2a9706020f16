"""The named schedules: n steps as n + 1 descending sigmas, float32 on the CPU, the last one 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from ...errors import input_error
from .sampler_names import SCHEDULER_NAMES

__all__ = [
    "calculate_sigmas", "simple_scheduler", "ddim_scheduler", "normal_scheduler", "beta_scheduler", "linear_quadratic_schedule",
    "kl_optimal_scheduler", "get_sigmas_karras", "get_sigmas_exponential", "SchedulerHandler", "SCHEDULER_HANDLERS", "beta_quantile",
]  # fmt: skip


def simple_scheduler(model_sampling: Any, steps: int) -> torch.Tensor:
    """Every (table length / steps)-th entry of the sigma table, from its end."""
    stride = len(model_sampling.sigmas) / steps
    return torch.FloatTensor([float(model_sampling.sigmas[-(1 + int(i * stride))]) for i in range(steps)] + [0.0])


def ddim_scheduler(model_sampling: Any, steps: int) -> torch.Tensor:
    """Table entries 1, 1 + s, 1 + 2s, …, as DDIM's uniform spacing; their number may exceed `steps` by rounding."""
    table = model_sampling.sigmas
    ascending = [0.0]
    if math.isclose(float(table[1]), 0, abs_tol=0.00001):
        steps += 1
        ascending = []
    stride = max(len(table) // steps, 1)
    ascending += [float(table[i]) for i in range(1, len(table), stride)]
    return torch.FloatTensor(ascending[::-1])


def normal_scheduler(model_sampling: Any, steps: int, sgm: bool = False) -> torch.Tensor:
    """Times spaced evenly from the first to the last of the table; `sgm` leaves the last one out, so that 0 follows a full step."""
    start, end = model_sampling.timestep(model_sampling.sigma_max), model_sampling.timestep(model_sampling.sigma_min)
    closing = [0.0]
    if sgm:
        times = torch.linspace(start, end, steps + 1)[:-1]
    else:
        if math.isclose(float(model_sampling.sigma(end)), 0, abs_tol=0.00001):
            steps += 1
            closing = []
        times = torch.linspace(start, end, steps)
    return torch.FloatTensor([float(model_sampling.sigma(time)) for time in times] + closing)


def _beta_continued_fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d = 1.0 / (1.0 + coefficient * d or tiny)
            c = 1.0 + coefficient / c or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-16:
            break
    return value


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1.0 - beta_cdf(1.0 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    return front * _beta_continued_fraction(x, a, b) / a


def beta_quantile(p: float, a: float, b: float) -> float:
    """x with I_x(a, b) = p, by bisection to the last bit."""
    if p <= 0.0 or p >= 1.0:
        return float(p >= 1.0)
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if beta_cdf(middle, a, b) < p:
            low = middle
        else:
            high = middle


def beta_scheduler(model_sampling: Any, steps: int, alpha: float = 0.6, beta: float = 0.6) -> torch.Tensor:
    """Table entries at quantiles of a Beta distribution (Lee et al. 2024, arXiv:2407.12173); repeated entries are dropped."""
    last = len(model_sampling.sigmas) - 1
    chosen = []
    for i in range(steps):
        place = round(beta_quantile(1 - i / steps, alpha, beta) * last)
        if not chosen or place != chosen[-1]:
            chosen.append(place)
    return torch.FloatTensor([float(model_sampling.sigmas[place]) for place in chosen] + [0.0])


def linear_quadratic_schedule(
    model_sampling: Any, steps: int, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> torch.Tensor:
    """Mochi's schedule: 1 − sigma rises linearly to `threshold_noise` in the first half of the steps, then quadratically to 1 with
    the same slope at the seam."""
    if steps == 1:
        progress = [0.0, 1.0]
    else:
        linear = steps // 2 if linear_steps is None else linear_steps
        quadratic = steps - linear
        slope = threshold_noise / linear
        rest = linear - threshold_noise * steps
        square = rest / (linear * quadratic**2)
        tilt = slope - 2 * rest / quadratic**2
        progress = [i * threshold_noise / linear for i in range(linear)]
        progress += [square * i**2 + tilt * i + square * linear**2 for i in range(linear, steps)] + [1.0]
    return torch.FloatTensor([1.0 - x for x in progress]) * model_sampling.sigma_max.cpu()


def kl_optimal_scheduler(n: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """tan of evenly spaced arctan(sigma): the KL-optimal schedule of Align Your Steps (Sabour et al. 2024)."""
    ramp = torch.arange(n, dtype=torch.float32) / max(n - 1, 1)  # a single step starts at sigma_max
    sigmas = torch.zeros(n + 1)
    sigmas[:-1] = torch.tan(ramp * math.atan(sigma_min) + (1 - ramp) * math.atan(sigma_max))
    return sigmas


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Any = "cpu") -> torch.Tensor:
    """Evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, n, device=device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, ramp.new_zeros(1)])


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: Any = "cpu") -> torch.Tensor:
    """Evenly spaced in log sigma."""
    sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


class SchedulerHandler(NamedTuple):
    """`handler(model_sampling, steps)`, or with use_ms False `handler(n=, sigma_min=, sigma_max=)`."""

    handler: Callable[..., torch.Tensor]
    use_ms: bool = True


SCHEDULER_HANDLERS = {
    "simple": SchedulerHandler(simple_scheduler),
    "sgm_uniform": SchedulerHandler(partial(normal_scheduler, sgm=True)),
    "karras": SchedulerHandler(get_sigmas_karras, use_ms=False),
    "exponential": SchedulerHandler(get_sigmas_exponential, use_ms=False),
    "ddim_uniform": SchedulerHandler(ddim_scheduler),
    "beta": SchedulerHandler(beta_scheduler),
    "normal": SchedulerHandler(normal_scheduler),
    "linear_quadratic": SchedulerHandler(linear_quadratic_schedule),
    "kl_optimal": SchedulerHandler(kl_optimal_scheduler, use_ms=False),
}


def calculate_sigmas(model_sampling: Any, scheduler_name: str, steps: int) -> torch.Tensor:
    """The schedule `scheduler_name` of `steps` steps for a model_sampling object."""
    entry = SCHEDULER_HANDLERS.get(scheduler_name)
    if entry is None:
        raise input_error("scheduler", "scheduler", scheduler_name, ", ".join(SCHEDULER_NAMES), "Choose one of these schedules.")
    if entry.use_ms:
        return entry.handler(model_sampling, steps)
    return entry.handler(n=steps, sigma_min=float(model_sampling.sigma_min), sigma_max=float(model_sampling.sigma_max))
