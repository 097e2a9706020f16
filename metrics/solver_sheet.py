"""A comparison of solvers for people: the labelled grid, the chart of error over model calls, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .picture_grid import GridLayout, picture_grid
from .plot import Chart, Series, line_chart

__all__ = ["SolverRow", "solver_chart", "solver_grid", "solver_table"]

FAINT = 0.94  # the grey of a cell that holds no run


class SolverRow(Protocol):
    """What is read of a run (samplers.comparison.Row has it)."""

    solver: str
    budget: int
    steps: int
    nfe: int
    seconds: float
    rmse: float


def solver_grid(
    rows: Sequence[SolverRow], pictures: Sequence[Tensor], decibels: Sequence[float], reference: Tensor,
    axes: tuple[Sequence[str], Sequence[int]], scale: int,
) -> Tensor:
    """A row a solver: the reference, then a column a budget, captioned with the counted model calls and the PSNR.

    A budget too small for one step leaves its cell grey.

    Args:
        rows, pictures, decibels: of the runs, in the same order; pictures are `(h, w, 3)`.
        reference: `(h, w, 3)`.
        axes: all solvers and all budgets.
        scale: whole-number enlargement.

    Returns:
        (1, H, W, 3) in 0…1.
    """
    solvers, budgets = axes
    places: Mapping[tuple[str, int], int] = {(row.solver, row.budget): number for number, row in enumerate(rows)}
    cells: list[Tensor] = []
    captions: list[str] = []
    for solver in solvers:
        cells.append(reference)
        captions.append("reference")
        for budget in budgets:
            number = places.get((solver, budget))
            if number is None:
                cells.append(torch.full_like(reference, FAINT))
                captions.append(f"{solver} {budget}: no step fits")
            else:
                cells.append(pictures[number])
                captions.append(f"{solver} {rows[number].nfe}: {decibels[number]:.1f} dB")
    return picture_grid(cells, captions, GridLayout(columns=len(budgets) + 1, scale=scale, gap=8, font_size=12))


def solver_chart(rows: Sequence[SolverRow], solvers: Sequence[str], budgets: Sequence[int], reference_error: float) -> Tensor:
    """Error over counted model calls, `(1, 480, 880, 3)`; the last line is what the reference itself may be off."""
    lines = [Series(solver, tuple((row.nfe, row.rmse) for row in rows if row.solver == solver)) for solver in solvers]
    calls = [row.nfe for row in rows]
    if calls:
        lines.append(Series("reference's own", ((min(calls), reference_error), (max(calls), reference_error))))
    title = "Distance from the fine reference"
    return line_chart(lines, Chart(title, "model calls", "RMSE of the latent", True, True, tuple(float(budget) for budget in budgets)))


def solver_table(rows: Sequence[SolverRow], decibels: Sequence[float], reference_steps: int, reference_error: float) -> str:
    """A line a run, and which errors lie too near the reference's own to mean anything."""
    lines = ["solver            calls  steps  counted   seconds        RMSE   PSNR dB"]
    for row, psnr in zip(rows, decibels):
        blurred = "  within the reference's own error" if row.rmse < 3 * reference_error else ""
        counts = f"{row.solver:16s} {row.budget:6d} {row.steps:6d} {row.nfe:8d}"
        lines.append(f"{counts} {row.seconds:9.3f} {row.rmse:11.5f} {psnr:9.2f}{blurred}")
    lines.append(f"reference: RK4, {reference_steps} steps; {reference_error:.2g} RMSE from the same with half as many")
    return "\n".join(lines)
