"""Densities of the time t = sigma in (0, 1): what training draws from, and what quantile schedules are made of.

    logit_normal  t = sigmoid(mean + std·n), n normal        "Scaling Rectified Flow Transformers", arXiv 2403.03206; the EDM
                                                             density in flow time is this with mean P_mean and std P_std
    mode          t = 1 − u − scale·(cos²(πu/2) − 1 + u)     the same paper, heavy tails; monotone for −1 <= scale <= 2/(π − 2)
    cosmap        t = 1 − 1/(tan(πu/2) + 1)                  the same paper; log-SNR of the cosine schedule
    u_shaped      p(t) = a·cosh(a(t − ½))/(2·sinh(a/2))      "Improving the Training of Rectified Flows", arXiv 2405.20320
    uniform

Each density is then moved by the resolution shift alpha (see schedules.py). All maths is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import input_error

__all__ = ["DENSITIES", "MODE_SCALE_MAX", "TimestepDensity", "beta_quantile"]

DENSITIES = ("uniform", "logit_normal", "mode", "cosmap", "u_shaped")
MODE_SCALE_MAX = 2 / (math.pi - 2)  # beyond it the map u → t folds over


@dataclass(frozen=True)
class TimestepDensity:
    """A density on (0, 1) with its quantile, distribution and density functions, and draws.

    Args:
        kind: one of DENSITIES.
        mean, std: of logit(t), for logit_normal; mean < 0 favours data, > 0 noise.
        mode_scale: for mode, −1 to 1.752; > 0 favours the middle, < 0 the ends, 0 is uniform.
        a: for u_shaped, 0 to 20; 0 is uniform.
        shift: alpha > 0 of the resolution shift applied to t.
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    a: float = 4.0
    shift: float = 1.0

    def __post_init__(self):
        def refuse(name: str, allowed: str):
            return input_error("TimestepDensity", name, getattr(self, name), allowed, "Choose a value in that range.")

        if self.kind not in DENSITIES:
            raise refuse("kind", ", ".join(DENSITIES))
        if not math.isfinite(self.mean):
            raise refuse("mean", "a finite number")
        if not 0 < self.std < math.inf:
            raise refuse("std", "above 0 and finite")
        if not -1 <= self.mode_scale <= MODE_SCALE_MAX:
            raise refuse("mode_scale", f"-1 to {MODE_SCALE_MAX:.3f}, where the map stays monotone")
        if not 0 <= self.a <= 20:
            raise refuse("a", "0 to 20")
        if not 0 < self.shift < math.inf:
            raise refuse("shift", "above 0 and finite")

    def quantile(self, p: torch.Tensor) -> torch.Tensor:
        """t with P(T <= t) = p, for p in [0, 1] of any shape."""
        p = torch.as_tensor(p, dtype=torch.float64)
        t = _QUANTILES[self.kind](self, p)
        return self.shift * t / (self.shift * t + (1 - t))

    def cdf(self, t: torch.Tensor) -> torch.Tensor:
        """P(T <= t) for t in [0, 1] of any shape."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return _CDFS[self.kind](self, t / (t + self.shift * (1 - t)))

    def pdf(self, t: torch.Tensor) -> torch.Tensor:
        """The density at t in (0, 1) of any shape."""
        t = torch.as_tensor(t, dtype=torch.float64)
        divisor = t + self.shift * (1 - t)
        return _PDFS[self.kind](self, t / divisor) * self.shift / divisor**2

    def sample(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """`count` draws, float64 `(count,)` on the CPU, each inside (0, 1): one uniform number a draw, through the quantile."""
        u = torch.rand(count, dtype=torch.float64, generator=generator)
        return self.quantile(u.clamp(1e-15, 1 - 1e-15))


def _logit_normal_pdf(d: TimestepDensity, t: torch.Tensor) -> torch.Tensor:
    z = (torch.logit(t) - d.mean) / d.std
    return torch.exp(-z * z / 2) / (d.std * math.sqrt(2 * math.pi) * t * (1 - t))


def _mode_map(d: TimestepDensity, u: torch.Tensor) -> torch.Tensor:
    return 1 - u - d.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def _mode_inverse(d: TimestepDensity, t: torch.Tensor) -> torch.Tensor:
    """u with _mode_map(u) = t; the map falls, so halving an interval 60 times gives every bit of a double."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        above = _mode_map(d, middle) > t
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def _mode_pdf(d: TimestepDensity, t: torch.Tensor) -> torch.Tensor:
    u = _mode_inverse(d, t)
    return 1 / (1 + d.mode_scale * (1 - math.pi / 2 * torch.sin(math.pi * u)))


def _cosmap_quantile(d: TimestepDensity, p: torch.Tensor) -> torch.Tensor:
    sine, cosine = torch.sin(math.pi * p / 2), torch.cos(math.pi * p / 2)
    return sine / (sine + cosine)  # 1 − 1/(tan + 1) without the pole of tan at p = 1


def _u_shaped_quantile(d: TimestepDensity, p: torch.Tensor) -> torch.Tensor:
    return p if d.a == 0 else 0.5 + torch.asinh((2 * p - 1) * math.sinh(d.a / 2)) / d.a


def _u_shaped_cdf(d: TimestepDensity, t: torch.Tensor) -> torch.Tensor:
    return t if d.a == 0 else 0.5 + torch.sinh(d.a * (t - 0.5)) / (2 * math.sinh(d.a / 2))


def _u_shaped_pdf(d: TimestepDensity, t: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(t) if d.a == 0 else d.a * torch.cosh(d.a * (t - 0.5)) / (2 * math.sinh(d.a / 2))


_QUANTILES = {
    "uniform": lambda d, p: p,
    "logit_normal": lambda d, p: torch.sigmoid(d.mean + d.std * torch.special.ndtri(p)),
    "mode": lambda d, p: _mode_map(d, 1 - p),
    "cosmap": _cosmap_quantile,
    "u_shaped": _u_shaped_quantile,
}
_CDFS = {
    "uniform": lambda d, t: t,
    "logit_normal": lambda d, t: torch.special.ndtr((torch.logit(t) - d.mean) / d.std),
    "mode": lambda d, t: 1 - _mode_inverse(d, t),
    "cosmap": lambda d, t: 2 / math.pi * torch.atan2(t, 1 - t),
    "u_shaped": _u_shaped_cdf,
}
_PDFS = {
    "uniform": lambda d, t: torch.ones_like(t),
    "logit_normal": _logit_normal_pdf,
    "mode": _mode_pdf,
    "cosmap": lambda d, t: 2 / (math.pi * (1 - 2 * t + 2 * t * t)),
    "u_shaped": _u_shaped_pdf,
}


def _beta_fraction(x: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), evaluated from its 200th term inward.

    It converges fast for x < (a + 1)/(a + b + 2), where its callers stay.
    """
    fraction = torch.ones_like(x)
    for n in range(200, 0, -1):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + term * x / fraction
    return 1 / fraction


def _beta_cdf(x: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """Regularised incomplete beta function I_x(a, b) for x in (0, 1)."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = torch.exp(a * torch.log(x) + b * torch.log1p(-x) - log_beta)
    left = x < (a + 1) / (a + b + 2)
    below = front * _beta_fraction(torch.where(left, x, 0.0), a, b) / a
    above = front * _beta_fraction(torch.where(left, 0.0, 1 - x), b, a) / b
    return torch.where(left, below, 1 - above)


def beta_quantile(p: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """x with I_x(a, b) = p, by halving; `p` float64 of any shape, a and b above 0. Absolute error below 1e-12."""
    if not (a > 0 and b > 0):
        raise input_error("beta_quantile", "a, b", (a, b), "both above 0", "0.6 and 0.6 are the usual values.")
    p = torch.as_tensor(p, dtype=torch.float64)
    low, high = torch.zeros_like(p), torch.ones_like(p)
    for _ in range(55):
        middle = (low + high) / 2
        below = _beta_cdf(middle, a, b) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    x = (low + high) / 2
    return torch.where(p <= 0, 0.0, torch.where(p >= 1, 1.0, x))
