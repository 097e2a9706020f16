"""Pruning palette: modulation in low-rank factors."""

from __future__ import annotations

from .declare import Node, Output, boolean, integer, socket


class RectiflowLowRankModulation(Node):
    """Stores the layers that make shifts, scales and gates from the time in few numbers: two thin matrices each, and one for all blocks."""

    TITLE = "Low-Rank Modulation"
    GROUP = "pruning"
    SEARCH_ALIASES = ["adaln", "adaln-lora", "fitv2", "svd", "compress", "smaller model"]
    INPUTS = (
        socket("model", "MODEL", "A Flux, SD3, Qwen-Image, HunyuanVideo or Lumina 2 model, before Quantize."),
        integer("rank", 0, 0, 65536, "Of the factors of each layer; 0: a quarter of the width, as FiTv2 trains it. Full rank loses nothing "
            "and gains nothing.",
        ),
        boolean("shared", False, "Keep the mean of all blocks and factor what each differs by it, as FiTv2 is built. At equal size it was "
            "further from the tiny model, whose blocks have little in common.",
        ),
    )  # fmt: skip
    OUTPUTS = (
        Output("MODEL", "model", "The same model with factored layers; Save Compressed keeps them so."),
        Output("STRING", "report", "Error and bytes of every layer; link it to Preview Any."),
        Output("FLOAT", "error", "Largest ‖Ŵ − W‖/‖W‖ of a layer."),
    )

    def run(self, model, rank, shared):
        from ..accel.prune.low_rank import factor_modulation

        patched, layers = factor_modulation(model, rank, self.TITLE, shared)
        before, after = (sum(getattr(layer, side) for layer in layers) for side in ("before", "after"))
        worst = max(layer.error for layer in layers)
        head = f"{len(layers)} layers, {before / 2**20:.2f} → {after / 2**20:.2f} MiB; the model {model.model_size() / 2**20:.2f} → "
        rows = [f"| {layer.name} | {layer.rank} | {layer.error:.4f} | {layer.before} | {layer.after} |" for layer in layers]
        table = ["| layer | rank | error | bytes before | after |", "|---|---|---|---|---|", *rows]
        return (patched, "\n".join([f"{head}{patched.model_size() / 2**20:.2f} MiB; largest error {worst:.4f}", "", *table]), worst)
