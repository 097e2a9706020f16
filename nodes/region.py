"""Region palette: only part of the picture's tokens goes through the model at most steps."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, boolean, choice, integer, number, socket, text

GROUP = "region"
_STATE = socket("state", "RAS_STATE", "From Region-Adaptive Sampling.")
_AFTER = socket("after", "LATENT", "The output of the sampler that took the model: this node waits for it.")


def _last(state, where: str):
    """The record of the last run, or the error that says how to get one."""
    if state.last is None:
        remedy = "Link the node's own model to the sampler, and the sampler's output to 'after'."
        raise input_error(where, "state", "a model that has not run", "the state of a model that was sampled", remedy)
    return state.last


class RectiflowRegionAdaptiveSampling(Node):
    """Computes only some tokens of the picture at most steps; the others keep the velocity they had (RAS)."""

    TITLE = "Region-Adaptive Sampling"
    GROUP = GROUP
    SEARCH_ALIASES = ["RAS", "region", "speed", "accelerate", "token", "faster"]
    INPUTS = (
        socket("model", "MODEL", "A Flux, Chroma, SD3, Lumina 2, Qwen-Image or Wan model, after LoRA and other patches."),
        number("sample_ratio", 0.5, 0.05, 1.0, "Share of the tokens that is computed. 1 is off; below 0.25 fine detail suffers."),
        integer("start_step", 4, 0, 1000, "Steps before this one compute everything; below 3 the layout changes."),
        integer("end_step", 1000, 0, 1000, "From this step on everything is computed again."),
        text("reset_steps", "12, 22", "Steps that compute everything in between, so that errors do not pile up."),
        choice("metric", ("std", "l2norm", "random", "change"),
            "What tokens are ranked by: deviation or length of their velocity, or, change, how far it should have moved by now; focus "
            "is not asked then, starvation 0 and no resets are best.",
        ),
        choice("focus", ("low_std", "high_std", "reference"),
            "Which end is computed: low_std is the main subject, as the paper observes; reference is the published code's rule.",
        ),
        number("starvation", 0.1, 0.0, 4.0, "How strongly a token is pulled back each time it was left out. 0: never; 1: almost in turns."),
        choice("kv_cache", ("full", "none"),
            "full: computed tokens attend to the whole picture by kept keys and values. none: to each other only; no memory.",
        ),
        number("high_ratio", 1.0, 0.0, 1.0, "focus reference only: share of what is left out that is of the high end.", advanced=True),
        integer("ratio_slope", 0, -1024, 1024, "More tokens left out after each period: more early, fewer late.",
            advanced=True,
        ),
        integer("ratio_period", 0, 0, 64, "Steps of one period; 0 keeps the ratio constant.", advanced=True),
        integer("inactive_order", 0, 0, 2, "Tokens left out repeat their velocity (0), or continue slope (1) or curve (2).", advanced=True),
        integer("cell", 1, 1, 64, "Tokens are chosen in squares of this side; it must divide the grid.", advanced=True),
        choice("kv_dtype", ("same", "bf16", "fp8_e4m3"), "Precision of kept keys and values; same: the model's.", advanced=True),
        choice("kv_device", ("model", "cpu"), "Where they are kept; cpu saves graphics memory, costs a transfer a layer.", advanced=True),
        integer("max_mib", 16384, 1, 1048576, "At most this much for keys and values; above it the run stops and says what is needed. MiB.",
            advanced=True,
        ),
        boolean("overlay", True, "Dim the tokens that are left out in the sampler's preview picture.", advanced=True),
        socket("region_mask", "MASK", "Tokens that are computed at every step, such as a face.", optional=True),
    )
    OUTPUTS = (
        Output("MODEL", "model", "The same model, computed in part."),
        Output("RAS_STATE", "state", "For the map and the report; it is filled while sampling."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}  # the graph cache gives equal nodes one output; each needs a state of its own

    def run(
        self, model, sample_ratio, start_step, end_step, reset_steps, metric, focus, starvation, kv_cache, high_ratio, ratio_slope,
        ratio_period, inactive_order, cell, kv_dtype, kv_device, max_mib, overlay, region_mask=None, unique_id=None,
    ):  # fmt: skip
        import torch

        from ..accel.region.binding import attach
        from ..accel.region.plan import KVOptions, RegionPlan
        from ..accel.region.report import RegionLog
        from ..accel.region.schedule import parse_steps

        dtypes = {"same": None, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
        plan = RegionPlan(
            ratio=sample_ratio, start=start_step, end=end_step, resets=parse_steps(reset_steps, self.TITLE), metric=metric, focus=focus,
            high_ratio=high_ratio, starvation=starvation, slope=ratio_slope, period=ratio_period, order=inactive_order, cell=cell,
            kv=KVOptions(kv_cache, dtypes[kv_dtype], kv_device, max_mib << 20), always=region_mask, overlay=overlay,
        )  # fmt: skip
        log = RegionLog()
        return (attach(model, plan, log, self.TITLE), log)


class RectiflowRegionSchedule(Node):
    """Start and reset steps of region-adaptive sampling from shares of a run, so that they move with the number of steps."""

    TITLE = "Region Schedule from Percent"
    GROUP = GROUP
    SEARCH_ALIASES = ["RAS", "schedule", "reset steps"]
    INPUTS = (
        integer("steps", 28, 1, 1000, "Steps of the run, as the sampler has them."),
        number("start_percent", 0.14, 0.0, 1.0, "Share of the run before tokens are left out; 0.14 of 28 is step 4."),
        text("reset_percents", "0.43, 0.73", "Shares at which everything is computed once."),
        number("sample_ratio", 0.5, 0.05, 1.0, "Average share of the tokens, for the table."),
        integer("width", 1024, 16, 16384, "Picture width in pixels, for the table.", step=8),
        integer("height", 1024, 16, 16384, "Picture height in pixels, for the table.", step=8),
        integer("token_pixels", 16, 1, 128, "Pixels of a token's side: 16 for Flux, SD3 and Lumina 2, 8 for the tiny model."),
        integer("ratio_slope", 0, -1024, 1024, "As in Region-Adaptive Sampling.", advanced=True),
        integer("ratio_period", 0, 0, 64, "As in Region-Adaptive Sampling.", advanced=True),
    )
    OUTPUTS = (
        Output("INT", "start_step", "For Region-Adaptive Sampling."),
        Output("STRING", "reset_steps", "For Region-Adaptive Sampling."),
        Output("STRING", "table", "Tokens computed at each step, and their share of the whole run."),
    )

    def run(self, steps, start_percent, reset_percents, sample_ratio, width, height, token_pixels, ratio_slope, ratio_period):
        from ..accel.region.schedule import drop_counts, steps_from_percent

        start, resets = steps_from_percent(steps, start_percent, reset_percents, self.TITLE)
        tokens = -(-width // token_pixels) * -(-height // token_pixels)
        counts = [tokens - drop for drop in drop_counts(tokens, steps, sample_ratio, start, steps, resets, ratio_slope, ratio_period)]
        head = f"{tokens} tokens, {steps} steps: {sum(counts) / (tokens * steps):.1%} of all tokens' evaluations"
        table = "\n".join([head, *(f"step {step}: {count}" for step, count in enumerate(counts))])
        return (start, ", ".join(map(str, resets)), table)


class RectiflowRegionActiveMap(Node):
    """How often each token of the picture was computed in the last run, as a picture; bright is often."""

    TITLE = "Region Active Map"
    GROUP = GROUP
    SEARCH_ALIASES = ["RAS", "heat map", "active tokens"]
    INPUTS = (
        _STATE, _AFTER,
        integer("size", 512, 16, 8192, "Longer side of the picture in pixels."),
        choice("show", ("share", "every step"), "share: one map a picture. every step: all steps side by side, computed tokens white."),
    )  # fmt: skip
    OUTPUTS = (
        Output("IMAGE", "image", "One picture for each of the batch."),
        Output("STRING", "text", "Tokens computed at each step."),
        Output("MASK", "mask", "The share itself, 0 to 1, at the size of the image."),
    )

    def run(self, state, after, size, show):
        from ..accel.region.heat_map import share_map, step_sheet

        record = _last(state, self.TITLE)
        image, mask = (share_map if show == "share" else step_sheet)(record, size)
        text = "\n".join(f"step {step}: {', '.join(str(int(row.sum())) for row in active)}" for step, active in record.masks)
        return (image, text, mask)


class RectiflowRegionReport(Node):
    """Reads what region-adaptive sampling did in the last run: tokens, seconds and reasons of every step, and memory."""

    TITLE = "Region Report"
    GROUP = GROUP
    SEARCH_ALIASES = ["RAS", "speed", "tokens"]
    INPUTS = (_STATE, _AFTER)
    OUTPUTS = (
        Output("STRING", "text", "To read; link it to Preview Any."),
        Output("STRING", "json", "Every visit with step, sigma, phase and tokens, for other programs."),
        Output("FLOAT", "share", "Share of all tokens' evaluations that was computed, 0 to 1."),
    )

    def run(self, state, after):
        record = _last(state, self.TITLE)
        return (record.text(), state.json(), record.share)
