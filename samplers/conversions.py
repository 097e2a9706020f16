"""One flow, four predictions, three paths: every conversion between them, and back.

"The Principles of Diffusion Models", arXiv 2510.21890. On the flow path x = (1 − s)·x0 + s·noise:

    velocity v = noise − x0,   x0 = x − s·v,   noise = x + (1 − s)·v,   score = −noise/s

All four are affine in one another at fixed (x, s), so classifier-free guidance, y_u + g·(y_c − y_u), is the same operation on
each. Two points lose information: at s = 0 the estimate x0 = x says nothing about the velocity, at s = 1 the noise = x does
not; conversions that would divide by that zero raise instead.

Every function takes x of shape `(b, …)` and sigma as a float, a scalar tensor or one value a row `(b,)`.
"""

from __future__ import annotations

import math

import torch

from ..errors import input_error

__all__ = [
    "PREDICTIONS", "convert", "to_velocity", "to_x0", "to_noise", "to_score",
    "flow_to_ve", "ve_to_flow", "flow_to_vp", "vp_to_flow", "log_snr", "sigma_from_log_snr",
]

PREDICTIONS = ("velocity", "x0", "noise", "score")


def _rows(sigma, x: torch.Tensor) -> torch.Tensor:
    """sigma as a tensor that broadcasts over x: `()` or `(b, 1, …)`."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def _nonzero(value: torch.Tensor, where: str, why: str) -> torch.Tensor:
    if bool((value == 0).any()):
        raise input_error(where, "sigma", why, "the open side of that point", "Use a sigma a little inside, or convert from the velocity.")
    return value


def to_velocity(x: torch.Tensor, value: torch.Tensor, sigma, source: str) -> torch.Tensor:
    """v from a prediction of kind `source` at state x.

    Raises:
        NodeInputError: `source` is unknown, or is x0 at sigma 0, or noise or score at sigma 1.
    """
    s = _rows(sigma, x)
    if source == "velocity":
        return value
    if source == "x0":
        return (x - value) / _nonzero(s, "to_velocity", "0 with an x0 prediction")
    if source == "noise":
        return (value - x) / _nonzero(1 - s, "to_velocity", "1 with a noise prediction")
    if source == "score":
        return (-s * value - x) / _nonzero(1 - s, "to_velocity", "1 with a score")
    raise input_error("to_velocity", "source", source, ", ".join(PREDICTIONS), "Pick one of them.")


def to_x0(x: torch.Tensor, value: torch.Tensor, sigma, source: str) -> torch.Tensor:
    """x0 = x − s·v: the clean estimate (ComfyUI's `denoised`)."""
    return value if source == "x0" else x - _rows(sigma, x) * to_velocity(x, value, sigma, source)


def to_noise(x: torch.Tensor, value: torch.Tensor, sigma, source: str) -> torch.Tensor:
    """noise = x + (1 − s)·v: the noise estimate (epsilon of the diffusion papers)."""
    if source == "noise":
        return value
    if source == "score":  # directly, so that sigma 1 stays an ordinary point
        return -_rows(sigma, x) * value
    return x + (1 - _rows(sigma, x)) * to_velocity(x, value, sigma, source)


def to_score(x: torch.Tensor, value: torch.Tensor, sigma, source: str) -> torch.Tensor:
    """score = −noise/s, the gradient of log p_s at x; sigma 0 has none."""
    if source == "score":
        return value
    return -to_noise(x, value, sigma, source) / _nonzero(_rows(sigma, x), "to_score", "0, where the score is infinite")


def convert(x: torch.Tensor, value: torch.Tensor, sigma, source: str, target: str) -> torch.Tensor:
    """A prediction of kind `source` as one of kind `target`; both from PREDICTIONS.

    >>> convert(torch.ones(1, 1), torch.zeros(1, 1), 0.5, "x0", "velocity")
    tensor([[2.]])
    """
    functions = {"velocity": to_velocity, "x0": to_x0, "noise": to_noise, "score": to_score}
    if target not in functions:
        raise input_error("convert", "target", target, ", ".join(PREDICTIONS), "Pick one of them.")
    return functions[target](x, value, sigma, source)


def flow_to_ve(x: torch.Tensor, sigma) -> tuple[torch.Tensor, torch.Tensor]:
    """The same point on the variance-exploding path x0 + sigma_ve·noise: (x/(1 − s), s/(1 − s)); sigma 1 lies at infinity."""
    s = _rows(sigma, x)
    data = _nonzero(1 - s, "flow_to_ve", "1, which lies at infinity on that path")
    return x / data, (s / data).reshape(-1) if s.ndim else s / data


def ve_to_flow(x_ve: torch.Tensor, sigma_ve) -> tuple[torch.Tensor, torch.Tensor]:
    """Back from x0 + sigma_ve·noise: s = sigma_ve/(1 + sigma_ve), x = x_ve·(1 − s)."""
    ve = _rows(sigma_ve, x_ve)
    s = ve / (1 + ve)
    return x_ve / (1 + ve), s.reshape(-1) if s.ndim else s


def flow_to_vp(x: torch.Tensor, sigma) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same point on the variance-preserving path a·x0 + b·noise, a² + b² = 1: (x/n, a, b) with n = |(1 − s, s)|."""
    s = _rows(sigma, x)
    norm = torch.sqrt((1 - s) ** 2 + s**2)
    a, b = (1 - s) / norm, s / norm
    return x / norm, a.reshape(-1) if s.ndim else a, b.reshape(-1) if s.ndim else b


def vp_to_flow(x_vp: torch.Tensor, a, b) -> tuple[torch.Tensor, torch.Tensor]:
    """Back from a·x0 + b·noise (any positive scale, not only a² + b² = 1): s = b/(a + b), x = x_vp/(a + b)."""
    total = _rows(a, x_vp) + _rows(b, x_vp)
    s = _rows(b, x_vp) / total
    return x_vp / total, s.reshape(-1) if s.ndim else s


def log_snr(sigma: torch.Tensor | float) -> torch.Tensor | float:
    """Half log-SNR of DPM-Solver, lambda = log((1 − s)/s): +inf at sigma 0, −inf at sigma 1. SD3's log-SNR is twice this."""
    if isinstance(sigma, torch.Tensor):
        return torch.log1p(-sigma) - torch.log(sigma)
    if sigma in (0, 1):
        return math.inf if sigma == 0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)


def sigma_from_log_snr(value: torch.Tensor | float) -> torch.Tensor | float:
    """s = 1/(1 + e^lambda), without overflow at either end."""
    if isinstance(value, torch.Tensor):
        return torch.sigmoid(-value)
    return 1 / (1 + math.exp(value)) if value < 0 else math.exp(-value) / (1 + math.exp(-value))
