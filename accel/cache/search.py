"""Which steps of a run to compute, for a given number of them: the exact optimum, by dynamic programming.

"DDT: Decoupled Diffusion Transformer", arXiv 2504.05741, section on sharing the self-condition. With the cost E(i, n) of serving steps
i+1 … n−1 from a computed step i, the cheapest plan of k computed steps before n is

    C_1(n) = E(0, n),    C_k(n) = min_i C_{k−1}(i) + E(i, n),    answer C_K(T)

What we do differently: costs are errors summed (the paper subtracts sums of similarities, which has the same minimiser); any step may be
forced and any gap bounded, by infinite costs; and where values are forecast along a line through the last two computed steps, the state is
that pair, since then a step's cost depends on both:

    D_2(0, i) = E_0(i),    D_{k+1}(i, n) = min_j D_k(j, i) + E(j, i, n),    answer min_{j,i} D_K(j, i) + E(j, i, T)

Forecasts of higher order depend on more steps than a table can hold; there a plan is improved by moving one computed step at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Plan", "best_forecast_plans", "best_reuse_plans", "even_steps", "forbid", "gap_costs", "improve"]

GapCost = Callable[[tuple[int, ...], int], float]


class Plan(NamedTuple):
    """computed: rising step numbers, the first is 0; cost: summed error of the others, infinite where no plan is allowed."""

    computed: tuple[int, ...]
    cost: float


def even_steps(steps: int, budget: int) -> tuple[int, ...]:
    """`budget` of `steps` at equal distances, round(i·steps/budget), halves to the even number; the yardstick of every search."""
    return tuple(sorted({round(i * steps / budget) for i in range(budget)}))


def gap_costs(errors: Tensor, weights: Tensor | None = None) -> Tensor:
    """From errors of single steps to costs of gaps.

    Args:
        errors: (…, T, T), [i, l] the error of step l served from i (before it any tables of earlier steps); only l > i is read.
        weights: (T,), of each step's error.

    Returns:
        (…, T, T + 1) float64, [i, n] the sum over i < l < n; infinite for n ≤ i.
    """
    steps = errors.shape[-1]
    served = errors.double() if weights is None else errors.double() * weights.double()
    later = torch.ones(steps, steps, dtype=torch.bool).triu(1)
    total = torch.where(later, served, 0.0).cumsum(-1)  # (…, i, l), up to and with l
    gaps = torch.full((*errors.shape[:-1], steps + 1), math.inf, dtype=torch.float64)
    gaps[..., 1:] = torch.where(torch.ones(steps, steps, dtype=torch.bool).triu(), total, math.inf)
    return gaps


def forbid(gaps: Tensor, forced: Iterable[int] = (), longest: int = 0) -> Tensor:
    """`gaps` (…, T, T + 1) with infinite cost where a forced step would be left out, or more than `longest` (0: any number) in a row."""
    gaps = gaps.clone()
    for step in forced:
        gaps[..., :step, step + 1 :] = math.inf
    if longest:
        start, end = torch.arange(gaps.shape[-2])[:, None], torch.arange(gaps.shape[-1])
        gaps[..., end - start - 1 > longest] = math.inf
    return gaps


def best_reuse_plans(gaps: Tensor) -> list[Plan]:
    """The cheapest plan of 1, 2, … T computed steps where a step's cost depends on the latest computed one.

    Args:
        gaps: (T, T + 1) of `gap_costs`.
    """
    steps = gaps.shape[0]
    cost, came_from = gaps[0].clone(), []  # (T + 1,): the cheapest way to have computed k steps and arrive at n
    plans = [Plan((0,), float(cost[steps]))]
    for _ in range(2, steps + 1):
        cost, before = (cost[:steps, None] + gaps).min(0)
        came_from.append(before)
        computed, n = [], steps
        for before in reversed(came_from):
            n = int(before[n])
            computed.append(n)
        plans.append(Plan((0, *reversed(computed)), float(cost[steps])))
    return plans


def best_forecast_plans(first: Tensor, gaps: Tensor) -> list[Plan]:
    """The cheapest plan of 1, 2, … T computed steps where a step's cost depends on the two latest computed ones.

    Args:
        first: (T + 1,), [n] the cost of steps 1 … n − 1 from step 0 alone.
        gaps: (T, T, T + 1), [j, i, n] the cost of steps i+1 … n−1 from steps j < i.
    """
    steps = gaps.shape[0]
    plans = [Plan((0,), float(first[steps]))]
    cost = torch.full((steps, steps), math.inf, dtype=torch.float64)  # of the pair of steps computed last
    cost[0, 1:] = first[1:steps]
    came_from: list[Tensor] = []
    for _ in range(2, steps + 1):
        total = cost + gaps[:, :, steps]
        last = int(total.argmin())
        j, i = divmod(last, steps)
        computed = [i, j]
        for before in reversed(came_from):
            i, j = j, int(before[j, i])
            computed.append(j)
        plans.append(Plan(tuple(reversed(computed)), float(total.flatten()[last])))
        cost, before = (cost[:, :, None] + gaps[:, :, :steps]).min(0)
        came_from.append(before)
    return plans


def plan_cost(computed: Sequence[int], steps: int, gap_cost: GapCost) -> float:
    """The cost of any plan. gap_cost(computed steps up to i, n): of steps i+1 … n−1."""
    ends = (*computed[1:], steps)
    return sum(gap_cost(tuple(computed[: k + 1]), end) for k, end in enumerate(ends))


def improve(plan: Plan, steps: int, gap_cost: GapCost, forced: Iterable[int] = ()) -> Plan:
    """Move one computed step at a time to where it helps most, until no move helps; as many are computed as before."""
    fixed = {0, *forced}
    best = Plan(plan.computed, plan_cost(plan.computed, steps, gap_cost))
    while True:
        moves = (
            tuple(sorted({*best.computed, new} - {old}))
            for old in best.computed if old not in fixed
            for new in range(1, steps) if new not in best.computed
        )  # fmt: skip
        found = min(((plan_cost(move, steps, gap_cost), move) for move in moves), default=(math.inf, ()))
        if not found[0] < best.cost - 1e-12:
            return best
        best = Plan(found[1], found[0])
