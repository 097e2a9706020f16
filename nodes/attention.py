"""Attention palette: attention over fewer keys."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, boolean, choice, integer, number, socket, text

GROUP = "attention"
MODEL = "A Flux, Chroma, SD3, Lumina 2, Qwen-Image, HunyuanVideo or Wan model, after LoRA and other patches."
PATTERN = choice("pattern", ("block", "cross", "block_and_cross"),
    "block: groups next to each other, fastest. cross: groups in the same row or column, keeps composition. block_and_cross: both.",
)
GEOMETRY = (
    PATTERN,
    integer("group_height", 16, 2, 64, "Tokens of a group down. A token is 16 pixels in Flux and SD3."),
    integer("group_width", 16, 2, 64, "Tokens of a group across."),
    integer("group_frames", 4, 1, 16, "Latent frames of a group, in clips only."),
    integer("radius", 1, 0, 64, "block: how many groups away a group sees. Enough to see all is dense attention, bit for bit."),
)


class RectiflowGroupedAttention(Node):
    """Lets each group of image tokens see only nearby groups or its row and column (GRAT). Faster from about 2048 pixels a side."""

    TITLE = "Grouped Attention"
    GROUP = GROUP
    SEARCH_ALIASES = ["GRAT", "sparse attention", "high resolution", "speed", "faster"]
    INPUTS = (
        socket("model", "MODEL", MODEL),
        *GEOMETRY,
        number("start_percent", 0.0, 0.0, 1.0, "Grouped only from this share of the run's steps on; the first ones lay out the picture."),
        number("end_percent", 1.0, 0.0, 1.0, "Grouped only before this share of the run's steps."),
        text("blocks", "all", "Which blocks: all, or ranges such as double:0-18, single:0-37.", advanced=True),
        integer("min_tokens", 8192, 0, 1000000, "Below so many tokens attention stays dense. 0: measured on this machine.", advanced=True),
    )
    OUTPUTS = (
        Output("MODEL", "model", "The same model with grouped attention."),
        Output("ATTENTION_REPORT", "report", "For Attention Report; it is filled while sampling."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}  # the graph cache gives equal nodes one output; each needs a report of its own

    def run(
        self, model, pattern, group_height, group_width, group_frames, radius, start_percent, end_percent, blocks, min_tokens,
        unique_id=None,
    ):  # fmt: skip
        from ..accel.attention.grouped import AttentionLog, GroupedAttention, GroupRule, attach_grouped

        log = AttentionLog()
        rule = GroupRule(pattern, (group_frames, group_height, group_width), radius)
        plan = GroupedAttention(rule, log, self.TITLE, start_percent, end_percent, blocks, min_tokens)
        return (attach_grouped(model, plan), log)


class RectiflowGroupedAttentionInfo(Node):
    """Says what Grouped Attention would compute at a size: keys a token sees, share of all pairs, and a map of what one token sees."""

    TITLE = "Grouped Attention Info"
    GROUP = GROUP
    SEARCH_ALIASES = ["GRAT", "sparsity", "attention map"]
    INPUTS = (
        socket("model", "MODEL", "The model to be sampled."),
        socket("latent", "LATENT", "A latent of the size to be sampled."),
        *GEOMETRY,
        integer("text_tokens", 512, 0, 4096, "Text tokens in the model's attention; Flux pads to 512 or 256."),
        number("query_x", 0.5, 0.0, 1.0, "Where the token of the map stands, from left to right."),
        number("query_y", 0.5, 0.0, 1.0, "Where the token of the map stands, from top to bottom."),
    )
    OUTPUTS = (
        Output("STRING", "text", "To read; link it to Preview Any."),
        Output("IMAGE", "map", "White: tokens that the chosen one sees; one pixel a token. Of a clip, its middle frame."),
    )

    def run(
        self, model, latent, pattern, group_height, group_width, group_frames, radius, text_tokens, query_x, query_y,
    ):  # fmt: skip
        from ..accel.attention.grouped import GroupRule, key_map, summary
        from ..accel.region.grid import TokenGrid
        from ..families.tokens import attention_spec

        rule = GroupRule(pattern, (group_frames, group_height, group_width), radius)
        rule.check(self.TITLE)
        spec = attention_spec(model.get_model_object("diffusion_model"), self.TITLE)
        sides = TokenGrid.of(latent["samples"].shape[2:], spec.patch, self.TITLE).sides
        before = text_tokens if spec.text_inside else 0
        return (summary(sides, rule, before), key_map(sides, rule, before, (query_y, query_x)))


class RectiflowRettention(Node):
    """Lets a token see a few percent of the others and puts back what that leaves out, measured on a dense step now and then."""

    TITLE = "Re-ttention"
    GROUP = GROUP
    SEARCH_ALIASES = ["Rettention", "ultra sparse attention", "attention statistical reshape", "high resolution", "faster"]
    INPUTS = (
        socket("model", "MODEL", MODEL),
        number("keep", 0.03125, 0.005, 1.0, "Share of the picture that a token sees. 1 is the model itself.", step=0.005),
        choice("pattern", ("grat_block", "grat_cross", "band_2d", "band_1d", "frame_band"),
            "grat_block: near squares. grat_cross: rows and columns. band_2d: rounder, slower. band_1d, frame_band: the paper's.",
        ),
        integer("warmup_steps", 5, 0, 100, "Steps left dense at the start. The paper: 5 of 20 for pictures, 15 of 50 for clips."),
        integer("period", 5, 1, 50, "Every so many steps one is dense and measures. 1: all are, and the report reads the mass seen."),
        number("ramp", 0.04, 0.0, 0.2, "Added to the measured share of mass at each step since."),
        number("rho_max", 1.0, 0.5, 2.0, "The share of mass never passes this.", advanced=True),
        boolean("use_ratio", True, "Scale what is seen by its share of the mass.", advanced=True),
        boolean("use_residual", True, "Add what the unseen gave at the last dense step.", advanced=True),
        choice("residual_dtype", ("same", "bf16", "fp8_e4m3"), "Precision of what is kept. fp8 halves the memory of bf16.", advanced=True),
        choice("residual_device", ("model", "cpu"), "Where it is kept. cpu spares graphics memory and costs its transfer.", advanced=True),
        number("memory_gib", 8.0, 0.1, 1024.0, "A run that would keep more is refused. Flux at 1024 pixels in bf16: 1.5 per condition."),
        integer("min_tokens", 2048, 0, 1000000, "Below so many tokens attention stays dense. 0: measured on this machine.", advanced=True),
        choice("form", ("centred", "published"),
            "centred: the unseen give the mean value of now and what they gave beyond it. published: only what they gave.",
            optional=True, advanced=True,
        ),
    )
    OUTPUTS = (
        Output("MODEL", "model", "The same model with Re-ttention."),
        Output("ATTENTION_REPORT", "report", "For Attention Report; it is filled while sampling."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}

    def run(
        self, model, keep, pattern, warmup_steps, period, ramp, rho_max, use_ratio, use_residual, residual_dtype, residual_device,
        memory_gib, min_tokens, form="centred", unique_id=None,
    ):  # fmt: skip
        from ..accel.attention.rettention import Rettention, RettentionLog, attach_rettention
        from ..accel.attention.statistics import Storage

        log = RettentionLog()
        storage = Storage(residual_dtype, residual_device, int(memory_gib * 2**30))
        plan = Rettention(
            log, self.TITLE, keep, pattern, warmup_steps, period, ramp, rho_max, use_ratio, use_residual, storage, min_tokens,
            form,
        )  # fmt: skip
        return (attach_rettention(model, plan), log)


class RectiflowAttentionReport(Node):
    """Reads what nodes on attention, mixed grains and skipped MLPs did in the last run: what was made cheaper, what was not, and why."""

    TITLE = "Attention Report"
    GROUP = GROUP
    SEARCH_ALIASES = ["GRAT", "Rettention", "context drop", "sparsity", "speed"]
    INPUTS = (
        socket("report", "ATTENTION_REPORT", "From Grouped Attention, Re-ttention, Context Drop, Mixed-Grain Tokens or Token-Skip MLP."),
        socket("after", "LATENT", "The output of the sampler that took the model: the report waits for it."),
    )
    OUTPUTS = (Output("STRING", "text", "To read; link it to Preview Any."),)

    def run(self, report, after):
        if not report.runs:
            remedy = "Link the attention node's own model to the sampler, and the sampler's output to 'after'."
            raise input_error(self.TITLE, "report", "attention that has not run", "the report of a model that was sampled", remedy)
        return (report.text(),)
