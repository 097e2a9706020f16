"""Masks of heads and neurons that are learned: "Learnable Sparsity for Vision Generative Models" (EcoDiff), arXiv 2412.02852.

    u ~ U(0, 1);  s = σ((log(u + δ) − log(1 − u + δ) + λ)/τ);  m = clip(s·(ζ − γ) + γ, 0, 1)      hard concrete, Louizos et al. 2018
    τ = 0.83, (γ, ζ) = (−0.1, 1.1); λ starts at 3, where m is nearly 1; δ damps the noise: 0.1 for FLUX, 0.5 for SDXL
    R_l0 = σ(λ − τ·log(−γ/ζ)), the chance that m > 0 where δ = 0      R_l1 = σ(0.4·λ + 1), the released configuration of FLUX
    R is the mean over the units of a group and over groups, of heads and of neurons, added

One mask holds for every step of a sampling run. λ is float32 whatever the model computes in: with lr 0.5, bf16 would stall at ±3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...families.width import WidthGroup

__all__ = ["DELTA", "FIRST", "GAMMA", "PENALTIES", "TAU", "ZETA", "LearnedMasks", "hard_concrete", "penalty"]

TAU, GAMMA, ZETA = 0.83, -0.1, 1.1
DELTA, FIRST = 0.1, 3.0
PENALTIES = ("l1_sigmoid", "l0")


def hard_concrete(lam: Tensor, u: Tensor, delta: float = DELTA) -> Tensor:
    """m in [0, 1] for λ and u in (0, 1) of one shape."""
    s = torch.sigmoid(((u + delta).log() - (1.0 - u + delta).log() + lam) / TAU)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def penalty(lam: Tensor, kind: str) -> Tensor:
    """R of each unit, one of PENALTIES."""
    if kind == "l0":
        return torch.sigmoid(lam - TAU * torch.tensor(-GAMMA / ZETA).log())
    return torch.sigmoid(0.4 * lam + 1.0)


class LearnedMasks(nn.Module):
    """λ of every group. Parameters are named as the groups, dots as slashes."""

    def __init__(self, groups: tuple[WidthGroup, ...]):
        super().__init__()
        self.groups = groups
        self.lam = nn.ParameterDict({_name(group): nn.Parameter(torch.full((group.count,), FIRST)) for group in groups})

    def of(self, group: WidthGroup) -> nn.Parameter:
        return self.lam[_name(group)]

    def drawn(self, u: Mapping[tuple[str, str], Tensor], delta: float) -> dict[tuple[str, str], Tensor]:
        """m of every group for its u, attached to λ."""
        return {group.key: hard_concrete(self.of(group), u[group.key].to(self.of(group)), delta) for group in self.groups}

    def penalty(self, kind: str) -> Tensor:
        """R over all groups, a scalar."""
        means: dict[bool, list[Tensor]] = {}
        for group in self.groups:
            means.setdefault(group.is_heads, []).append(penalty(self.of(group), kind).mean())
        return sum(torch.stack(found).mean() for found in means.values())

    def values(self) -> dict[tuple[str, str], Tensor]:
        return {group.key: self.of(group).detach().float().cpu().clone() for group in self.groups}


def _name(group: WidthGroup) -> str:
    return group.name.replace(".", "/")
