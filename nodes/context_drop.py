"""Attention palette: fewer keys by pooling."""

from __future__ import annotations

from .declare import Node, Output, boolean, choice, integer, number, socket


class RectiflowContextDrop(Node):
    """Every token looks at means of squares of image tokens instead of all of them, in fewer layers as the picture forms (Lumina-Next)."""

    TITLE = "Context Drop"
    GROUP = "attention"
    SEARCH_ALIASES = ["Lumina", "pooled keys", "high resolution", "speed", "faster", "token merge"]
    INPUTS = (
        socket("model", "MODEL", "A Flux, Chroma, SD3, Lumina 2, Qwen-Image or Wan model, after LoRA and other patches."),
        integer("factor", 2, 0, 8, "Side of a square in tokens: keys fall to 1/factor². 1 is off; 0 follows the size, see base_tokens."),
        boolean("weighted", True, "A square counts as many tokens as it holds. Off, as published: text weighs factor² times as much."),
        choice("layers", ("time_linear", "last_first", "all"),
            "time_linear: all layers at noise, none at the end, the first ones keep dropping. last_first: the last ones. all: always.",
        ),
        number("start_percent", 0.0, 0.0, 1.0, "Only from this share of the run's steps on."),
        number("end_percent", 1.0, 0.0, 1.0, "Only before this share of the run's steps."),
        integer("min_tokens", 2048, 0, 1000000, "Below so many tokens attention stays dense. 0: measured on this machine.", advanced=True),
        integer("base_tokens", 4096, 1, 1000000, "factor 0 only: image tokens at the training size; factor = √(tokens/base_tokens).",
            advanced=True,
        ),
        choice("pool", ("mean", "rope_free"),
            "rope_free: keys are averaged before their rotation and turned to the square's middle; Flux, Chroma, Qwen-Image, Wan, Hunyuan.",
            optional=True, advanced=True,
        ),
    )  # fmt: skip
    OUTPUTS = (
        Output("MODEL", "model", "The same model with fewer keys."),
        Output("ATTENTION_REPORT", "report", "For Attention Report; it is filled while sampling."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}  # the graph cache gives equal nodes one output; each needs a report of its own

    def run(self, model, factor, weighted, layers, start_percent, end_percent, min_tokens, base_tokens, pool="mean", unique_id=None):
        from ..accel.attention.context_drop import ContextDrop, DropLog, attach_context_drop

        log = DropLog()
        plan = ContextDrop(log, self.TITLE, factor, weighted, layers, start_percent, end_percent, min_tokens, base_tokens, pool)
        return (attach_context_drop(model, plan), log)
