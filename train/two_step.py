"""SlimFlow's flow-guided distillation ("SlimFlow", arXiv 2407.12718): a one-step student checked at noise that no pair was made for.

    x_σ = ε − (1 − σ)·v(ε, 1)        σ = 1 − t, t ~ U(t_min, t_max), ε fresh       the first step, the student's own or the flow's
    x̂   = x_σ − σ·v_φ(x_σ, σ)                                                      the second, of the frozen flow φ
    L   = w·mean ρ((ε − v(ε, 1)) − sg[x̂])                                          the student's single step against both

φ is the reflowed model the student began as, not the large teacher: where paths are straight, two steps end closer to the ODE's own end
than one does, so the target is ahead of the student all over the noise and a small set of pairs is enough. The first step is the student's
in the paper's code; the gradient flows through the single step alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .losses import Loss
from .targets import Target

__all__ = ["TwoStep"]


@dataclass(frozen=True)
class TwoStep:
    """The trainer's additional loss of target flow_guided_distill. flow: φ, a frozen trainee. loss: ρ; its weight over sigma is left out,
    as all of it stands at σ = 1."""

    flow: Any
    target: Target
    distance: Loss
    name: str = "two_step"
    start: int = 0
    stop: int = 1 << 60
    every: int = 1

    @property
    def weight(self) -> float:
        return self.target.two_step_weight

    def loss(self, context) -> Tensor:
        """context: loop.StepContext; its conditions are used, its point is not."""
        target, cond = self.target, context.cond
        noise = context.normal("two_step noise")
        t = target.t_min + (target.t_max - target.t_min) * context.uniform("two_step time")
        sigma, ones = 1.0 - t, torch.ones(len(t))
        velocity = context.trainee.velocity(noise, ones, cond)
        noise, sigma = noise.to(velocity), sigma.to(velocity)
        with torch.no_grad():
            first = velocity.detach() if target.first_step == "student" else self.flow.velocity(noise, ones, cond)
            s = sigma.view(-1, *[1] * (noise.ndim - 1))
            middle = noise - (1.0 - s) * first
            end = middle - s * self.flow.velocity(middle, sigma, cond)
        return self.distance.each(noise - velocity - end, ones).mean()
