"""Resolution palette: pictures of several sizes drawn in one sequence."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, integer, socket

GROUP = "resolution"
SLOTS = 6


class RectiflowPackLatents(Node):
    """Joins latents of several sizes to one sequence that a Flux model draws in one call a step, each picture as if alone (FiTv2)."""

    TITLE = "Pack Latents"
    GROUP = GROUP
    SEARCH_ALIASES = ["several sizes", "aspect ratios", "batch of sizes", "fitv2", "sequence packing"]
    INPUTS = (
        socket("model", "MODEL", "A Flux model, without RoPE Extrapolation and attention nodes."),
        *(socket(f"latent_{number}", "LATENT", "A latent of any size, all with one batch size.", optional=number > 1)
          for number in range(1, SLOTS + 1)),
    )  # fmt: skip
    OUTPUTS = (
        Output("MODEL", "model", "The model for this latent and no other."),
        Output("LATENT", "latent", "All pictures as one strip of latent patches, for any sampler."),
        Output("PACKING", "packing", "For Unpack Latents."),
    )

    def run(self, model, **latents):
        from ..accel.attention.packing import attach_packing
        from ..host import fix_empty_latent_channels

        given = [latents[name] for name in sorted(latents) if latents[name] is not None]
        if any("noise_mask" in latent for latent in given):
            remedy = "Sample masked latents one by one."
            raise input_error(self.TITLE, "latent_1", "a latent with a noise mask", "latents without masks", remedy)
        samples = [fix_empty_latent_channels(model, latent["samples"]) for latent in given]
        patched, strip, packing = attach_packing(model, samples, self.TITLE)
        return (patched, {"samples": strip}, packing)


class RectiflowUnpackLatents(Node):
    """Takes a sampled strip of Pack Latents apart: one picture, or all of them as a list."""

    TITLE = "Unpack Latents"
    GROUP = GROUP
    SEARCH_ALIASES = ["several sizes", "split latents", "fitv2"]
    INPUTS = (
        socket("latent", "LATENT", "What the sampler returned."),
        socket("packing", "PACKING", "From Pack Latents."),
        integer("index", 0, 0, SLOTS, "Which picture, from 1 in the order of Pack Latents; 0: all, one after the other."),
    )
    OUTPUTS = (Output("LATENT", "latents", "The picture, or a list; what follows runs once for each.", is_list=True),)

    def run(self, latent, packing, index):
        samples = latent["samples"]
        columns = packing.patch[1] * sum(packing.counts)
        if tuple(samples.shape[-2:]) != (packing.patch[0], columns):
            allowed = f"a strip of {packing.patch[0]} × {columns} latent cells, as Pack Latents gives it"
            raise input_error(self.TITLE, "latent", tuple(samples.shape), allowed, "Link the sampler that used that strip.")
        if index > len(packing.sizes):
            raise input_error(self.TITLE, "index", index, f"0 to {len(packing.sizes)} pictures", "Enter the number of a linked latent.")
        pictures = [{"samples": picture} for picture in packing.pictures(samples)]
        return (pictures if index == 0 else [pictures[index - 1]],)
