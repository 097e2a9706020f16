"""Gated caching palette: caches that look at each step before they skip it, and the runs that find their thresholds and curves."""

from __future__ import annotations

from ..errors import input_error
from .caching import CACHE_OUTPUTS, COMMON, GROUP, LIMITS, MODEL, WARMUP, cached_model
from .declare import Node, Output, choice, integer, number, socket, text

_WITHOUT_OWN = tuple(declared for declared in COMMON if declared.name not in ("blocks", "max_consecutive"))
_CONSECUTIVE = "At most so many steps skipped in a row; -1: no bound."
_REDUCE_HELP = "Which image of a batch decides: the one that changed most, or their mean."
_REDUCE = choice("gate_reduce", ("max_over_batch", "mean"), _REDUCE_HELP, advanced=True)
_GATE = choice("gate", ("hidden", "residual"), "Compare the first block's tokens (the paper), or what it adds to them: more sensitive.")


class RectiflowConfidenceGatedTaylor(Node):
    """Computes the first block of every step; where its forecast proves right, the rest of the model is forecast too (CG-Taylor)."""

    TITLE = "Confidence-Gated Taylor"
    GROUP = GROUP
    SEARCH_ALIASES = ["CG-Taylor", "TaylorSeer", "cache", "speed", "accelerate", "adaptive"]
    INPUTS = (
        MODEL,
        number("threshold", 0.08, 0.0, 2.0, "A step is forecast while the first block's is off by less than this share. 0 is off; "
            "0.03 changes little, 0.15 a lot.", step=0.001,
        ),
        integer("last_order", 1, 0, 3, "Degree of the forecast of the last block. 0 repeats; above 1 noise is amplified."),
        integer("first_order", 1, 0, 3, "Degree of the forecast that the first block is compared with."),
        integer("warmup_steps", 4, 1, 100, WARMUP),
        integer("tail_steps", 1, 0, 100, "Last steps that are always computed; they draw fine detail."),
        integer("max_consecutive", -1, -1, 100, _CONSECUTIVE),
        _GATE,
        _REDUCE,
        choice("err_mode", ("instant", "accumulated"), "instant: a step's own error. accumulated: the sum since the last computed one.",
            advanced=True,
        ),
        choice("basis", ("newton", "reference"), "newton: exact for polynomials. reference: as the paper's code. Same up to order 1."),
        integer("subsample", 1, 1, 16, "Compare every so many tokens only; keeps less memory.", advanced=True),
        *LIMITS,
        *_WITHOUT_OWN,
        socket("schedule", "CACHE_SCHEDULE", "Steps that are computed whatever the gate says.", optional=True),
    )  # fmt: skip
    OUTPUTS = CACHE_OUTPUTS
    HIDDEN = {"unique_id": "UNIQUE_ID"}

    def run(
        self, model, threshold, last_order, first_order, warmup_steps, tail_steps, max_consecutive, gate, gate_reduce, err_mode, basis,
        subsample, start_percent, end_percent, unique_id=None, **common,
    ):  # fmt: skip
        from ..accel.cache.confidence import ConfidenceGatedTaylor

        policy = ConfidenceGatedTaylor(
            order=last_order, basis=basis, threshold=threshold, first_order=first_order, gate=gate, reduce=gate_reduce, error_mode=err_mode,
            stride=subsample,
        )  # fmt: skip
        limits = (warmup_steps, tail_steps, start_percent, end_percent)
        return cached_model(model, policy, "last_block", limits, {**common, "max_consecutive": max_consecutive}, self.TITLE)


class RectiflowGateCalibrate(Node):
    """Samples without skipping and notes how well the first block's forecast tells the last block's error: to choose a threshold."""

    TITLE = "Gate Calibrate"
    GROUP = GROUP
    SEARCH_ALIASES = ["CG-Taylor", "threshold", "cache", "probe", "calibrate"]
    INPUTS = (
        MODEL,
        text("thresholds", "0.02, 0.05, 0.1, 0.2", "Thresholds to try on what is noted."),
        integer("last_order", 1, 0, 3, "As in Confidence-Gated Taylor."),
        integer("first_order", 1, 0, 3, "As in Confidence-Gated Taylor."),
        integer("warmup_steps", 4, 1, 100, "Steps before the first one that is noted."),
        _GATE,
        _REDUCE,
    )
    OUTPUTS = (
        Output("MODEL", "model", "The same model; its pictures are unchanged."),
        Output("CACHE_REPORT", "report", "For Cache Report: steps below each threshold, and the correlation of the two errors."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}

    def run(self, model, thresholds, last_order, first_order, warmup_steps, gate, gate_reduce, unique_id=None):
        from ..accel.cache.calibration import GateCalibration, read_curve
        from ..accel.cache.confidence import ConfidenceGatedTaylor

        gated = ConfidenceGatedTaylor(order=last_order, first_order=first_order, gate=gate, reduce=gate_reduce)
        tried = read_curve(thresholds, self.TITLE, "thresholds")
        policy = GateCalibration(order=last_order, gated=gated, thresholds=tried, warmup=warmup_steps)
        return cached_model(model, policy, "last_block", (0, 0, 0.0, 1.0), {}, self.TITLE)


class RectiflowReuseCache(Node):
    """Repeats the model's last answer while a cheap sign says that little has changed. Four rules: see the help page."""

    TITLE = "Reuse Cache"
    GROUP = GROUP
    SEARCH_ALIASES = ["TeaCache", "First Block Cache", "FBCache", "WaveSpeed", "EasyCache", "MagCache", "cache", "speed", "accelerate"]
    INPUTS = (
        MODEL,
        choice("rule", ("first_block", "modulated_input", "input_change", "magnitude"),
            "first_block (FBCache): what the first block adds. modulated_input (TeaCache): what enters it. "
            "input_change (EasyCache): the latent, any architecture. magnitude (MagCache): a measured list in curve.",
        ),
        number("threshold", 0.1, 0.0, 5.0, "Skip while the rule's number is below this. 0 is off; each rule has its own scale.",
            step=0.001,
        ),
        integer("max_consecutive", 3, -1, 100, _CONSECUTIVE),
        integer("warmup_steps", 1, 0, 100, WARMUP),
        integer("tail_steps", 1, 0, 100, "Last steps that are always computed; they draw fine detail."),
        *LIMITS,
        text("curve", "", "modulated_input: coefficients, highest power first, empty for none. magnitude: ratios, one a step. "
            "From Reuse Curve.",
        ),
        integer("forecast_order", 0, 0, 2, "0 repeats. 1 and 2 continue the slope of what is kept, at more memory."),
        *_WITHOUT_OWN,
        choice("gate_reduce", ("max_over_batch", "mean"), _REDUCE_HELP, optional=True, advanced=True),
    )  # fmt: skip
    OUTPUTS = CACHE_OUTPUTS
    HIDDEN = {"unique_id": "UNIQUE_ID"}

    def run(
        self, model, rule, threshold, max_consecutive, warmup_steps, tail_steps, start_percent, end_percent, curve, forecast_order,
        gate_reduce="max_over_batch", unique_id=None, **common,
    ):  # fmt: skip
        from ..accel.cache.calibration import read_curve
        from ..accel.cache.first_block import FirstBlockGate
        from ..accel.cache.input_change import InputChangeGate
        from ..accel.cache.magnitude import MagnitudeRule
        from ..accel.cache.modulated import ModulatedInputGate

        numbers = read_curve(curve, self.TITLE)
        if numbers and rule in ("first_block", "input_change"):
            remedy = "Clear the curve, or choose modulated_input or magnitude."
            raise input_error(self.TITLE, "curve", f"{len(numbers)} numbers", f"nothing with the rule {rule}", remedy)
        given = {"order": forecast_order, "threshold": threshold}
        policy = {
            "first_block": lambda: FirstBlockGate(**given, reduce=gate_reduce),
            "modulated_input": lambda: ModulatedInputGate(**given, reduce=gate_reduce, coefficients=numbers),
            "input_change": lambda: InputChangeGate(**given, reduce=gate_reduce),
            "magnitude": lambda: MagnitudeRule(**given, ratios=numbers),
        }[rule]()
        granularity = "output" if rule == "input_change" else "block_delta"
        limits = (warmup_steps, tail_steps, start_percent, end_percent)
        return cached_model(model, policy, granularity, limits, {**common, "max_consecutive": max_consecutive}, self.TITLE)


class RectiflowReuseCalibrate(Node):
    """Samples without skipping and notes what Reuse Curve makes curves of, for the rules modulated_input and magnitude."""

    TITLE = "Reuse Calibrate"
    GROUP = GROUP
    SEARCH_ALIASES = ["MagCache", "TeaCache", "polynomial", "calibrate", "cache"]
    INPUTS = (MODEL,)
    OUTPUTS = (
        Output("MODEL", "model", "The same model; its pictures are unchanged."),
        Output("CACHE_REPORT", "report", "For Reuse Curve; it holds the last eight runs."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}

    def run(self, model, unique_id=None):
        from ..accel.cache.calibration import ReuseCalibration

        return cached_model(model, ReuseCalibration(), "block_delta", (0, 0, 0.0, 1.0), {}, self.TITLE)


class RectiflowReuseCurve(Node):
    """Makes the curves of Reuse Cache from calibrated runs: magnitude ratios, averaged over the runs, and a polynomial."""

    TITLE = "Reuse Curve"
    GROUP = GROUP
    SEARCH_ALIASES = ["MagCache", "TeaCache", "polynomial", "calibrate", "cache"]
    INPUTS = (
        socket("report", "CACHE_REPORT", "From Reuse Calibrate."),
        socket("after", "LATENT", "The output of the sampler that took the calibrated model: the curves wait for it."),
        integer("degree", 4, 1, 8, "Of the polynomial."),
    )
    OUTPUTS = (
        Output("STRING", "ratios", "For Reuse Cache's curve with rule magnitude: one a step."),
        Output("STRING", "polynomial", "For Reuse Cache's curve with rule modulated_input: highest power first."),
    )

    def run(self, report, after, degree):
        from ..accel.cache.calibration import fit_polynomial, mean_ratios

        runs = [run.findings for run in report.runs if run.finished and "ratios" in run.findings]
        if not runs:
            remedy = "Link Reuse Calibrate's model to the sampler, and the sampler's output to 'after'."
            raise input_error(self.TITLE, "report", "a report without measured ratios", "one of Reuse Calibrate after sampling", remedy)
        pairs = [pair for run in runs for pair in run["changes"]]
        found = mean_ratios([run["ratios"] for run in runs]), fit_polynomial(pairs, degree, self.TITLE)
        return tuple(", ".join(f"{number:.6g}" for number in numbers) for numbers in found)
