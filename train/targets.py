"""What a training step asks of the velocity: where on the flow it stands, and what it should answer.

Every target lies on a line x_σ = (1 − σ)·x0 + σ·z with velocity z − x0, or asks a teacher at a point of it:
    velocity           z fresh normal: plain flow matching
    reflow_pairs       (z, x0) a pair that a teacher's ODE joined                                (Liu et al. 2022)
    annealing_reflow   z_β = sqrt(1 − β²)·z + β·z', β falling from 1 to 0 over `anneal_steps`    (Zhu et al. 2024, SlimFlow)
    distill_onestep    σ = 1, (z, x0) a pair: the whole way in one step                          (Liu et al. 2023, InstaFlow)
    flow_guided_distill  the same, and at fresh noise the end of two steps, the second a teacher's; two_step.py   (SlimFlow)
    teacher_velocity   x_σ as in velocity, the answer a frozen model's, with its guidance
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import input_error
from .draws import Draws

__all__ = ["ANNEALING", "AT_NOISE", "FIRST_STEPS", "KINDS", "NEEDS_PAIRS", "NEEDS_TEACHER", "Point", "Target", "point_at"]

KINDS = ("velocity", "teacher_velocity", "reflow_pairs", "annealing_reflow", "distill_onestep", "flow_guided_distill")
NEEDS_PAIRS = ("reflow_pairs", "annealing_reflow", "distill_onestep", "flow_guided_distill")
NEEDS_TEACHER = ("teacher_velocity", "flow_guided_distill")
AT_NOISE = ("distill_onestep", "flow_guided_distill")  # stand at σ = 1
ANNEALING = ("linear", "cosine", "exponential")
FIRST_STEPS = ("student", "flow")


@dataclass(frozen=True)
class Target:
    """kind: one of KINDS. teacher_cfg: guidance of teacher_velocity, 1 for none. anneal_steps, annealing: how β falls.

    flow_share: a of teacher_velocity's target (1 − a)·v_teacher + a·(z − x0). Its squared error has the gradient of
    (1 − a)·‖v − v_teacher‖² + a·‖v − (z − x0)‖², for the two differ by a constant.
    t_min, t_max, first_step, two_step_weight: of flow_guided_distill, see two_step.py; pair_weight multiplies the pairs' own term.
    """

    kind: str = "velocity"
    teacher_cfg: float = 1.0
    anneal_steps: int = 0
    annealing: str = "linear"
    flow_share: float = 0.0
    t_min: float = 0.2
    t_max: float = 0.8
    first_step: str = "student"
    two_step_weight: float = 1.0
    pair_weight: float = 1.0

    def __post_init__(self):
        for name, allowed in (("kind", KINDS), ("annealing", ANNEALING), ("first_step", FIRST_STEPS)):
            if getattr(self, name) not in allowed:
                raise input_error("Train Target", name, getattr(self, name), ", ".join(allowed), "Choose one of these.")
        if not 0.0 <= self.teacher_cfg <= 100.0:
            raise input_error("Train Target", "teacher_cfg", self.teacher_cfg, "0 to 100", "1 is no guidance.")
        if not 0.0 <= self.flow_share <= 1.0:
            raise input_error("Train Target", "flow_share", self.flow_share, "0 to 1", "0 is the teacher alone.")
        if self.anneal_steps < 0:
            raise input_error("Train Target", "anneal_steps", self.anneal_steps, "0 or more", "0 is plain reflow.")
        if not 0.0 < self.t_min <= self.t_max < 1.0:
            raise input_error("Train Target", "t_min", (self.t_min, self.t_max), "0 < t_min ≤ t_max < 1", "0.2 and 0.8 are the paper's.")
        for name in ("two_step_weight", "pair_weight"):
            if not 0.0 <= getattr(self, name) <= 1000.0:
                raise input_error("Train Target", name, getattr(self, name), "0 to 1000", "1 is the paper's; 0 leaves the term out.")

    def beta(self, step: int) -> float:
        """How much of the noise is fresh at `step` of annealing_reflow: 1 an ordinary flow, 0 plain reflow."""
        if not self.anneal_steps:
            return 0.0
        done = step / self.anneal_steps
        if self.annealing == "exponential":
            return math.exp(-done)
        done = min(1.0, done)
        return 1.0 - done if self.annealing == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Point:
    """Where a step stands: x (b, c, h, w) at sigma (b,), the velocity asked for there, and the clean latent; all fp32."""

    x: Tensor
    sigma: Tensor
    velocity: Tensor
    clean: Tensor

    def slice(self, start: int, count: int) -> Point:
        return Point(*(value[start : start + count] for value in (self.x, self.sigma, self.velocity, self.clean)))


def point_at(target: Target, clean: Tensor, paired: Tensor | None, sigma: Tensor, draws: Draws, step: int) -> Point:
    """The points of one step. A teacher's velocity is put in later, micro-batch by micro-batch.

    Args:
        clean: x0 (b, …). paired: the noise of each x0 for the kinds that need pairs. sigma: (b,).
    """
    if target.kind in NEEDS_PAIRS:
        if paired is None:
            allowed = "flow pairs: a latent and the noise that a model's ODE starts from to reach it"
            raise input_error("Train Target", "kind", target.kind, allowed, "Link flow pairs, or choose velocity.")
        noise = paired
        beta = target.beta(step) if target.kind == "annealing_reflow" else 0.0
        if beta > 0.0:
            noise = math.sqrt(1.0 - beta * beta) * noise + beta * draws.normal("noise", tuple(clean.shape))
        if target.kind in AT_NOISE:
            sigma = torch.ones_like(sigma)
    else:
        noise = draws.normal("noise", tuple(clean.shape))
    s = sigma.view(-1, *[1] * (clean.ndim - 1))
    return Point((1.0 - s) * clean + s * noise, sigma, noise - clean, clean)


def teacher_velocity(teacher: Any, target: Target, x: Tensor, sigma: Tensor, cond: list[Any]) -> Tensor:
    """The frozen model's answer, guided: v = v₀ + w·(v₁ − v₀) with v₀ under the empty condition."""
    with torch.no_grad():
        conditional = teacher.velocity(x, sigma, cond)
        if target.teacher_cfg == 1.0:
            return conditional
        empty = teacher.velocity(x, sigma, [None] * len(cond))
        return empty + target.teacher_cfg * (conditional - empty)
