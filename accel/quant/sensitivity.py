"""Which layers' rounded activations a velocity suffers from most, each measured alone; those go without rounding until it is near enough.

    v_l      velocity where layer l alone rounds its activations, v_16 where none does
    share_l  Σ ‖v_l − v_16‖² / Σ ‖v‖² over a few states of the model's own run

The errors of two layers are nearly independent, so that shares add up: layers with the largest ones are kept at 16 bits of activations, as
many as the sum asks for, and then one more at a time until the measured mean is there. Codes stay as they are: what is kept costs no bytes,
only the speed of the integer product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import input_error
from .compare import Visited
from .error import sqnr
from .linear import FULL, QuantLinear

__all__ = ["STATES", "Sensitivity", "calls_needed", "sensitivity_sampler", "sensitivity_table"]

STATES = 3  # of the run that tell a share, evenly apart: shares differ by more between layers than between states


@dataclass(frozen=True)
class Sensitivity:
    """Mean velocity SQNR in dB as given, with the kept layers, and with all of them; layer → share, largest first; how many are kept."""

    given: float
    reached: float
    bound: float
    shares: Mapping[str, float]
    count: int

    @property
    def kept(self) -> tuple[str, ...]:
        return tuple(self.shares)[: self.count]


@contextmanager
def _rounding(parts: Mapping[str, QuantLinear], rounded: Collection[str]) -> Iterator[None]:
    """Only the named ones of `parts` round their activations; what they were is put back whatever happens."""
    bits = {name: part.act_bits for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.act_bits = bits[name] if name in rounded else FULL
        yield
    finally:
        for name, part in parts.items():
            part.act_bits = bits[name]


def calls_needed(states: int, layers: int) -> int:
    """Model calls up to the ranking: twice all states, then a few for each layer."""
    return 2 * states + (layers + 1) * min(STATES, states)


def sensitivity_sampler(
    visited: list[Visited], parts: Mapping[str, QuantLinear], target: float, found: list[Sensitivity], where: str,
    step: Callable[[], None] = lambda: None,
) -> Callable[..., torch.Tensor]:  # fmt: skip
    """A sampler that measures `parts` of the model it is given at the visited states, and notes one Sensitivity. Returns the last state.

    target: dB of the mean over the visited states. step: called after each model call.

    Raises: NodeInputError for a target above what the model has with 16-bit activations in all of `parts`.
    """

    @torch.no_grad()
    def sample_measured(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args=None, callback=None, disable=None) -> torch.Tensor:
        ones = x.new_ones(len(x))

        def velocity(state: Visited) -> torch.Tensor:
            denoised = model(state.x, ones * state.sigma, **(extra_args or {}))
            step()
            return (state.x - denoised) / state.sigma

        def mean_db(rounded: Collection[str]) -> float:
            with _rounding(parts, rounded):
                return sum(sqnr(state.velocity, velocity(state)) for state in visited) / len(visited)

        def at(rounded: Collection[str]) -> list[torch.Tensor]:
            with _rounding(parts, rounded):
                return [velocity(state) for state in some]

        given, bound = mean_db(parts), mean_db(())
        if given >= target:
            found.append(Sensitivity(given, given, bound, {}, 0))
            return visited[-1].x.clone()
        if bound < target:
            remedy = "Lower it, or quantise with more weight_bits or a higher keep_below_db: it is the weights that err."
            allowed = f"up to {bound:.1f} dB, what 16-bit activations in every layer leave"
            raise input_error(where, "target_db", target, allowed, remedy)
        some = visited[:: math.ceil(len(visited) / STATES)]
        exact, signal = at(()), sum(float(state.velocity.double().square().sum()) for state in some)
        shares = {name: sum(float((a.double() - b.double()).square().sum()) for a, b in zip(at((name,)), exact)) / signal for name in parts}
        shares = dict(sorted(shares.items(), key=lambda item: -item[1]))
        names, count = list(shares), _expected(list(shares.values()), 10 ** (-target / 10) - 10 ** (-bound / 10))
        reached = mean_db(names[count:])
        while reached < target:
            count += 1
            reached = mean_db(names[count:])
        found.append(Sensitivity(given, reached, bound, shares, count))
        return visited[-1].x.clone()

    return sample_measured


def _expected(shares: list[float], allowed: float) -> int:
    """How many of the largest shares must go for the rest to add up to `allowed`; at least one."""
    left, count = sum(shares), 0
    while count < len(shares) and (left > allowed or not count):
        left -= shares[count]
        count += 1
    return count


def sensitivity_table(found: Sensitivity, parts: Mapping[str, QuantLinear]) -> str:
    """`found` as text: the decibels, then each layer's share and what was done with it."""
    lines = [f"velocity SQNR: {found.given:.1f} dB as given, {found.reached:.1f} dB now, {found.bound:.1f} dB with every layer kept"]
    if not found.shares:
        return lines[0]
    weights = [sum(parts[name].weight.numel() for name in names) for names in (found.kept, parts)]
    lines += [f"{found.count} of {len(parts)} layers kept at {FULL}-bit activations, {weights[0] / weights[1]:.0%} of the codes", ""]
    lines += ["| layer | share of the error (dB) | activations |", "|---|---|---|"]
    for name, share in found.shares.items():
        bits = FULL if name in found.kept else parts[name].act_bits
        lines.append(f"| {name} | {10 * math.log10(max(share, 1e-30)):.1f} | {bits} bits |")
    return "\n".join(lines)
