"""The solvers by the names that nodes and benches use, with what each costs and which order it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import input_error
from .multistep import sample_ab2
from .solvers import sample_euler, sample_heun, sample_midpoint, sample_rf_solver, sample_rk4

__all__ = ["LAST_STEP", "SOLVERS", "Solver", "ode_solver"]

LAST_STEP = ("euler", "exact")


@dataclass(frozen=True)
class Solver:
    """order: of the global error; nfe_per_step: model evaluations; options: keyword options beside the common arguments."""

    function: Callable
    order: int
    nfe_per_step: int
    options: tuple[str, ...] = ()

    def nfe(self, steps: int) -> int:
        """Evaluations of a run that does not touch sigma 0 with a late stage."""
        return steps * self.nfe_per_step


SOLVERS: MappingProxyType[str, Solver] = MappingProxyType({
    "euler": Solver(sample_euler, 1, 1),
    "midpoint": Solver(sample_midpoint, 2, 2),
    "heun": Solver(sample_heun, 2, 2, ("last_step",)),
    "rk4": Solver(sample_rk4, 4, 4, ("last_step",)),
    "ab2": Solver(sample_ab2, 2, 1),
    "rf_solver": Solver(sample_rf_solver, 2, 2, ("derivative", "probe")),
})


def ode_solver(name: str, **options) -> tuple[Callable, dict]:
    """The function of a solver and those of `options` that it takes; the others have no meaning for it."""
    if name not in SOLVERS:
        raise input_error("ode_solver", "solver", name, ", ".join(SOLVERS), "Pick one of them.")
    solver = SOLVERS[name]
    return solver.function, {key: value for key, value in options.items() if key in solver.options}
