"""A network whose features are known functions of the step, under the real Run: what a policy decides and forecasts, without a host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rectiflow.accel.cache.policy import Limits, Policy
from rectiflow.accel.cache.report import RunRecord
from rectiflow.accel.cache.store import Key
from rectiflow.accel.cache.targets import Call
from rectiflow.accel.cache.visits import CachePlan, Run

Feature = Callable[[int], torch.Tensor]
KEY = Key("prompt", 0)


class ToyStack:
    """first(s), last(s): what the watch sees and what the target keeps at step s, (b, …). used: step → the forecast put back."""

    name = "last_block"
    keeps_text = False

    def __init__(self, first: Feature, last: Feature, steps: int, name: str = "last_block"):
        self.first, self.last, self.steps, self.name = first, last, steps, name
        self.computed: list[int] = []
        self.used: dict[int, torch.Tensor] = {}

    def full(self, call: Call, parts=None):
        step = self._step(call)
        if call.watch is not None:
            call.watch.seen = self.first(step).clone()
            features = call.watch.gate(call.watch.seen) if call.watch.gate else None
            if features is not None:
                self.used[step] = features[0]
                return call.x, {}
        self.computed.append(step)
        return call.x, {"": (self.last(step),)}

    def skip(self, call: Call, features, part=""):
        step = self._step(call)
        if call.watch is not None:
            call.watch.seen = self.first(step).clone()
        self.used[step] = features[0]
        return call.x

    def _step(self, call: Call) -> int:
        return round((1 - call.sigma) * self.steps)

    def sample(self, policy: Policy, limits: Limits, latent: Feature | None = None, peek: Callable | None = None) -> RunRecord:
        """One run over all steps. latent: x by step; peek(run) is called after every step."""
        self.computed, self.used = [], {}
        sigmas = [1 - s / self.steps for s in range(self.steps + 1)]
        run = Run(CachePlan(policy, self.name, limits), self, sigmas, torch.device("cpu"))
        for s, sigma in enumerate(sigmas[:-1]):
            x = torch.zeros(self.first(s).shape[0], 1) if latent is None else latent(s)
            run.handle(Call(x, sigma, {}, lambda options: None), [KEY], ())
            if peek is not None:
                peek(run)
        return run.close(0.0, True)
