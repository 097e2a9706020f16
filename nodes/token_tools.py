"""Region palette: where a picture has detail, fewer tokens where it has not, and what a run will cost."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, boolean, choice, integer, number, socket, text

GROUP = "region"


class RectiflowInformationDensityMap(Node):
    """Measures how much there is in each region of a picture: the entropy of its grey levels, as D²iT chooses its grains."""

    TITLE = "Information Density Map"
    GROUP = GROUP
    SEARCH_ALIASES = ["entropy", "detail", "D2iT", "saliency", "grain"]
    INPUTS = (
        integer("region", 16, 2, 64, "Side of a region: pixels of a picture, cells of a latent."),
        number("sigma", 0.01, 0.001, 0.2, "How near grey levels must be to count as one, 1 being white.", step=0.001),
        integer("bins", 0, 0, 1024, "Grey levels that are told apart; 0: as many as a region has values.", advanced=True),
        choice("source", ("luma", "mean"), "Of a picture: weighted as the eye sees, or the mean of red, green and blue."),
        socket("image", "IMAGE", "Pictures; or link a latent.", optional=True),
        socket("latent", "LATENT", "A latent in place of pictures: mean of its channels, each stretched to its range.", optional=True),
    )
    OUTPUTS = (
        Output("MASK", "density", "Entropy over its most, log of the bins: 0 flat, 1 all levels alike. As large as the picture or latent."),
        Output("IMAGE", "heat_map", "The same in colours; bright is much."),
        Output("FLOAT", "mean", "Mean entropy in nats."),
    )

    def run(self, region, sigma, bins, source, image=None, latent=None):
        import math

        import torch

        from ..accel.region.density import density, enlarged
        from ..metrics.heat_map import heat_map

        if (image is None) == (latent is None):
            got = "both" if image is not None else "neither"
            raise input_error(self.TITLE, "image", got, "pictures, or a latent", "Link one of the two.")
        if image is not None:
            weights = torch.tensor([0.299, 0.587, 0.114] if source == "luma" else [1 / 3] * 3)
            maps = (image[..., :3].float().cpu() @ weights)[:, None]  # (b, 1, h, w)
        else:
            samples = latent["samples"].float().cpu()
            samples = samples.flatten(2, -3).mean(2) if samples.ndim == 5 else samples
            low, high = (getattr(samples, end)(dim=(2, 3), keepdim=True) for end in ("amin", "amax"))
            maps = (samples - low) / (high - low).clamp_min(1e-12)  # (b, c, h, w)
        if region > min(maps.shape[-2:]):
            remedy = "Enter a smaller region."
            raise input_error(self.TITLE, "region", region, f"at most {min(maps.shape[-2:])}, the shorter side", remedy)
        found = density(maps.flatten(0, 1), region, sigma, bins).unflatten(0, maps.shape[:2]).mean(dim=1)
        shares = enlarged(found / math.log(bins or region * region), region, maps.shape[-2:])
        return (shares, heat_map(shares)[0], float(found.mean()))


class RectiflowGrainMap(Node):
    """Splits a picture into fine and coarse regions by a density map; the fine ones can be those that sampling always computes."""

    TITLE = "Grain Map"
    GROUP = GROUP
    SEARCH_ALIASES = ["D2iT", "detail", "region mask", "RAS", "entropy"]
    INPUTS = (
        socket("density", "MASK", "From Information Density Map; any mask will do."),
        choice("mode", ("share", "threshold"), "share: the densest ones, so many. threshold: those above a value."),
        number("fine_share", 0.5, 0.0, 1.0, "share only: how much of the picture is fine."),
        number("threshold", 0.5, 0.0, 1.0, "threshold only: fine above this density."),
        integer("region", 16, 1, 64, "Side of a region in the density map's pixels, as it was made with."),
        integer("smooth", 0, 0, 3, "Passes of a majority filter that removes single regions; the share moves a little."),
    )
    OUTPUTS = (
        Output("MASK", "fine", "1 where the picture is fine; for region_mask of Region-Adaptive Sampling."),
        Output("FLOAT", "share", "Share of regions that are fine."),
    )

    def run(self, density, mode, fine_share, threshold, region, smooth):
        from ..accel.region.density import enlarged, fine_regions, region_means

        maps = density[None] if density.ndim == 2 else density
        value = fine_share if mode == "share" else threshold
        fine = fine_regions(region_means(maps, region), mode, value, smooth, self.TITLE)
        return (enlarged(fine, region, maps.shape[-2:]), float(fine.float().mean()))


class RectiflowMixedGrainTokens(Node):
    """Coarse regions of a grain map are one token a cell in most blocks of the model; each cell then moves as one (after D²iT)."""

    TITLE = "Mixed-Grain Tokens"
    GROUP = GROUP
    EXPERIMENTAL = True
    SEARCH_ALIASES = ["D2iT", "token merge", "ToMe", "grain", "speed", "faster"]
    INPUTS = (
        socket("model", "MODEL", "A Flux, Chroma, SD3, Qwen-Image or Wan model, after LoRA and other patches."),
        socket("grain_map", "MASK", "From Grain Map: 1 where tokens stay as they are. One for all pictures, or one for each."),
        integer("block_start", 2, 0, 200, "The first block that sees merged tokens, counted over all blocks from 0."),
        integer("block_end", 200, 0, 200, "The last one; 200: up to the last there is."),
        number("start_percent", 0.2, 0.0, 1.0, "Only from this share of the run's steps on. The layout forms before it."),
        number("end_percent", 1.0, 0.0, 1.0, "Only before this share of the run's steps."),
        choice("merge", ("mean", "centre"), "What stands for a cell: the mean of its tokens, or the one at its centre."),
        choice("unmerge", ("delta", "copy"),
            "delta: each token gets what the blocks added to its cell. copy: each gets the cell's own value, and fine structure is lost.",
        ),
        choice("position", ("centre", "first"), "Where a cell stands for attention: its centre, or its first token. SD3 ignores it."),
        boolean("weight_attention", True, "A cell counts as many tokens as it holds. Off: as one, and text gains weight."),
        integer("grain", 2, 2, 8, "Side of a cell in tokens: a coarse one is one token in place of grain².", advanced=True),
    )  # fmt: skip
    OUTPUTS = (
        Output("MODEL", "model", "The same model with fewer tokens in coarse regions."),
        Output("ATTENTION_REPORT", "report", "Tokens and FLOPs, for Attention Report; it is filled while sampling."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}  # the graph cache gives equal nodes one output; each needs a report of its own

    def run(
        self, model, grain_map, block_start, block_end, start_percent, end_percent, merge, unmerge, position, weight_attention, grain,
        unique_id=None,
    ):  # fmt: skip
        from ..accel.region.mixed_binding import GrainLog, attach_mixed_grain
        from ..accel.region.mixed_grain import MixedGrain

        log = GrainLog()
        plan = MixedGrain(
            grain_map, block_start, block_end, start_percent, end_percent, merge, unmerge, position, weight_attention, grain
        )  # fmt: skip
        return (attach_mixed_grain(model, plan, log, self.TITLE), log)


class RectiflowTokenSkipMLP(Node):
    """The MLPs of chosen blocks run for part of the image's tokens, those that change most; attention sees all (DyDiT without training)."""

    TITLE = "Token-Skip MLP"
    GROUP = GROUP
    EXPERIMENTAL = True
    SEARCH_ALIASES = ["DyDiT", "dynamic tokens", "speed", "faster", "FLOPs"]
    INPUTS = (
        socket("model", "MODEL", "A Flux, Chroma, SD3, Lumina 2, Qwen-Image or Wan model, after LoRA and other patches."),
        number("ratio", 0.7, 0.05, 1.0, "Share of the image's tokens whose MLPs run. 1 is off."),
        choice("router", ("velocity_change", "latent_variance", "ras_metric"),
            "Which run first: where velocity changed most, where the latent has most detail, or by RAS's rule, where it deviates least.",
        ),
        choice("reuse", ("residual_only", "cached_mlp_output"),
            "What the others get. residual_only: nothing, as DyDiT. cached_mlp_output: what the MLP last gave them; nearer, costs memory.",
        ),
        text("blocks", "all", "Whose MLPs: all, or ranges such as double:2-, single:0-20."),
        number("start_percent", 0.15, 0.0, 1.0, "Only from this share of the run's steps on."),
        number("end_percent", 1.0, 0.0, 1.0, "Only before this share of the run's steps."),
        integer("max_mib", 16384, 1, 1048576, "cached_mlp_output: at most this much is kept; above it the run stops. MiB.", advanced=True),
        socket("region_mask", "MASK", "Tokens whose MLPs always run, on top of the share.", optional=True),
    )
    OUTPUTS = (
        Output("MODEL", "model", "The same model with skipped MLPs."),
        Output("ATTENTION_REPORT", "report", "Tokens and FLOPs, for Attention Report; it is filled while sampling."),
    )
    HIDDEN = {"unique_id": "UNIQUE_ID"}  # the graph cache gives equal nodes one output; each needs a report of its own

    def run(
        self, model, ratio, router, reuse, blocks, start_percent, end_percent, max_mib, region_mask=None, unique_id=None,
    ):  # fmt: skip
        from ..accel.region.skip_binding import SkipLog, attach_token_skip
        from ..accel.region.token_skip import TokenSkip

        log = SkipLog()
        plan = TokenSkip(ratio, router, reuse, blocks, start_percent, end_percent, max_mib << 20, region_mask)
        return (attach_token_skip(model, plan, log, self.TITLE), log)


class RectiflowCostPredictor(Node):
    """Says before a run how many FLOPs and seconds it will take, with all tokens and with a part of them; measures a few small calls."""

    TITLE = "Cost Predictor"
    GROUP = GROUP
    SEARCH_ALIASES = ["FLOPs", "time", "estimate", "RAS", "speed"]
    INPUTS = (
        socket("model", "MODEL", "The model without cache and region nodes, which would change what is measured."),
        socket("positive", "CONDITIONING", "The prompt."),
        socket("negative", "CONDITIONING", "The negative prompt; it costs nothing at cfg 1."),
        socket("latent", "LATENT", "A latent of the size and batch to be sampled."),
        integer("steps", 28, 1, 1000, "Model evaluations of the run: steps of Euler, twice as many of Heun."),
        number("cfg", 3.0, 1.0, 100.0, "1: without the negative prompt."),
        number("sample_ratio", 0.5, 0.05, 1.0, "Share of the tokens at partial steps, as in Region-Adaptive Sampling; 1: none is partial."),
        integer("dense_steps", 6, 0, 1000, "Steps with all tokens: those before start_step and the reset steps."),
    )
    OUTPUTS = (
        Output("STRING", "text", "To read; link it to Preview Any."),
        Output("FLOAT", "tflops", "Of the whole run, 10¹² multiplications and additions."),
        Output("FLOAT", "seconds", "Of the whole run on this machine; text encoder and VAE are not in it."),
    )

    def run(self, model, positive, negative, latent, steps, cfg, sample_ratio, dense_steps):
        import torch

        from ..accel.cost import Predictor, TimedCalls, smaller_sizes
        from ..host import CFGGuider, fix_empty_latent_channels

        samples = fix_empty_latent_channels(model, latent["samples"])
        texts = [entry[0].shape[1] for entry in (positive[:1] if cfg == 1.0 else [positive[0], negative[0]])]
        predictor = Predictor.of(model, tuple(samples.shape), texts, self.TITLE)
        guider = CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sigma = float(model.get_model_object("model_sampling").sigma_max)
        measured = []
        for size in smaller_sizes(samples.shape, predictor.spec.patch):
            noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
            calls = TimedCalls()
            guider.sample(noise, torch.zeros_like(noise), calls, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
            measured.append((size, calls.seconds))
        found = predictor.run(measured, steps, sample_ratio, min(dense_steps, steps))
        return (found.text(), found.flops / 1e12, found.seconds)
