"""A searched schedule for people: which steps it computes, what each of the others costs, and what other budgets would."""

from __future__ import annotations

from torch import Tensor

from ...metrics.plot import Chart, Series, line_chart
from .schedule_search import SearchResult

__all__ = ["cost_chart", "schedule_table", "step_chart"]


def step_chart(found: SearchResult) -> Tensor:
    """The error of every step, at 0 where it is computed: (1, h, w, 3)."""
    schedule = found.schedule
    lines = [
        Series(f"searched, {schedule.cost:.3g}", tuple((float(step), error) for step, error in enumerate(found.errors))),
        Series(f"even, {schedule.even_cost:.3g}", tuple((float(step), error) for step, error in enumerate(found.even_errors))),
    ]
    title = f"{len(schedule.computed)} of {schedule.steps} steps computed (those at 0), order {schedule.order}"
    return line_chart(lines, Chart(title, "step", f"error, {schedule.metric}"))


def cost_chart(found: SearchResult) -> Tensor:
    """The cost of the best schedule for each number of computed steps beside that of even steps: (1, h, w, 3)."""
    lines = [
        Series(name, tuple((float(budget), cost) for budget, cost in enumerate(costs, start=1)))
        for name, costs in (("searched", found.costs), ("even", found.even))
    ]
    return line_chart(lines, Chart("What a budget costs", "computed steps", "sum of errors", log_y=True))


def schedule_table(found: SearchResult) -> str:
    """The schedule in words."""
    schedule = found.schedule
    gain = f", {1 - schedule.cost / schedule.even_cost:.0%} less" if schedule.even_cost else ""
    return "\n".join([
        f"{len(schedule.computed)} of {schedule.steps} steps computed: {', '.join(map(str, schedule.computed))}",
        f"summed error ({schedule.metric}, order {schedule.order}): {schedule.cost:.4g}; even steps {schedule.even_cost:.4g}{gain}",
        f"target {schedule.target}" + (f" ({schedule.blocks})" if schedule.blocks else "") + f", {schedule.family or 'any family'}, "
        f"from {found.pictures} pictures, sigmas {schedule.sigmas[0]:.4g} → {schedule.sigmas[-1]:.4g}",
        "steps: " + "".join("F" if digit == "1" else "·" for digit in schedule.mask),
    ])  # fmt: skip
