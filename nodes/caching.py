"""Caching palette: part of the model's work is forecast from earlier steps instead of done, and a report says what that gave."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, choice, integer, number, socket, text

GROUP = "caching"
MODEL = socket("model", "MODEL", "Any flow model, after LoRA and other patches; one cache node a model.")
WARMUP = "First steps that are always computed."
TAIL = integer("tail_steps", 1, 0, 100, "Last steps that are always computed; they draw fine detail.")
TARGETS = ("last_block", "output", "block_delta")
GRANULARITY_HELP = (
    "last_block: forecast the tokens after the last block. output: forecast the model's velocity, works with every architecture. "
    "block_delta: forecast what a range of blocks adds."
)
GRANULARITY = choice("granularity", TARGETS, GRANULARITY_HELP)
BY_SCHEDULE = text("schedule", "", "The text of Schedule Search or Manual Schedule, in place of interval. Empty: by interval.",
    optional=True, advanced=True,
)  # fmt: skip
LIMITS = (
    number("start_percent", 0.0, 0.0, 1.0, "Forecasts only from this share of the run's own steps on.", advanced=True),
    number("end_percent", 1.0, 0.0, 1.0, "Forecasts only before this share of the run's own steps.", advanced=True),
)
COMMON = (
    choice("store_dtype", ("same", "fp32", "bf16", "fp16"), "Precision of what is kept; same: the model's.", optional=True, advanced=True),
    choice("store_device", ("model", "cpu"), "Where it is kept; cpu saves graphics memory and costs a transfer a step.",
        optional=True, advanced=True,
    ),
    integer("max_mib", 4096, 1, 1048576, "At most this much memory; above it the order is lowered, then the cache is off. MiB.",
        optional=True, advanced=True,
    ),
    text("blocks", "", "block_delta only: the range, such as double:1-, single. Empty: all blocks.", optional=True, advanced=True),
    integer("max_consecutive", -1, -1, 100, "At most so many steps forecast in a row; -1: no bound.", optional=True, advanced=True),
    choice("solver_rule", ("all", "first_only"), "first_only: a step's second evaluation (Heun, RF-Solver) is always computed.",
        optional=True, advanced=True,
    ),
)
CACHE_OUTPUTS = (
    Output("MODEL", "model", "The same model, cached."),
    Output("CACHE_REPORT", "report", "For Cache Report; it is filled while sampling."),
)


def cached_model(model, policy, granularity: str, limits: tuple, common: dict, where: str, schedule: str = ""):
    """(MODEL, CACHE_REPORT) of a policy. limits: warm-up, tail, start, end; common: what was given of COMMON's inputs, and "schedule", a
    CacheSchedule; schedule: the text of one."""
    import torch

    from ..accel.cache.binding import attach
    from ..accel.cache.policy import Limits
    from ..accel.cache.report import CacheLog
    from ..accel.cache.schedule import read_schedule
    from ..accel.cache.store import StoreOptions
    from ..accel.cache.visits import CachePlan
    from ..host import running_prompt

    given = {declared.name: declared.options["default"] for declared in COMMON} | common
    dtypes = {"same": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    store = StoreOptions(dtypes[given["store_dtype"]], given["store_device"], given["max_mib"] << 20)
    log = CacheLog(running_prompt)
    bounds = Limits(*limits, given["max_consecutive"], given["solver_rule"])
    found = read_schedule(schedule, where) if schedule.strip() else given.get("schedule")
    plan = CachePlan(policy, granularity, bounds, store, given["blocks"], found)
    return (attach(model, plan, log, where), log)


class RectiflowTaylorForecastCache(Node):
    """Computes every N-th step of a model and forecasts the others by a polynomial through the computed ones (TaylorSeer)."""

    TITLE = "Taylor Forecast Cache"
    GROUP = GROUP
    SEARCH_ALIASES = ["TaylorSeer", "cache", "speed", "accelerate", "faster"]
    INPUTS = (
        MODEL,
        integer("interval", 6, 1, 50, "One step in this many is computed. 1 is off; 2 changes little, 6 and more a lot."),
        integer("order", 1, 0, 4, "Degree of the polynomial. 0 repeats; above 2 noise is amplified over long intervals."),
        integer("warmup_steps", 3, 0, 100, WARMUP),
        TAIL,
        choice("granularity", (*TARGETS, "modules", "condition"), GRANULARITY_HELP + " modules: forecast every attention and MLP, as "
            "published; Flux and SD3, much memory. condition: forecast what the encoder of a decoupled model (DDT) hands to its decoder.",
        ),
        choice("basis", ("newton", "reference"), "newton: exact for polynomials. reference: as the paper's code. Same up to order 1."),
        choice("axis", ("step", "sigma"), "What the polynomial is in.", advanced=True),
        *LIMITS,
        *COMMON,
        BY_SCHEDULE,
    )
    OUTPUTS = CACHE_OUTPUTS
    HIDDEN = {"unique_id": "UNIQUE_ID"}  # the graph cache gives equal nodes one output; each needs a report of its own

    def run(
        self, model, interval, order, warmup_steps, tail_steps, granularity, basis, axis, start_percent, end_percent,
        unique_id=None, schedule="", **common,
    ):  # fmt: skip
        from ..accel.cache.taylor import TaylorSeer

        policy = TaylorSeer(order, basis, axis, max(interval, 2) if schedule.strip() else interval)
        limits = (warmup_steps, tail_steps, start_percent, end_percent)
        return cached_model(model, policy, granularity, limits, common, self.TITLE, schedule)


class RectiflowIntervalCache(Node):
    """Computes every N-th step of a model and repeats it in between. The plainest cache, to compare others with."""

    TITLE = "Interval Cache"
    GROUP = GROUP
    SEARCH_ALIASES = ["FORA", "cache", "speed", "accelerate", "reuse"]
    INPUTS = (
        MODEL,
        integer("interval", 2, 1, 50, "One step in this many is computed. 1 is off; above 3 pictures lose detail."),
        integer("warmup_steps", 1, 0, 100, WARMUP),
        TAIL,
        GRANULARITY,
        *LIMITS,
        *COMMON,
    )
    OUTPUTS = CACHE_OUTPUTS
    HIDDEN = {"unique_id": "UNIQUE_ID"}

    def run(
        self, model, interval, warmup_steps, tail_steps, granularity, start_percent, end_percent,
        unique_id=None, **common,
    ):  # fmt: skip
        from ..accel.cache.interval import IntervalReuse

        limits = (warmup_steps, tail_steps, start_percent, end_percent)
        return cached_model(model, IntervalReuse(interval=interval), granularity, limits, common, self.TITLE)


class RectiflowCacheReport(Node):
    """Reads what a cache did in the last run: steps computed and forecast and why, model calls, seconds and memory."""

    TITLE = "Cache Report"
    GROUP = GROUP
    SEARCH_ALIASES = ["cache", "hit ratio", "speed"]
    INPUTS = (
        socket("report", "CACHE_REPORT", "From a cache node."),
        socket("after", "LATENT", "The output of the sampler that took the cached model: the report waits for it."),
    )
    OUTPUTS = (
        Output("STRING", "text", "To read; link it to Preview Any."),
        Output("STRING", "json", "Every visit with sigma, decision and reason, for other programs."),
        Output("FLOAT", "hit_ratio", "Share of the conditions' evaluations that was forecast, 0 to 1."),
        Output("INT", "full_calls", "Model calls that were made."),
    )

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")  # read anew in every graph run, which may have taken the sampler's result from an earlier one

    def run(self, report, after):
        last = report.read()
        if last is None:
            remedy = "Link the cache node's own model to the sampler, and the sampler's output to 'after'."
            raise input_error(self.TITLE, "report", "a cache that has not run", "the report of a model that was sampled", remedy)
        return (last.text(), report.json(), last.hit_ratio, last.calls_made)


class RectiflowCacheOff(Node):
    """Takes a cache off a model, whatever node put it on; everything else on the model stays."""

    TITLE = "Cache Off"
    GROUP = GROUP
    SEARCH_ALIASES = ["cache", "remove", "bypass"]
    INPUTS = (socket("model", "MODEL", "A model with or without a cache."),)
    OUTPUTS = (Output("MODEL", "model", "The model without a cache."),)

    def run(self, model):
        from ..accel.cache.binding import detach

        return (detach(model),)
