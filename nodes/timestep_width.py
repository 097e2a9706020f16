"""Pruning palette: width that follows the timestep, without training (after DyDiT)."""

from __future__ import annotations

from .declare import Node, Output, choice, integer, number, seed_input, socket

GROUP = "pruning"


class RectiflowTimestepWidthTable(Node):
    """Ranks attention heads and MLP channel groups at each noise level by what they add, and keeps what a FLOPs target allows."""

    TITLE = "Timestep Width Table"
    GROUP = GROUP
    EXPERIMENTAL = True
    SEARCH_ALIASES = ["DyDiT", "dynamic width", "TDW", "FLOPs", "head pruning"]
    INPUTS = (
        socket("model", "MODEL", "A Flux, Chroma, SD3, Lumina 2, Qwen-Image or Wan model, after LoRA and other patches."),
        socket("positive", "CONDITIONING", "A prompt of the kind you will use."),
        socket("negative", "CONDITIONING", "The negative prompt; it is not used at cfg 1."),
        socket("latent", "LATENT", "An empty latent of the size you will use: it decides what attention costs."),
        number("target_flops", 0.7, 0.2, 1.0, "Mean share of the model's FLOPs over all noise levels. 1 keeps everything."),
        integer("buckets", 10, 1, 50, "Even shares of sigma from 0 to 1, each with widths of its own."),
        number("cfg", 3.0, 1.0, 100.0, "Guidance of the measuring run, one step a bucket."),
        seed_input("Of the measuring run's noise."),
    )
    OUTPUTS = (
        Output("WIDTH_TABLE", "table", "For Apply Timestep Width, of this model alone."),
        Output("STRING", "text", "How much of the width each noise level keeps; link it to Preview Any."),
    )

    def run(self, model, positive, negative, latent, target_flops, buckets, cfg, seed):
        import torch

        from ..accel.prune.width_run import made_table
        from ..host import CFGGuider, fix_empty_latent_channels, prepare_noise, sampler_object

        samples = fix_empty_latent_channels(model, latent["samples"])

        def sample(watched, sigmas):
            guider = CFGGuider(watched)
            guider.set_conds(positive, negative)
            guider.set_cfg(cfg)
            noise = prepare_noise(samples, seed)
            guider.sample(noise, torch.zeros_like(noise), sampler_object("euler"), sigmas, disable_pbar=True, seed=seed)

        text = round(sum(entry[0].shape[1] for entry in positive) / len(positive))
        table = made_table(model, sample, tuple(samples.shape), text, buckets, target_flops, self.TITLE)
        return (table, table.text())


class RectiflowApplyTimestepWidth(Node):
    """Each step runs the part of the network that the table keeps at its noise level."""

    TITLE = "Apply Timestep Width"
    GROUP = GROUP
    EXPERIMENTAL = True
    SEARCH_ALIASES = ["DyDiT", "dynamic width", "TDW", "faster"]
    INPUTS = (
        socket("model", "MODEL", "The model that the table was made of; LoRAs may come before."),
        socket("table", "WIDTH_TABLE", "From Timestep Width Table."),
        choice("exec", ("slice", "mask"),
            "slice: narrower layers, faster; one noise level's copies are held. mask: zeros at full cost, for packed layers.",
        ),
    )
    OUTPUTS = (Output("MODEL", "model", "The same model, as wide as each noise level needs."),)

    def run(self, model, table, exec):
        from ..accel.prune.width_run import apply_width_table

        return (apply_width_table(model, table, exec, self.TITLE),)
