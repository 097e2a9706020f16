"""Input-change gate: how fast the output follows the input was seen at the last computed steps, so the input's change says when to compute.

"Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching" (EasyCache), arXiv 2507.02860. With x the latent,
v the model's output, and a prime for the last computed step:

    at computed steps   k = mean|v − v'| / mean|x − x'|
    at every step       sum += k·mean|x − x'| / mean|v'|,   skip while sum < threshold, else compute and set sum = 0

A skip needs no model call. Target `output_delta` returns x + (v' − x') as the authors do, target `output` returns v'. What we do
differently: k and the sums are an image's own, and the worst image decides, so pictures of a batch do not share one rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .gate import TINY, GateState, mean_size
from .policy import Action, Choice, Observation, Policy, Probe, RunFacts, Visit

__all__ = ["InputChangeGate"]


@dataclass(frozen=True)
class InputChangeGate(Policy):
    """threshold: 0 computes every visit."""

    threshold: float = 0.1
    reduce: str = "max_over_batch"

    @property
    def can_skip(self) -> bool:
        return self.threshold > 0

    @property
    def probe(self) -> Probe:
        return Probe("latent")

    def start(self, facts: RunFacts) -> GateState:
        return _State(self, facts.target == "output_delta")

    def line(self) -> str:
        return f"input-change gate below {self.threshold:g}" + f", order {self.order}" * bool(self.order)


class _State(GateState):
    """rates: k of each image; sizes: mean|v'| of each image. `relative`: features are v − x."""

    policy: InputChangeGate
    observes = True

    def __init__(self, policy: InputChangeGate, relative: bool):
        super().__init__(policy, policy.threshold, policy.reduce, adds=True)
        self.relative = relative
        self.rates: list[float] | None = None
        self.sizes: list[float] | None = None

    def decide(self, visit: Visit) -> Choice:
        return Choice(Action.FULL, "no rate yet") if self.rates is None else super().decide(visit)

    def measure(self, fresh: torch.Tensor, forecast: torch.Tensor) -> torch.Tensor:
        return mean_size(fresh.float() - forecast)

    def gate(self, visit: Visit, values: Sequence[float]) -> Choice:
        changes = [k * change / max(size, TINY) for k, change, size in zip(self.rates, values, self.sizes)]
        return super().gate(visit, changes)

    def observe(self, seen: Observation) -> None:
        if not seen.lead:
            return
        x, v = seen.probe.float(), self._output(seen.features[""][0], seen.probe)
        old_x, old_f = seen.last("probe"), seen.last("")
        self.sizes = mean_size(v).tolist()
        if old_x is not None and old_f is not None:
            moved = mean_size(x - old_x[0])
            followed = mean_size(v - self._output(old_f[0], old_x[0])) / moved.clamp_min(TINY)
            if bool((moved > TINY).all()):
                self.rates = followed.tolist()

    def _output(self, feature: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return feature.float() + x.float() if self.relative else feature.float()
