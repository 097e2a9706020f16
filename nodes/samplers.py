"""Samplers palette: solvers of the flow as SAMPLER parts for SamplerCustom and SamplerCustomAdvanced."""

from __future__ import annotations

from .declare import Node, Output, choice, number

GROUP = "samplers"
_START_FROM = choice(
    "start_from", ("noise", "latent"),
    "noise: mix noise into the latent at the first sigma, as usual. latent: the latent already is the state at the first sigma, "
    "for example an inverted picture.",
)


def _sampler(function, options: dict, start_from: str):
    from ..host import KSAMPLER
    from ..samplers.sampler_object import FlowSampler

    return (FlowSampler(KSAMPLER(function, options), start_from),)


class RectiflowRFSolverSampler(Node):
    """RF-Solver: a second-order Taylor step of the flow, two model calls a step. Falling sigmas sample, rising sigmas invert."""

    TITLE = "RF-Solver Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["rf solver", "taming rectified flow", "midpoint", "inversion"]
    INPUTS = (
        choice("derivative", ("midpoint", "fixed_probe"),
            "midpoint: the released form, second order. fixed_probe: a probe of fixed length, first order once steps are as short "
            "as it.",
        ),
        number("probe", 0.01, 1e-4, 0.1,
            "Length of the fixed probe in sigma; shortened to the step. midpoint does not use it.", step=0.001, advanced=True,
        ),
        _START_FROM,
    )
    OUTPUTS = (Output("SAMPLER", "sampler", "For SamplerCustom or SamplerCustomAdvanced."),)

    def run(self, derivative: str, probe: float, start_from: str):
        from ..samplers.solvers import sample_rf_solver

        return _sampler(sample_rf_solver, {"derivative": derivative, "probe": probe}, start_from)


class RectiflowFlowODESampler(Node):
    """A classical solver of the flow's ODE. Falling sigmas sample, rising sigmas invert; sigma 0 and 1 are ordinary points."""

    TITLE = "Flow ODE Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["euler", "heun", "midpoint", "adams bashforth", "runge kutta", "solver"]
    INPUTS = (
        choice("solver", ("euler", "midpoint", "heun", "rk4", "ab2"),
            "Model calls a step: euler 1, midpoint 2, heun 2, rk4 4, ab2 1 (second order from the previous step's velocity).",
        ),
        _START_FROM,
        choice("last_step", ("euler", "exact"),
            "heun and rk4 only, when the schedule ends at 0. euler: no call at sigma 0. exact: the solver's own rule, with one "
            "call just above 0.", advanced=True,
        ),
    )
    OUTPUTS = (Output("SAMPLER", "sampler", "For SamplerCustom or SamplerCustomAdvanced."),)

    def run(self, solver: str, start_from: str, last_step: str):
        from ..samplers.registry import ode_solver

        function, options = ode_solver(solver, last_step=last_step)
        return _sampler(function, options, start_from)
