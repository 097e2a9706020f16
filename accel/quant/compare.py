"""How far a changed model's velocity is from the model's own, at each sigma, on states that the model's own run went through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .error import sqnr

__all__ = ["Visited", "recording_sampler", "replaying_sampler", "velocity_table"]


@dataclass(frozen=True)
class Visited:
    """A state x (b, …) of a run, its sigma, and the velocity there."""

    sigma: float
    x: torch.Tensor
    velocity: torch.Tensor


def recording_sampler(visited: list[Visited]) -> Callable[..., torch.Tensor]:
    """Euler, x ← x + (s' − s)·v, that notes every state above sigma 0."""

    @torch.no_grad()
    def sample_recorded(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args=None, callback=None, disable=None) -> torch.Tensor:
        ones = x.new_ones(len(x))
        for i, (s, s_next) in enumerate(zip(sigmas.tolist(), sigmas[1:].tolist())):
            denoised = model(x, ones * s, **(extra_args or {}))
            velocity = (x - denoised) / s
            visited.append(Visited(s, x.clone(), velocity.clone()))
            x = x + (s_next - s) * velocity
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        return x

    return sample_recorded


def replaying_sampler(visited: list[Visited], found: list[tuple[float, float]]) -> Callable[..., torch.Tensor]:
    """Asks the model at each recorded state; notes (sigma, velocity SQNR in dB). Returns the last recorded state."""

    @torch.no_grad()
    def sample_replayed(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args=None, callback=None, disable=None) -> torch.Tensor:
        ones = x.new_ones(len(x))
        for i, state in enumerate(visited):
            denoised = model(state.x, ones * state.sigma, **(extra_args or {}))
            found.append((state.sigma, sqnr(state.velocity, (state.x - denoised) / state.sigma)))
            if callback is not None:
                callback({"x": state.x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        return visited[-1].x.clone()

    return sample_replayed


def velocity_table(found: list[tuple[float, float]], distance: float) -> str:
    """`found` as a table with its mean and its lowest; distance: of the final latents, root mean square over the reference's."""
    decibels = [value for _, value in found]
    lines = [f"velocity SQNR: mean {sum(decibels) / len(decibels):.1f} dB, lowest {min(decibels):.1f} dB", ""]
    lines += [f"final latent: differs by {distance:.4f} of its size", "", "| sigma | dB |", "|---|---|"]
    return "\n".join(lines + [f"| {sigma:.3f} | {value:.1f} |" for sigma, value in found])
