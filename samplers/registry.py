"""The solvers by the names that nodes and benches use, with what each costs and which order it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from ..errors import input_error
from .adaptive import sample_adaptive
from .multistep import sample_ab2, sample_ab3, sample_dpmpp_2m, sample_fireflow, sample_unipc
from .solvers import sample_euler, sample_heun, sample_midpoint, sample_rf_solver, sample_rk4

__all__ = ["ADAPTIVE", "LAST_STEP", "SOLVERS", "Solver", "ode_solver"]

LAST_STEP = ("euler", "exact")


@dataclass(frozen=True)
class Solver:
    """order: of the global error; nfe_per_step: model evaluations, with extra_nfe more once a run; options: keyword options beside the
    common arguments; from_zero: whether the order holds on schedules that touch sigma 0."""

    function: Callable
    order: int
    nfe_per_step: int
    options: tuple[str, ...] = ()
    extra_nfe: int = 0
    from_zero: bool = True

    def nfe(self, steps: int) -> int:
        """Evaluations of a run that does not touch sigma 0 with a late stage."""
        return steps * self.nfe_per_step + (self.extra_nfe if steps else 0)


SOLVERS: MappingProxyType[str, Solver] = MappingProxyType({
    "euler": Solver(sample_euler, 1, 1),
    "midpoint": Solver(sample_midpoint, 2, 2),
    "heun": Solver(sample_heun, 2, 2, ("last_step",)),
    "rk4": Solver(sample_rk4, 4, 4, ("last_step",)),
    "ab2": Solver(sample_ab2, 2, 1),
    "ab3": Solver(sample_ab3, 3, 1, extra_nfe=1),
    "fireflow": Solver(sample_fireflow, 2, 1, extra_nfe=1),
    "dpmpp_2m_tau": Solver(partial(sample_dpmpp_2m, clock="tau"), 2, 1, from_zero=False),
    "dpmpp_2m_lambda": Solver(partial(sample_dpmpp_2m, clock="lambda"), 2, 1, from_zero=False),
    "unipc": Solver(sample_unipc, 3, 1, from_zero=False),
    "rf_solver": Solver(sample_rf_solver, 2, 2, ("derivative", "probe")),
})


# Chooses its own steps, so neither an order over a grid nor a count a step describes it.
ADAPTIVE = Solver(sample_adaptive, 3, 3, ("rtol", "atol", "max_nfe"))


def ode_solver(name: str, **options) -> tuple[Callable, dict]:
    """The function of a solver and those of `options` that it takes; the others have no meaning for it."""
    solver = ADAPTIVE if name == "adaptive" else SOLVERS.get(name)
    if solver is None:
        raise input_error("ode_solver", "solver", name, ", ".join([*SOLVERS, "adaptive"]), "Pick one of them.")
    return solver.function, {key: value for key, value in options.items() if key in solver.options}
