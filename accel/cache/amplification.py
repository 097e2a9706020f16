"""How far an error of the velocity at one step moves the final latent, measured on the model itself.

A forecast that is off by δv at step l moves the next state by h·δv, h = σ_{l+1} − σ_l, and the final latent by A_l·h·δv. A_l is large
where a flow still decides what the picture will be, and small where it draws detail: a search that knows it spends its computed steps
there. It is read off runs that go on from a state moved by a small part of what repetition would have been off by:

    A_l = ‖x_T(x_{l+1} + δ) − x_T(x_{l+1})‖ / ‖δ‖,   δ = ε·h·(v_{l−1} − v_l)

mean over the batch. Of a flow's state x at σ the continued run is the host's own sampling with noise x/σ over an empty latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sampling", "Watched", "amplification", "interpolated", "probe_steps"]

_ARGUMENTS = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback", "disable_pbar", "seed")
SMALL = 0.05  # of the error of repetition: small enough to be linear, large beside float32's rounding over a run


@dataclass(frozen=True)
class Sampling:
    """One sampling as the host asked for it: `go_on(*args, **kwargs)` makes it, and takes what OUTER_SAMPLE wrappers take."""

    go_on: Callable[..., Tensor]
    args: tuple
    kwargs: Mapping[str, Any]
    plain: Callable[[Callable[[], Tensor]], Tensor]

    def get(self, name: str) -> Any:
        place = _ARGUMENTS.index(name)
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)

    def run(self, **changes: Any) -> Tensor:
        """The sampling with some arguments changed, by name."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in changes.items():
            place = _ARGUMENTS.index(name)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return self.go_on(*args, **kwargs)

    def continued(self, x: Tensor, sigmas: Tensor) -> Tensor:
        """The final latent from the state x at sigmas[0] on, without the cache's own run."""
        start = {"noise": x / sigmas[0].to(x), "latent_image": torch.zeros_like(x), "sigmas": sigmas}
        return self.plain(lambda: self.run(**start, callback=None))


class Watched:
    """Guided velocities of a run, as its sampler reports them before each step, and the states behind at most `probes` steps."""

    def __init__(self, sampling: Sampling, probes: int):
        self.sampling = sampling
        self.sigmas = sampling.get("sigmas")
        self.probed = probe_steps(len(self.sigmas) - 1, probes)
        self.states: dict[int, Tensor] = {}
        self.velocities: dict[int, Tensor] = {}

    def run(self) -> Tensor:
        told = self.sampling.get("callback")

        def callback(step: int, denoised: Tensor, x: Tensor, total: int, *more: Any) -> None:
            sigma = float(self.sigmas[step]) if 0 <= step < len(self.sigmas) else 0.0
            if sigma > 0:
                if step - 1 in self.probed:
                    self.states[step] = x.detach().clone()
                self.velocities[step] = (x.float() - denoised.float()) / sigma
            if told is not None:
                told(step, denoised, x, total, *more)

        return self.sampling.run(callback=callback)


def probe_steps(steps: int, count: int) -> tuple[int, ...]:
    """At most `count` steps from 1 to steps − 2, evenly spread: step 0 has no step before it, and the last one's A is 1."""
    last = steps - 2
    if last < 1 or count < 1:
        return ()
    count = min(count, last)
    return tuple(sorted({round(1 + i * (last - 1) / max(count - 1, 1)) for i in range(count)}))


def amplification(watched: Watched, result: Tensor) -> dict[int, float]:
    """Step → A_l at the probed steps; empty where a run cannot be continued from its states: with a mask, or rising sigmas."""
    sigmas, steps = watched.sigmas, len(watched.sigmas) - 1
    if watched.sampling.get("denoise_mask") is not None or steps < 3 or not bool((sigmas[:-1] > sigmas[1:]).all()):
        return {}
    found = {}
    for step in watched.probed:
        if not {step - 1, step} <= watched.velocities.keys() or step + 1 not in watched.states:
            continue
        off = watched.velocities[step - 1] - watched.velocities[step]
        moved = SMALL * float(sigmas[step + 1] - sigmas[step]) * off
        ended = watched.sampling.continued(watched.states[step + 1] + moved.to(watched.states[step + 1]), sigmas[step + 1 :])
        length = moved.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        found[step] = float(((ended - result).float().flatten(1).norm(dim=1).to(length) / length).mean())
    return found


def interpolated(measured: Mapping[int, float], steps: int) -> list[float]:
    """A_l of every step: linear between the measured ones, held before the first, falling to 1 at the last step."""
    known = dict(measured)
    known.setdefault(steps - 1, 1.0)
    places: Sequence[int] = sorted(known)
    found = []
    for step in range(steps):
        right = next((place for place in places if place >= step), places[-1])
        left = max((place for place in places if place <= step), default=right)
        share = (step - left) / (right - left) if right > left else 0.0
        found.append(known[left] + share * (known[right] - known[left]))
    return found
