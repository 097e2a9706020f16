"""Solvers against each other from one noise: who spends how many model calls, and how far it ends from a fine reference.

The reference is the classical Runge-Kutta rule with many steps on the same model and schedule; it is not exact, and how far it may
itself be off is measured by the same rule with half as many steps. An error near that figure says nothing.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..errors import input_error
from .registry import SOLVERS, ode_solver

__all__ = ["Comparison", "Finished", "Row", "compare", "parse_budgets", "parse_solvers", "planned_steps", "steps_within", "table_csv"]

MOST_CALLS = 10_000  # of one entry: a typing error must not start a run of days
LATE_STAGES = frozenset({"heun", "rk4"})  # these save one call in the step that ends at sigma 0

# (sampler function, its options, steps) → final latent (b, c, …); makes the schedule and runs the guider.
Run = Callable[[Callable, dict[str, Any], int], Tensor]


@dataclass(frozen=True)
class Row:
    """One solver at one budget. rmse: root mean squared distance of the final latents from the reference's; seconds: of the whole run."""

    solver: str
    budget: int
    steps: int
    nfe: int
    seconds: float
    rmse: float


@dataclass(frozen=True)
class Finished:
    """A row and the latent it ended in."""

    row: Row
    latent: Tensor


@dataclass(frozen=True)
class Comparison:
    """All finished runs, the reference's latent, and its distance from the same with half as many steps."""

    runs: tuple[Finished, ...]
    reference: Tensor
    reference_error: float


def parse_solvers(text: str, where: str = "compare") -> tuple[str, ...]:
    """Names of the registry, separated by commas, spaces or lines; repeated ones count once."""
    names = tuple(dict.fromkeys(text.replace(",", " ").split()))
    unknown = [name for name in names if name not in SOLVERS]
    if unknown or not names:
        raise input_error(where, "solvers", ", ".join(unknown) or text, ", ".join(SOLVERS), "Separate names by commas.")
    return names


def parse_budgets(text: str, where: str = "compare") -> tuple[int, ...]:
    """Whole numbers of model calls, rising, repeated ones once."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() and 1 <= len(word) <= 5 and 1 <= int(word) <= MOST_CALLS for word in words):
        raise input_error(where, "nfe", text, f"whole numbers from 1 to {MOST_CALLS}, for example 8, 16, 32", "Separate numbers by commas.")
    return tuple(sorted({int(word) for word in words}))


def steps_within(solver: str, calls: int) -> int:
    """Most steps of a schedule down to sigma 0 that cost at most `calls` model calls; 0 when not even one does."""
    entry = SOLVERS[solver]
    saved = 1 if solver in LATE_STAGES else 0
    return max((calls - entry.extra_nfe + saved) // entry.nfe_per_step, 0)


def planned_steps(solvers: Sequence[str], budgets: Sequence[int], reference_steps: int) -> int:
    """Steps of a whole comparison, both references included; what a progress bar needs."""
    return sum(steps_within(*pair) for pair in _pairs(solvers, budgets)) + reference_steps + max(reference_steps // 2, 1)


class _Counted:
    """The model as a solver sees it, counting its calls; everything else is the model's own."""

    def __init__(self, model):
        self._model = model
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._model, name)


def _counting(function: Callable, seen: list[_Counted]) -> Callable:
    def solver(model, *args, **kwargs):
        seen.append(_Counted(model))
        return function(seen[-1], *args, **kwargs)

    return solver


def _rmse(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().mean().sqrt())


def compare(run: Run, solvers: Sequence[str], budgets: Sequence[int], reference_steps: int) -> Comparison:
    """Run the reference twice, then every solver at every budget; a budget that no step fits in is left out.

    Args:
        run: one sampling run, always from the same noise, conditions and kind of schedule.
        solvers, budgets: see `parse_solvers` and `parse_budgets`.
        reference_steps: of rk4, 4 calls each. The reference runs first, so the timed runs are warm.
    """
    function, options = ode_solver("rk4", last_step="euler")
    reference = run(function, options, reference_steps).cpu()
    halved = run(function, options, max(reference_steps // 2, 1)).cpu()
    runs = tuple(_finished(run, reference, *pair) for pair in _pairs(solvers, budgets) if steps_within(*pair))
    return Comparison(runs, reference, _rmse(reference, halved))


def _pairs(solvers: Sequence[str], budgets: Sequence[int]) -> Iterator[tuple[str, int]]:
    return ((solver, budget) for solver in solvers for budget in budgets)


def _finished(run: Run, reference: Tensor, solver: str, budget: int) -> Finished:
    function, options = ode_solver(solver, last_step="euler")
    seen: list[_Counted] = []
    steps = steps_within(solver, budget)
    start = time.perf_counter()
    latent = run(_counting(function, seen), options, steps).cpu()  # the copy to the CPU waits for the device
    seconds = time.perf_counter() - start
    return Finished(Row(solver, budget, steps, sum(model.calls for model in seen), seconds, _rmse(latent, reference)), latent)


def table_csv(rows: Sequence[Row], further: dict[str, Sequence[float]] | None = None) -> str:
    """Rows as CSV text with a header; `further` names more columns of one value a row."""
    further = further or {}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*(column.name for column in fields(Row)), *further])
    for number, row in enumerate(rows):
        more = (f"{column[number]:.3f}" for column in further.values())
        writer.writerow([row.solver, row.budget, row.steps, row.nfe, f"{row.seconds:.4f}", f"{row.rmse:.6g}", *more])
    return out.getvalue()
