"""From a recording to a schedule: errors of every forecast that a cache could make, and the plan with the smallest sum.

The error of step l served from computed steps is that of the engine's own forecast (forecast.py) against the recorded feature,

    rel_l1   Σ|F̂ − F| / Σ|F|          rel_l2   ‖F̂ − F‖ / ‖F‖          cosine   1 − mean over tokens of cos(F̂, F)

the largest over a picture's conditions (one schedule serves all of them), the mean over pictures and runs. With weights `dsigma` it
is multiplied by |σ_{l+1} − σ_l|, the length of the step that uses it. `cosine` with order 0 is the sharing schedule of DDT, arXiv
2504.05741. What we do differently by default:

    guided        ‖v̂ − v‖ of the guided velocity, whatever the cache keeps: guidance adds the conditions' errors up with signs, and an
                  absolute error counts alike wherever the velocity is small or large
    amplified     weights |σ_{l+1} − σ_l|·A_l with A_l measured (amplification.py): the sum is then, to first order, a bound of the change
                  of the final latent itself
    fitted        for order 1, how far each forecast goes along its line: F(s₀) + r_l·(s − s₀)·(F(s₀) − F(s₁))/(s₀ − s₁) with the r_l of
                  least squares over the recording, a number a step. r = 0 is repetition and r = 1 the line, so a plan costs no more
                  than under either, and the search chooses plans by what they cost with their own r

Errors are those along the uncached run. A cached run leaves that path, so a searched cost is an estimate; bench/schedules.py measures what
it is worth on other prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import input_error
from .amplification import interpolated
from .forecast import Ladder
from .recording import RecordedRun, Recording
from .schedule import CacheSchedule
from .search import Plan, best_forecast_plans, best_reuse_plans, even_steps, forbid, gap_costs, improve, plan_cost

__all__ = ["METRICS", "ForecastCosts", "SearchOptions", "SearchResult", "search_schedule"]

METRICS = ("rel_l1", "rel_l2", "cosine", "guided")
WEIGHTS = ("none", "dsigma", "amplified")
MOST_REACH = 2.0  # twice the line: beyond it a recording says that the path turned, which another picture may not do
MOST_STEPS = 200  # tables of lines hold steps³ numbers, and the work grows as steps³·budget


@dataclass(frozen=True)
class SearchOptions:
    """budget: steps to compute. longest: most steps forecast in a row, 0 for any. first, last: steps at the ends that are computed.

    fitted: see the head of this file; orders other than 1 have no such number.
    """

    budget: int
    order: int = 1
    basis: str = "newton"
    axis: str = "step"
    metric: str = "rel_l2"
    weights: str = "none"
    longest: int = 0
    first: int = 1
    last: int = 0
    fitted: bool = False

    def forced(self, steps: int) -> tuple[int, ...]:
        return (*range(self.first), *range(steps - self.last, steps))


@dataclass(frozen=True)
class SearchResult:
    """The schedule, and for every budget from 1 to T the cost of the best plan and of even steps (infinite where no plan is allowed).

    errors, even_errors: of each step under the schedule and under as many even steps, weighted, 0 where it is computed.
    """

    schedule: CacheSchedule
    costs: tuple[float, ...]
    even: tuple[float, ...]
    errors: tuple[float, ...]
    even_errors: tuple[float, ...]
    pictures: int


def error_of(predicted: Tensor, exact: Tensor, metric: str) -> Tensor:
    """(…, tokens, channels) twice → (…)."""
    if metric == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(predicted, exact, dim=-1).mean(-1)
    wrong, norm = (predicted - exact).flatten(-2), exact.flatten(-2)
    if metric == "guided":
        return wrong.norm(dim=-1) / norm.shape[-1] ** 0.5
    power = 1 if metric == "rel_l1" else 2
    scale = norm.norm(power, dim=-1)
    return wrong.norm(power, dim=-1) / scale.clamp_min(torch.finfo(scale.dtype).tiny)


class ForecastCosts:
    """Errors of forecasts over the pictures of a recording.

    Args:
        pictures: a list a picture, of its conditions' traces (T, tokens, channels).
        positions: of the T steps on the axis of the forecast.
        weights: (T,).
    """

    def __init__(self, pictures: Sequence[Sequence[Tensor]], positions: Sequence[float], options: SearchOptions, weights: Tensor):
        self.pictures, self.positions, self.options, self.step_weights = pictures, positions, options, weights
        self.steps = len(positions)
        self._gaps: dict[tuple[tuple[int, ...], int], float] = {}

    def errors(self, history: Sequence[int], steps: range) -> Tensor:
        """(len(steps),) float64, the error of each step served from the computed steps of `history`, rising."""
        mix = self._mix(history, steps)  # (l, k)
        if self.fits(history):
            reach = self.reach(history, steps, mix).to(mix)
            mix = mix * reach[:, None]
            mix[:, -1] += 1 - reach
        total = torch.zeros(len(steps), dtype=torch.float64)
        for conditions in self.pictures:
            found = []
            for trace in conditions:
                known, exact = trace[list(history)].float(), trace[steps.start : steps.stop].float()
                found.append(error_of(torch.einsum("lk,knc->lnc", mix, known), exact, self.options.metric))
            total += torch.stack(found).amax(0)
        return total / len(self.pictures)

    def fits(self, history: Sequence[int]) -> bool:
        return self.options.fitted and self.options.order == 1 and len(history) == 2

    def reach(self, history: Sequence[int], steps: range, mix: Tensor) -> Tensor:
        """(len(steps),) float64, r of each step served along the line through the two steps of `history`; mix: of these, see _mix."""
        mix = mix.clone()
        mix[:, -1] -= 1  # from the latest computed step on
        along, square = torch.zeros(len(steps), dtype=torch.float64), torch.zeros(len(steps), dtype=torch.float64)
        for conditions in self.pictures:
            for trace in conditions:
                known, exact = trace[list(history)].float(), trace[steps.start : steps.stop].float()
                line = torch.einsum("lk,knc->lnc", mix, known).flatten(1)
                wanted, norm = (exact - known[-1]).flatten(1), exact.flatten(1).square().sum(1)
                scale = 1.0 if self.options.metric == "guided" else 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny)
                along += (line * wanted).sum(1) * scale
                square += line.square().sum(1) * scale
        return torch.where(square > 0, along / square, 1.0).clamp(0.0, MOST_REACH)

    def reuse_gaps(self) -> Tensor:
        """(T, T + 1), see gap_costs: from the latest computed step alone."""
        table = torch.zeros(self.steps, self.steps, dtype=torch.float64)
        for i in range(self.steps - 1):
            table[i, i + 1 :] = self.errors((i,), range(i + 1, self.steps))
        return gap_costs(table, self.step_weights)

    def line_gaps(self) -> Tensor:
        """(T, T, T + 1): from the line through steps j < i."""
        table = torch.zeros(self.steps, self.steps, self.steps, dtype=torch.float64)
        for i in range(1, self.steps - 1):
            for j in range(i):
                table[j, i, i + 1 :] = self.errors((j, i), range(i + 1, self.steps))
        return gap_costs(table, self.step_weights)

    def gap(self, history: tuple[int, ...], end: int) -> float:
        """The cost of the steps between the last of `history` and `end`, by as many computed steps as the order takes."""
        used = history[-(self.options.order + 1) :]
        if (used, end) not in self._gaps:
            inner = range(used[-1] + 1, end)
            cost = float((self.errors(used, inner) * self.step_weights[inner.start : inner.stop]).sum()) if len(inner) else 0.0
            self._gaps[used, end] = cost
        return self._gaps[used, end]

    def served(self, computed: Sequence[int]) -> tuple[float, ...]:
        """The weighted error of every step under a plan, 0 where it is computed."""
        found = [0.0] * self.steps
        for k, end in enumerate((*computed[1:], self.steps)):
            inner = range(computed[k] + 1, end)
            if len(inner):
                history = computed[max(0, k - self.options.order) : k + 1]
                found[inner.start : inner.stop] = (self.errors(history, inner) * self.step_weights[inner.start : inner.stop]).tolist()
        return tuple(found)

    def reaches(self, computed: Sequence[int]) -> tuple[float, ...]:
        """r of every step under a plan, 1 where none is fitted; empty where no step has one."""
        found = [1.0] * self.steps
        for j, i, end in zip(computed, computed[1:], (*computed[2:], self.steps)):
            if self.fits((j, i)) and end - i > 1:
                inner = range(i + 1, end)
                found[i + 1 : end] = [round(float(reach), 4) for reach in self.reach((j, i), inner, self._mix((j, i), inner))]
        return tuple(found) if self.options.fitted and self.options.order == 1 else ()

    def _mix(self, history: Sequence[int], steps: range) -> Tensor:
        """(len(steps), len(history)): the share of each computed step in each forecast; forecasts are linear in what they keep."""
        ladder = Ladder(self.options.order, self.options.basis)
        for unit, step in zip(torch.eye(len(history)), history):
            ladder.update(self.positions[step], unit)
        return torch.stack([ladder.predict(self.positions[step]) for step in steps])


def search_schedule(recording: Recording, options: SearchOptions, where: str) -> SearchResult:
    """The cheapest schedule of `options.budget` computed steps for what was recorded.

    Raises: NodeInputError for a recording without a whole run, a budget or bounds that no plan of its steps can meet.
    """
    runs = recording.whole_runs(where)
    sigmas = runs[-1].sigmas
    steps = len(sigmas) - 1
    _check(options, steps, where)
    pictures = list(_guided(runs, where) if options.metric == "guided" else _pictures(runs))
    weights = _weights(runs, sigmas, options.weights, where)
    positions = [float(step) for step in range(steps)] if options.axis == "step" else list(sigmas[:-1])
    costs = ForecastCosts(pictures, positions, options, weights)
    forced = options.forced(steps)
    gaps = costs.reuse_gaps()
    if options.order == 0:
        plans = best_reuse_plans(forbid(gaps, forced, options.longest))
    else:
        lines = costs.line_gaps() if steps > 1 else gaps[None]
        first = forbid(gaps[:1], forced, options.longest)[0]
        plans = best_forecast_plans(first, forbid(lines, forced, options.longest))
    plan = plans[options.budget - 1]
    if not plan.cost < float("inf"):
        got = f"{options.budget} of {steps} steps, at most {options.longest} forecast in a row"
        raise input_error(where, "budget", got, "a budget that the bounds leave room for", "Raise budget or max_skips.")
    if options.order > 1:
        plan = _bent(plan, costs, forced, options.longest)
    even = tuple(plan_cost(even_steps(steps, budget), steps, costs.gap) for budget in range(1, steps + 1))
    schedule = CacheSchedule(
        sigmas, plan.computed, options.order, options.basis, options.axis, recording.target, recording.blocks, recording.family,
        options.metric, plan.cost, even[options.budget - 1], costs.reaches(plan.computed),
    )  # fmt: skip
    found = [found.cost for found in plans]
    found[options.budget - 1] = plan.cost
    served = costs.served(plan.computed), costs.served(even_steps(steps, options.budget))
    return SearchResult(schedule, tuple(found), even, *served, len(pictures))


def _bent(plan: Plan, costs: ForecastCosts, forced: tuple[int, ...], longest: int) -> Plan:
    """For orders above 1: from the best plan for lines, one computed step moved at a time."""

    def gap(history: tuple[int, ...], end: int) -> float:
        return float("inf") if longest and end - history[-1] - 1 > longest else costs.gap(history, end)

    return improve(plan, costs.steps, gap, forced)


def _check(options: SearchOptions, steps: int, where: str) -> None:
    if steps > MOST_STEPS:
        remedy = "Record fewer steps; a schedule serves longer runs too."
        raise input_error(where, "recording", f"{steps} steps", f"at most {MOST_STEPS}", remedy)
    forced = len({0, *(step for step in options.forced(steps) if step >= 0)})
    if options.first + options.last > steps:
        got = f"{options.first} first and {options.last} last of {steps} steps"
        raise input_error(where, "first_steps", got, f"together at most {steps}", "Lower first_steps or last_steps.")
    if not forced <= options.budget <= steps:
        raise input_error(where, "budget", options.budget, f"{forced} to {steps} steps", "Set the number of steps to compute.")
    for name, value, allowed in (("metric", options.metric, METRICS), ("weights", options.weights, WEIGHTS)):
        if value not in allowed:
            raise input_error(where, name, value, ", ".join(allowed), "Choose one of these.")


def _weights(runs: Sequence[RecordedRun], sigmas: Sequence[float], kind: str, where: str) -> Tensor:
    """(T,) with mean 1."""
    steps = len(sigmas) - 1
    weights = torch.ones(steps, dtype=torch.float64)
    if kind != "none":
        weights = torch.tensor(sigmas, dtype=torch.float64).diff().abs()
    if kind == "amplified":
        measured = [interpolated(run.amplification, steps) for run in runs if run.amplification]
        if not measured:
            remedy = "Set probes on Schedule Record, or weights to dsigma."
            allowed = "a recording of a whole picture with probes, on falling sigmas and without a mask"
            raise input_error(where, "weights", "amplified, for a recording without probes", allowed, remedy)
        weights = weights * torch.tensor(measured, dtype=torch.float64).mean(0)
    return weights / weights.mean()


def _guided(runs: Sequence[RecordedRun], where: str) -> Iterator[list[Tensor]]:
    """The guided velocity of each picture."""
    for run in runs:
        if len(run.guided) != run.steps:
            got = f"guided, with {len(run.guided)} of {run.steps} steps reported by the sampler"
            raise input_error(where, "metric", got, "a sampler that reports every step", "Record with Euler, or set metric to rel_l2.")
        trace = torch.stack([run.guided[step] for step in range(run.steps)])  # (T, rows, tokens, channels)
        for row in range(trace.shape[1]):
            yield [trace[:, row]]


def _pictures(runs) -> Iterator[list[Tensor]]:
    """Per row of each run's batch the traces of its conditions: rows of different conditions belong together by place."""
    for run in runs:
        whole = list(run.complete().values())
        for row in range(max(trace.shape[1] for trace in whole)):
            yield [trace[:, min(row, trace.shape[1] - 1)] for trace in whole]
