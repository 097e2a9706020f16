"""Samplers palette: solvers of the flow as SAMPLER parts for SamplerCustom and SamplerCustomAdvanced."""

from __future__ import annotations

from .declare import Node, Output, boolean, choice, integer, number

GROUP = "samplers"
_SAMPLER = Output("SAMPLER", "sampler", "For SamplerCustom or SamplerCustomAdvanced.")
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
    OUTPUTS = (_SAMPLER,)

    def run(self, derivative: str, probe: float, start_from: str):
        from ..samplers.solvers import sample_rf_solver

        return _sampler(sample_rf_solver, {"derivative": derivative, "probe": probe}, start_from)


class RectiflowFlowODESampler(Node):
    """A classical solver of the flow's ODE. Falling sigmas sample, rising sigmas invert; sigma 0 and 1 are ordinary points."""

    TITLE = "Flow ODE Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["euler", "heun", "midpoint", "adams bashforth", "runge kutta", "solver"]
    INPUTS = (
        choice("solver",
            ("euler", "midpoint", "heun", "rk4", "ab2", "ab3", "fireflow", "dpmpp_2m_tau", "dpmpp_2m_lambda", "unipc"),
            "Model calls a step: midpoint and heun 2, rk4 4, the others 1. Orders: euler 1, rk4 4, ab3 and unipc 3, the others 2.",
        ),
        _START_FROM,
        choice("last_step", ("euler", "exact"),
            "heun and rk4 only, when the schedule ends at 0. euler: no call at sigma 0. exact: the solver's own rule, with one "
            "call just above 0.", advanced=True,
        ),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, solver: str, start_from: str, last_step: str):
        from ..samplers.registry import ode_solver

        function, options = ode_solver(solver, last_step=last_step)
        return _sampler(function, options, start_from)


class RectiflowAdaptiveFlowSampler(Node):
    """Chooses its own steps between the first and the last sigma, so that each errs by no more than the tolerance."""

    TITLE = "Adaptive Flow Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["bogacki shampine", "rk23", "error control", "dopri"]
    INPUTS = (
        number("rtol", 0.01, 1e-6, 1.0, "Error allowed in a step, relative to the state.", step=0.001),
        number("atol", 0.01, 1e-6, 1.0, "Error allowed in a step where the state is near 0.", step=0.001),
        integer("max_nfe", 100, 4, 10000, "At most this many model calls; then the rest is walked in equal steps and a warning says so."),
        _START_FROM,
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, rtol: float, atol: float, max_nfe: int, start_from: str):
        from ..samplers.adaptive import sample_adaptive

        return _sampler(sample_adaptive, {"rtol": rtol, "atol": atol, "max_nfe": max_nfe}, start_from)


class RectiflowFlowSDESampler(Node):
    """Samples with fresh noise in every step, in amounts that keep the distribution at every sigma. eta 0 is Euler."""

    TITLE = "Flow SDE Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["ancestral", "stochastic", "churn", "euler a"]
    INPUTS = (
        number("eta", 0.5, 0.0, 1.0, "Amount of noise: 0 is the plain flow, 1 the full reverse diffusion."),
        choice("form", ("sde", "ancestral", "renoised"),
            "sde: keeps mean and spread. ancestral: ComfyUI's rule, smoother with few steps. renoised: the same with a midpoint "
            "step, which keeps the spread even with few steps and calls the model twice a step.",
        ),
        number("s_noise", 1.0, 0.0, 1.1, "Multiplies the noise; below 1 smooths, above 1 adds grain.", advanced=True),
        number("sigma_lo", 0.0, 0.0, 1.0, "No noise below this sigma.", advanced=True),
        number("sigma_hi", 1.0, 0.0, 1.0, "No noise above this sigma.", advanced=True),
        integer("seed_offset", 0, 0, 2**31 - 1, "Added to the run's seed for this noise, so that it can vary alone.", advanced=True),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, eta, form, s_noise, sigma_lo, sigma_hi, seed_offset):
        from ..samplers.stochastic import sample_ancestral, sample_sde

        options = {"eta": eta, "s_noise": s_noise, "sigma_lo": sigma_lo, "sigma_hi": sigma_hi, "seed_offset": seed_offset}
        if form == "renoised":
            options["solver"] = "midpoint"
        return _sampler(sample_sde if form == "sde" else sample_ancestral, options, "noise")


class RectiflowCarryNoiseSampler(Node):
    """rf++'s few-step rule for reflowed weights: the noise of the start is kept and never estimated again."""

    TITLE = "Carry Noise Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["rf++", "rfpp", "few steps", "reflow"]
    INPUTS = (
        choice("solver", ("euler", "heun"), "euler: one model call a step. heun: two, except in the last step."),
        integer("max_steps", 8, 1, 32, "Longer schedules are refused: with many steps this rule spreads too far."),
        boolean("force", False, "Take longer schedules all the same.", advanced=True),
        _START_FROM,
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, solver: str, max_steps: int, force: bool, start_from: str):
        from ..samplers.stochastic import sample_carry_noise

        return _sampler(sample_carry_noise, {"solver": solver, "max_steps": max_steps, "force": force}, start_from)


class RectiflowOneStepSampler(Node):
    """One model call, one jump to the picture, for distilled one-step weights. Refuses schedules of more than one step."""

    TITLE = "One Step Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["instaflow", "distilled", "1 step"]
    INPUTS = (_START_FROM,)
    OUTPUTS = (_SAMPLER,)

    def run(self, start_from: str):
        from ..samplers.first_order import sample_one_step

        return _sampler(sample_one_step, {}, start_from)


class RectiflowFirstOrderSampler(Node):
    """The DDIM step in noise-to-signal form, exact where the model's noise estimate is constant. For flow and epsilon models alike."""

    TITLE = "First Order Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["ddim", "rectified diffusion", "phased"]
    INPUTS = (
        number("eta", 0.0, 0.0, 1.0, "Fresh noise in every step: 0 none, 1 as much as DDPM."),
        choice("final", ("sigma_min", "zero"), "Where the last step ends: at the model's smallest sigma, as DDIM was trained, or at 0."),
    )
    OUTPUTS = (_SAMPLER,)

    def run(self, eta: float, final: str):
        from ..samplers.first_order import sample_first_order

        return _sampler(sample_first_order, {"eta": eta, "final": final}, "noise")
