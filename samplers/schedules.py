"""Schedules: which sigmas a solver visits. Pure functions; float64 inside, float32 `(steps + 1,)` on the CPU outside.

A schedule is a grid u_0 > u_1 > … > u_N = 0 on [0, 1] and a shift that moves it. Grids end in "_grid", are float64 and begin at
exactly 1 and end at exactly 0. The shift with factor alpha,

    s = alpha·u/(1 + (alpha − 1)·u),       half log-SNR lambda(s) = lambda(u) − log(alpha),

is one map under three names: SD3's resolution shift, alpha = sqrt(pixels/base_pixels) ("Scaling Rectified Flow Transformers",
arXiv 2403.03206); Flux's exp(mu)/(exp(mu) + 1/u − 1), alpha = exp(mu); Lumina-Next's rational schedule, t/(t + a − a·t) in
t = 1 − s (arXiv 2406.18583).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType

import torch

from ..errors import input_error
from .densities import TimestepDensity, beta_quantile

__all__ = [
    "GRIDS", "formula_sigmas", "shift_sigma", "unshift_sigma", "reshift_sigmas", "flux_mu", "flux_sigma", "resolution_alpha",
    "as_sigmas", "strict_sigmas", "part_of_grid", "uniform_grid", "uniform_sigmas", "logit_normal_grid", "mode_grid",
    "cosmap_grid", "u_shaped_grid", "beta_grid", "linear_quadratic_grid", "rational_grid", "sigmoid_grid",
]


def shift_sigma(u, alpha: float):
    """alpha·u/(1 + (alpha − 1)·u): more noise for alpha > 1, identity at 1. Floats and tensors alike.

    Written as alpha·u/(alpha·u + (1 − u)), which keeps 0 and 1 exactly where they are.
    """
    return u if alpha == 1 else alpha * u / (alpha * u + (1 - u))


def unshift_sigma(sigma, alpha: float):
    """The inverse, sigma/(alpha − (alpha − 1)·sigma): the shift by 1/alpha, with 0 and 1 exact again."""
    return sigma if alpha == 1 else sigma / (sigma + alpha * (1 - sigma))


def reshift_sigmas(sigmas: torch.Tensor, from_alpha: float, to_alpha: float) -> torch.Tensor:
    """Take one shift out of a finished schedule and put another in; exact, since shifts compose by multiplication."""
    return as_sigmas(shift_sigma(sigmas.double().cpu(), to_alpha / from_alpha))


def flux_mu(tokens: float, base_mu: float = 0.5, max_mu: float = 1.15, base_tokens: int = 256, max_tokens: int = 4096) -> float:
    """Flux's mu for a picture of `tokens` packed tokens (16×16 pixels each at factor 8, patch 2): a straight line, not clipped."""
    return base_mu + (tokens - base_tokens) * (max_mu - base_mu) / (max_tokens - base_tokens)


def flux_sigma(mu: float, t: float) -> float:
    """exp(mu)/(exp(mu) + 1/t − 1) with sigma(0) = 0, as the Flux reference writes the shift by alpha = exp(mu)."""
    return 0.0 if t == 0 else math.exp(mu) / (math.exp(mu) + 1 / t - 1)


def resolution_alpha(pixels: float, base_pixels: float) -> float:
    """SD3's alpha = sqrt(m/n): a picture of m pixels needs more noise than one of n to be as uncertain."""
    return math.sqrt(pixels / base_pixels)


def as_sigmas(grid: torch.Tensor) -> torch.Tensor:
    """What a SIGMAS socket carries: float32 on the CPU."""
    return grid.to(torch.float32).cpu()


def strict_sigmas(grid: torch.Tensor, where: str) -> torch.Tensor:
    """`as_sigmas`, refusing a grid whose neighbours coincide in float32: such a step would cost a model call and move nothing.

    Raises:
        NodeInputError: naming the node `where` and the first step that does not fall.
    """
    sigmas = as_sigmas(grid)
    flat = (sigmas[1:] >= sigmas[:-1]).nonzero().flatten()
    if len(flat):
        first = int(flat[0])
        got = f"a schedule that stays at {float(sigmas[first]):g} in step {first + 1} of {len(sigmas) - 1}"
        raise input_error(where, "steps", got, "sigmas that fall in every step", "Use fewer steps, or a milder shift or density.")
    return sigmas


def part_of_grid(make_grid: Callable[[int], torch.Tensor], steps: int, denoise: float = 1.0) -> torch.Tensor:
    """The last `steps` steps of a grid of int(steps/denoise), as ComfyUI's denoise has it; denoise 0 is the empty grid."""
    if denoise <= 0:
        return torch.zeros(0, dtype=torch.float64)
    total = steps if denoise >= 1 else int(steps / denoise)
    return make_grid(total)[-(steps + 1):]


def _fractions(steps: int) -> torch.Tensor:
    """(N, N − 1, …, 0)/N: each value is the double nearest to its fraction."""
    if steps < 1:
        raise input_error("schedule", "steps", steps, "1 or more", "Raise the number of steps.")
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps


def uniform_grid(steps: int) -> torch.Tensor:
    """u_i = 1 − i/N, exact fractions."""
    return _fractions(steps)


def uniform_sigmas(steps: int, start: float = 1.0, end: float = 0.0) -> torch.Tensor:
    """start + (end − start)·i/N: the exact grid that InstaFlow-type weights expect (arXiv 2309.06380); rises when end > start."""
    u = _fractions(steps)
    return as_sigmas(start * u + end * (1 - u))


def _quantile_grid(density: TimestepDensity, steps: int) -> torch.Tensor:
    grid = density.quantile(_fractions(steps))
    grid[0], grid[-1] = 1.0, 0.0
    return grid


def logit_normal_grid(steps: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """Quantiles of the logit-normal density: equal shares of its training mass between neighbours."""
    return _quantile_grid(TimestepDensity("logit_normal", mean=mean, std=std), steps)


def mode_grid(steps: int, mode_scale: float = 1.29) -> torch.Tensor:
    """Quantiles of SD3's mode density with heavy tails; mode_scale from −1 to 1.752."""
    return _quantile_grid(TimestepDensity("mode", mode_scale=mode_scale), steps)


def cosmap_grid(steps: int) -> torch.Tensor:
    """Quantiles of CosMap, the log-SNR of the cosine schedule."""
    return _quantile_grid(TimestepDensity("cosmap"), steps)


def u_shaped_grid(steps: int, a: float = 4.0) -> torch.Tensor:
    """Quantiles of rf++'s density: small steps at both ends."""
    return _quantile_grid(TimestepDensity("u_shaped", a=a), steps)


def beta_grid(steps: int, a: float = 0.6, b: float = 0.6) -> torch.Tensor:
    """Quantiles of the Beta(a, b) distribution (arXiv 2407.12173), not rounded to a table as ComfyUI's `beta` is."""
    return beta_quantile(_fractions(steps), a, b)


def linear_quadratic_grid(steps: int, threshold: float = 0.025, linear_steps: int | None = None) -> torch.Tensor:
    """Mochi's grid: 1 − u rises linearly to `threshold` in the first steps (half of them), then quadratically to 1, without a kink.

    With L linear and Q = N − L other steps the second part is threshold + slope·j + c·j², slope = threshold/L, and c such that
    j = Q reaches 1.
    """
    if steps == 1:
        return _fractions(steps)
    linear = steps // 2 if linear_steps is None else linear_steps
    if not 0 < linear < steps:
        raise input_error("linear_quadratic", "linear_steps", linear, f"1 to {steps - 1}", "Leave it out for half of the steps.")
    quadratic = steps - linear
    slope = threshold / linear
    c = (1 - threshold - slope * quadratic) / quadratic**2
    i = torch.arange(steps + 1, dtype=torch.float64)
    j = i - linear
    grid = 1 - torch.where(j < 0, slope * i, threshold + slope * j + c * j * j)
    grid[0], grid[-1] = 1.0, 0.0
    return grid


def rational_grid(steps: int, shift: float = 4.0) -> torch.Tensor:
    """Lumina-Next's t = u/(u + a − a·u), which is the shift by a: steps gather near noise for a > 1."""
    return shift_sigma(_fractions(steps), shift)


def sigmoid_grid(steps: int, mu: float = 0.6, alpha: float = 6.0, beta: float = 20.0) -> torch.Tensor:
    """Lumina-Next's piecewise sigmoid in t = 1 − s, reconstructed (the paper's exact formula is not published): experimental.

    S(w) = sigmoid(alpha·(w − mu)) below mu and sigmoid(beta·(w − mu)) above, t(w) = (S(w) − S(0))/(S(1) − S(0)).
    """
    w = 1 - _fractions(steps)
    rest = torch.sigmoid(torch.where(w < mu, alpha, beta) * (mu - w))  # 1 − S, which keeps its digits where S nears 1
    grid = (rest - rest[-1]) / (rest[0] - rest[-1])
    grid[0], grid[-1] = 1.0, 0.0
    return grid


GRIDS: MappingProxyType[str, Callable[..., torch.Tensor]] = MappingProxyType({
    "uniform": uniform_grid,
    "rational": rational_grid,
    "sigmoid": sigmoid_grid,
    "logit_normal": logit_normal_grid,
    "mode": mode_grid,
    "cosmap": cosmap_grid,
    "u_shaped": u_shaped_grid,
    "beta": beta_grid,
    "linear_quadratic": linear_quadratic_grid,
})


def formula_sigmas(kind: str, steps: int, shift: float, denoise: float, where: str = "FlowSchedule", **parameters) -> torch.Tensor:
    """The schedule of the FlowSchedule node: a grid of GRIDS with its `parameters`, then the shift (uniform stays exact fractions).

    Returns:
        float32 `(steps + 1,)`, falling in every step, 1 first for denoise 1 and 0 last; empty for denoise 0.
    """
    if kind not in GRIDS:
        raise input_error(where, "kind", kind, ", ".join(GRIDS), "Pick one of them.")
    if kind == "rational":
        return strict_sigmas(part_of_grid(lambda total: rational_grid(total, shift), steps, denoise), where)
    grid = part_of_grid(lambda total: GRIDS[kind](total, **parameters), steps, denoise)
    return strict_sigmas(grid if kind == "uniform" else shift_sigma(grid, shift), where)
