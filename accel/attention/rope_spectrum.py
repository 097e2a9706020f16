"""Frequencies of rotary positions beyond the length a model was trained at; one axis at a time, fp64.

An axis of D channels rotates pair k at position p by p·ω_k, ω_k = b^(−2k/D), k < D/2. L is the length trained at in tokens,
s = L'/L ≥ 1 the scale asked for, t = 1 − sigma the time of the flow (0 noise, 1 picture), r_k = L·ω_k/2π the turns of pair k inside the
training length, and d(n) = D·ln(L/2πn)/(2·ln b) the pair that makes n turns there.

    position_interpolation   ω/s                                                                       Chen et al., arXiv 2306.15595
    ntk                      (b·s)^(−2k/D)                                                             Lumina-Next, arXiv 2406.18583
    frequency_aware          max((b·s^(1/log_b(L/2π)))^(−2k/D), ω/s)                                   Lumina-Next
    time_aware               max((b·s^(2D/((2D−1)·t+1)))^(−2k/D), ω/s)                                 Lumina-Next
    time_switch              ω/s where t < watershed, else ntk                                         Lumina-Next, as its code samples
    vision_ntk               (b·s^(D/(D−2)))^(−2k/D): the first pair stays, the last becomes ω/s       FiTv2, arXiv 2410.13925
    vision_yarn              ω/s·g + ω·(1−g), g a ramp over k from ⌊d(32)⌋ to ⌈d(1)⌉                   FiTv2
    ntk_by_parts             ω above ⌊d(16)⌋…⌈d(2)⌉, vision_ntk between, ω/s below ⌊d(1.25)⌋…⌈d(0.75)⌉  FiTv2
    resonance_yarn           ω̂ with a whole number of turns first, then ntk_by_parts, or YaRN's blend  UltraFlux, arXiv 2511.18050

Lumina-Next writes its exponents over the whole head, of which an axis had half: its D is 2D here. `resonance_yarn` snaps pairs with
r ≥ 1 as UltraFlux's code does, or every pair to at least one turn as its paper writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...errors import input_error

__all__ = ["METHODS", "SHARED_SCALES", "SNAPS", "BLENDS", "RopeScaling", "amplitude", "plain_frequencies", "scaled_frequencies", "snapped"]

METHODS = (
    "position_interpolation", "ntk", "frequency_aware", "time_aware", "time_switch", "vision_ntk", "vision_yarn", "ntk_by_parts",
    "resonance_yarn",
)  # fmt: skip
SHARED_SCALES = ("per_axis", "longest_side", "area")
SNAPS = ("code", "paper", "off")
BLENDS = ("ntk_by_parts", "yarn")
TIMED = frozenset({"time_aware", "time_switch"})
WITH_AMPLITUDE = frozenset({"vision_yarn", "resonance_yarn"})
_YARN_TURNS = (32.0, 1.0)
_INTERPOLATED_TURNS, _KEPT_TURNS = (1.25, 0.75), (16.0, 2.0)


@dataclass(frozen=True)
class RopeScaling:
    """method: one of METHODS, or "none". trained: tokens (rows, columns) of the training size. share: whether each axis has its own
    scale, both that of the longest side, or both the root of the ratio of areas. scale: 0 takes it from the size asked for. watershed:
    time_switch only, in t. amplitude: whether the methods that have one multiply cos and sin by 0.1·ln s + 1. The rest: resonance_yarn."""

    method: str = "resonance_yarn"
    trained: tuple[int, int] = (64, 64)
    share: str = "per_axis"
    scale: float = 0.0
    watershed: float = 0.3
    amplitude: bool = True
    snap: str = "code"
    blend: str = "ntk_by_parts"
    alpha: float = 0.75
    beta: float = 1.25

    @property
    def timed(self) -> bool:
        return self.method in TIMED

    def check(self, where: str) -> None:
        """Raises: NodeInputError for a value outside its range, or alpha not below beta where both are used."""
        for name, got, known in (
            ("method", self.method, ("none", *METHODS)), ("scale_from", self.share, SHARED_SCALES), ("snap", self.snap, SNAPS),
            ("blend", self.blend, BLENDS),
        ):  # fmt: skip
            if got not in known:
                raise input_error(where, name, got, ", ".join(known), "Choose one of these.")
        for name, tokens in zip(("train_rows", "train_columns"), self.trained):
            if not 7 <= tokens <= 4096:
                raise input_error(where, name, tokens, "7 to 4096 tokens", "Enter the side of the training pictures, in tokens.")
        if self.scale != 0.0 and not 1.0 <= self.scale <= 64.0:
            raise input_error(where, "scale", self.scale, "0 (from the size) or 1 to 64", "Enter 0.")
        if not 0.0 <= self.watershed <= 1.0:
            raise input_error(where, "watershed", self.watershed, "0 to 1", "Enter 0.3.")
        if self.method == "resonance_yarn" and self.blend == "yarn" and not 0.0 <= self.alpha < self.beta:
            raise input_error(where, "alpha", (self.alpha, self.beta), "0 ≤ alpha < beta, in turns", "Enter 0.75 and 1.25.")

    def scales(self, tokens: tuple[int, int]) -> tuple[float, float]:
        """Scale of rows and of columns for a grid of `tokens`; 1 inside the training size."""
        if self.method == "none":
            return (1.0, 1.0)
        if self.scale:
            return (self.scale, self.scale)
        rows, columns = (asked / length for asked, length in zip(tokens, self.trained))
        if self.share == "longest_side":
            rows = columns = max(rows, columns)
        elif self.share == "area":
            rows = columns = math.sqrt(rows * columns)
        return (max(rows, 1.0), max(columns, 1.0))


def plain_frequencies(channels: int, theta: float) -> torch.Tensor:
    """ω_k = theta^(−2k/channels), (channels/2) fp64."""
    return theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def _pair_of(turns: float, channels: int, theta: float, length: float) -> float:
    return channels * math.log(length / (2.0 * math.pi * turns)) / (2.0 * math.log(theta))


def _ramp(channels: int, theta: float, length: float, turns: tuple[float, float], last: int) -> torch.Tensor:
    """0 up to the pair of turns[0], 1 from that of turns[1] on, a line between; (channels/2)."""
    low = min(max(math.floor(_pair_of(turns[0], channels, theta, length)), 0), last)
    high = min(max(math.ceil(_pair_of(turns[1], channels, theta, length)), 0), last)
    pairs = torch.arange(channels // 2, dtype=torch.float64)
    return ((pairs - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)


def snapped(omega: torch.Tensor, length: float, snap: str) -> torch.Tensor:
    """ω̂ = 2π·round(r)/L: every pair closes its phase over the training length (UltraFlux); `code` leaves pairs of less than one turn."""
    if snap == "off":
        return omega
    turns = length * omega / (2.0 * math.pi)
    closed = 2.0 * math.pi * torch.floor(turns + 0.5).clamp(min=1.0) / length
    return closed if snap == "paper" else torch.where(turns >= 1.0, closed, omega)


def _by_parts(omega: torch.Tensor, channels: int, theta: float, length: float, s: float) -> torch.Tensor:
    """NTK-by-parts of the frequencies `omega`, each read as theta^(−e)."""
    ntk = _ntk_base(channels, theta, s) ** (torch.log(omega) / math.log(theta))
    slow = _ramp(channels, theta, length, _INTERPOLATED_TURNS, channels // 2)
    kept = 1.0 - _ramp(channels, theta, length, _KEPT_TURNS, channels // 2)
    mixed = omega / s * slow + ntk * (1.0 - slow)
    return mixed * (1.0 - kept) + omega * kept


def _ntk_base(channels: int, theta: float, s: float) -> float:
    return theta * s ** (channels / (channels - 2)) if channels > 2 else theta


def _resonance(plan: RopeScaling, omega: torch.Tensor, channels: int, theta: float, length: float, s: float) -> torch.Tensor:
    closed = snapped(omega, length, plan.snap)
    if plan.blend == "ntk_by_parts":
        return _by_parts(closed, channels, theta, length, s)
    kept = ((length * closed / (2.0 * math.pi) - plan.alpha) / (plan.beta - plan.alpha)).clamp(0.0, 1.0)
    return (1.0 - kept) * closed / s + kept * closed


def scaled_frequencies(plan: RopeScaling, channels: int, theta: float, length: float, s: float, t: float = 1.0) -> torch.Tensor:
    """Frequencies (channels/2, fp64) of one axis at scale s and time t; those of the model, bit for bit, at s ≤ 1."""
    omega = plain_frequencies(channels, theta)
    if s <= 1.0 or plan.method == "none":
        return omega
    exponents = -torch.arange(0, channels, 2, dtype=torch.float64) / channels
    method = plan.method
    if method == "position_interpolation" or method == "time_switch" and t < plan.watershed:
        return omega / s
    if method in ("ntk", "time_switch"):
        return (theta * s) ** exponents
    if method == "frequency_aware":
        power = math.log(theta) / math.log(length / (2.0 * math.pi))
        return torch.maximum(_raised(theta, s, power, exponents), omega / s)
    if method == "time_aware":
        head = 2 * channels
        return torch.maximum(_raised(theta, s, head / ((head - 1) * t + 1.0), exponents), omega / s)
    if method == "vision_ntk":
        return _ntk_base(channels, theta, s) ** exponents
    if method == "vision_yarn":
        slow = _ramp(channels, theta, length, _YARN_TURNS, channels - 1)
        return omega / s * slow + omega * (1.0 - slow)
    if method == "ntk_by_parts":
        return _by_parts(omega, channels, theta, length, s)
    return _resonance(plan, omega, channels, theta, length, s)


def _raised(theta: float, s: float, power: float, exponents: torch.Tensor) -> torch.Tensor:
    """(theta·s^power)^exponents by logarithms: s^power overflows for wide heads, large scales and t = 0."""
    return torch.exp(exponents * (math.log(theta) + power * math.log(s)))


def amplitude(plan: RopeScaling, scales: tuple[float, float]) -> tuple[float, float]:
    """What cos and sin of each axis are multiplied by. FiTv2's YaRN takes it from the larger scale, UltraFlux from each axis' own.

    Queries and keys both carry it, so that the part of the logits from these channels grows by its square.
    """
    if not plan.amplitude or plan.method not in WITH_AMPLITUDE:
        return (1.0, 1.0)
    used = (max(scales), max(scales)) if plan.method == "vision_yarn" else scales
    return tuple(0.1 * math.log(s) + 1.0 if s > 1.0 else 1.0 for s in used)
