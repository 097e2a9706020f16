"""Palette of caches by schedule: record a run, search the steps that matter, replay them; and Δ-DiT, whose range changes with the stage."""

from __future__ import annotations

from .caching import BY_SCHEDULE, CACHE_OUTPUTS, COMMON, LIMITS, MODEL, cached_model
from .declare import Node, Output, boolean, choice, integer, number, socket, text

GROUP = "caching"
TARGETS = ("last_block", "output", "block_delta", "condition")
_GRANULARITY = (
    "last_block: the tokens after the last block. output: the velocity, of any architecture. block_delta: what a range of blocks adds. "
    "condition: what the encoder of a decoupled model (DDT) hands to its decoder."
)
_BLOCKS = "block_delta only: the range, such as double:1-, single. Empty: all blocks."
NO_LIMITS = (0, 0, 0.0, 1.0)  # a schedule says itself which steps are computed
OWN_REPORT = {"unique_id": "UNIQUE_ID"}  # the graph cache gives equal nodes one output; each needs a record of its own


class RectiflowScheduleRecord(Node):
    """Samples uncached and records what a cache would keep at every step, for Schedule Search. A batch of prompts counts as many."""

    TITLE = "Schedule Record"
    GROUP = GROUP
    SEARCH_ALIASES = ["cache calibrate", "calibration", "DDT", "schedule"]
    INPUTS = (
        socket("model", "MODEL", "A model without a cache, after LoRA and other patches."),
        choice("granularity", TARGETS, "What is recorded, and what the schedule is for. " + _GRANULARITY),
        integer("tokens", 128, 16, 65536, "Tokens that are recorded of a feature, a fixed random choice. More is slower and needs memory."),
        integer("max_runs", 8, 1, 64, "So many of the latest runs are kept; a search takes the mean of them."),
        text("blocks", "", _BLOCKS, optional=True, advanced=True),
        integer("probes", 6, 0, 64, "Runs after a recorded one that measure how far an error at a step moves the picture; each takes half "
            "a run in the mean. 0 for none: then weights of the search cannot be amplified.", optional=True,
        ),
    )
    OUTPUTS = (
        Output("MODEL", "model", "The same model; sampling it records."),
        Output("CACHE_RECORDING", "recording", "For Schedule Search."),
    )
    HIDDEN = OWN_REPORT

    def run(self, model, granularity, tokens, max_runs, blocks="", probes=6, unique_id=None):
        from ..accel.cache.recording import RecordOptions, recorder

        policy = recorder(model, granularity, blocks, RecordOptions(tokens, max_runs, probes=probes))
        recorded, _ = cached_model(model, policy, granularity, NO_LIMITS, {"blocks": blocks}, self.TITLE)
        return (recorded, policy.recording)


class RectiflowScheduleSearch(Node):
    """Finds which steps to compute, for a number of them, so that the error of all others is smallest: exact, by dynamic programming."""

    TITLE = "Schedule Search"
    GROUP = GROUP
    SEARCH_ALIASES = ["cache schedule", "optimal steps", "DDT", "dynamic programming"]
    INPUTS = (
        socket("recording", "CACHE_RECORDING", "From Schedule Record."),
        socket("after", "LATENT", "The output of the sampler that took the recorded model: the search waits for it."),
        integer("budget", 0, 0, 1000, "Steps to compute; 0 takes compute_ratio."),
        number("compute_ratio", 0.4, 0.02, 1.0, "Share of the steps to compute. 1 is off; below 0.3 pictures change a lot."),
        integer("order", 1, 0, 4, "Of the forecast: 0 repeats, 1 goes on along a line. Each order needs a schedule of its own."),
        choice("metric", ("rel_l2", "rel_l1", "cosine", "guided"),
            "How an error is measured. guided: that of the guided velocity, best for pictures. cosine ignores size, as DDT does.",
            default="guided",
        ),
        choice("weights", ("none", "dsigma", "amplified"),
            "dsigma: errors count by the length of their step in sigma. amplified: also by how far they move the picture; it needs probes.",
            default="amplified",
        ),
        integer("max_skips", 0, 0, 1000, "At most so many steps in a row are forecast; 0 for any number.", advanced=True),
        integer("first_steps", 1, 1, 1000, "Steps at the start that are computed in any case.", advanced=True),
        integer("last_steps", 0, 0, 1000, "Steps at the end that are computed in any case.", advanced=True),
        boolean("fitted", True, "For order 1: how far each forecast goes along its line is fitted to the recording; off: all the way.",
            optional=True,
        ),
    )
    OUTPUTS = (
        Output("STRING", "schedule", "For Schedule Cache: a text that can be kept in a workflow."),
        Output("STRING", "text", "To read; link it to Preview Any."),
        Output("IMAGE", "steps", "The error of every step, under this schedule and under even steps."),
        Output("IMAGE", "costs", "What each number of computed steps would cost."),
    )

    def run(
        self, recording, after, budget, compute_ratio, order, metric, weights, max_skips, first_steps, last_steps, fitted=True,
    ):  # fmt: skip
        from ..accel.cache.schedule_search import SearchOptions, search_schedule
        from ..accel.cache.schedule_sheet import cost_chart, schedule_table, step_chart

        steps = recording.whole_runs(self.TITLE)[-1].steps
        budget = budget or max(1, round(compute_ratio * steps))
        options = SearchOptions(
            budget, order, metric=metric, weights=weights, longest=max_skips, first=first_steps, last=last_steps, fitted=fitted,
        )  # fmt: skip
        found = search_schedule(recording, options, self.TITLE)
        return (found.schedule.json(), schedule_table(found), step_chart(found), cost_chart(found))


class RectiflowManualSchedule(Node):
    """Writes a schedule by hand: the numbers of the steps to compute, a 0 or 1 a step, or "every 4 after 3"."""

    TITLE = "Manual Schedule"
    GROUP = GROUP
    SEARCH_ALIASES = ["cache schedule", "mask", "steps"]
    INPUTS = (
        socket("sigmas", "SIGMAS", "The sigmas that go to the sampler."),
        text("text", "every 3 after 2", "Such as 0,3,6 or 1,1,0,1 (a 0 or 1 a step) or every 4 after 3. Step 0 is always computed."),
    )
    OUTPUTS = (Output("STRING", "schedule", "For Schedule Cache."),)

    def run(self, sigmas, text):
        from ..accel.cache.schedule import manual_schedule

        return (manual_schedule(text, sigmas.tolist(), self.TITLE).json(),)


class RectiflowScheduleCache(Node):
    """Computes the steps of a schedule and forecasts the others as it was made for; runs of another length take the nearest sigmas."""

    TITLE = "Schedule Cache"
    GROUP = GROUP
    SEARCH_ALIASES = ["cache", "speed", "accelerate", "DDT", "encoder sharing", "scheduled reuse"]
    INPUTS = (
        MODEL,
        text("schedule", "", "The text of Schedule Search or Manual Schedule.", multiline=True),
        choice("granularity", ("as recorded", *TARGETS), "What is forecast. " + _GRANULARITY, advanced=True),
        integer("order", -1, -1, 4, "Order of the forecast; -1 as the schedule was searched for.", advanced=True),
        *COMMON,
    )
    OUTPUTS = CACHE_OUTPUTS
    HIDDEN = OWN_REPORT

    def run(self, model, schedule, granularity, order, unique_id=None, **common):
        from ..accel.cache.schedule import read_schedule
        from ..accel.cache.scheduled import ScheduledCache

        found = read_schedule(schedule, self.TITLE)
        if granularity == "as recorded":
            granularity, common["blocks"] = found.target or "last_block", found.blocks
        return cached_model(model, ScheduledCache.of(found, order), granularity, NO_LIMITS, {**common, "schedule": found}, self.TITLE)


class RectiflowDeltaBlockCache(Node):
    """Leaves a range of blocks out and adds what it added at the last computed step: rear blocks early, front blocks late (Δ-DiT)."""

    TITLE = "Delta Block Cache"
    GROUP = GROUP
    SEARCH_ALIASES = ["Delta-DiT", "cache", "speed", "accelerate", "blocks"]
    INPUTS = (
        socket("model", "MODEL", "A model whose blocks can be patched, such as Flux, SD3, Qwen-Image, Wan; one cache node a model."),
        integer("interval", 2, 1, 50, "One step in this many is computed whole. 1 is off; above 3 pictures lose detail."),
        number("boundary", 0.6, 0.0, 1.0, "Share of the run's steps, at its end, that count as late."),
        integer("boundary_steps", -1, -1, 1000, "The same as a number of steps; -1 takes boundary.", advanced=True),
        integer("block_count", 0, 0, 200, "Blocks to leave out; 0 takes blocks_ratio."),
        number("blocks_ratio", 0.75, 0.0, 1.0, "Share of the blocks to leave out. More is faster and changes more."),
        choice("early_range", ("rear", "front", "middle", "all", "none"), "Which blocks are left out in the early steps."),
        choice("late_range", ("rear", "front", "middle", "all", "none"), "Which blocks are left out in the late steps.", default="front"),
        integer("order", 0, 0, 3, "0 holds what the range adds, as published; 1 continues its slope.", advanced=True),
        integer("warmup_steps", 1, 1, 100, "First steps that are always computed."),
        integer("tail_steps", 0, 0, 100, "Last steps that are always computed."),
        boolean("keep_both", True, "Keep what both ranges add at every computed step; off saves memory and computes the first late step.",
            advanced=True,
        ),
        *LIMITS,
        *(declared for declared in COMMON if declared.name != "blocks"),
        BY_SCHEDULE,
    )
    OUTPUTS = CACHE_OUTPUTS
    HIDDEN = OWN_REPORT

    def run(
        self, model, interval, boundary, boundary_steps, block_count, blocks_ratio, early_range, late_range, order, warmup_steps,
        tail_steps, keep_both, start_percent, end_percent, unique_id=None, schedule="", **common,
    ):  # fmt: skip
        from ..accel.cache.delta_dit import DeltaDiT

        policy = DeltaDiT(
            order, interval=max(interval, 2) if schedule.strip() else interval, boundary=boundary, boundary_steps=boundary_steps,
            blocks=block_count, ratio=blocks_ratio, early=early_range, late=late_range, keep_both=keep_both,
        )  # fmt: skip
        limits = (warmup_steps, tail_steps, start_percent, end_percent)
        return cached_model(model, policy, "block_delta", limits, common, self.TITLE, schedule)
