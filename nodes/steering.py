"""Steering palette: what was measured of a picture, how far a run is from it, and the sampler that drives that distance down."""

from __future__ import annotations

from ..errors import input_error
from .declare import Node, Output, choice, integer, number, seed_input, socket

GROUP = "steering"
KINDS = ("mask", "downsample", "gaussian_blur", "motion_blur", "kernel", "grayscale", "identity")
COSTS = 4
_BETA = number("beta", 0.5, 0.0, 2.0, "Share of the distance taken off in each steering step: 0 off, 1 all of it, above 1 overshoots.")
_COST = Output("FLOW_COST", "cost", "For FlowChef Sampler or Sum Flow Costs.")


def _schedule() -> tuple:
    """Optional and last: when a cost acts, and with which weight at its end."""
    return (
        number("beta_end", -1.0, -1.0, 2.0, "beta at sigma_lo, reached in a straight line; -1 keeps beta.", optional=True, advanced=True),
        number("sigma_hi", 1.0, 0.0, 1.0, "Steers from this sigma down; 0.9 helps models whose first guesses are poor.", optional=True),
        number("sigma_lo", 0.0, 0.0, 1.0, "Steers down to this sigma. Above the last steps for noisy measurements.", optional=True),
    )


def _part(cost, beta: float, beta_end: float, sigma_hi: float, sigma_lo: float):
    from ..samplers.costs import CostPart

    return ((CostPart(cost, beta, beta if beta_end < 0 else beta_end, sigma_hi, sigma_lo),),)


def _decoder(vae, node: str):
    from ..host import load_models_gpu
    from ..samplers.costs import PixelDecoder

    return PixelDecoder(vae, load_models_gpu, node)


class RectiflowFlowOperator(Node):
    """A linear measurement: a hole, fewer pixels, a blur, or brightness alone. Several in a row make one."""

    TITLE = "Flow Operator"
    GROUP = GROUP
    SEARCH_ALIASES = ["degradation", "inverse problem", "inpainting", "super resolution", "deblur", "colorize"]
    INPUTS = (
        choice("kind", KINDS,
            "mask: known outside the MASK. downsample: mean of squares. blurs: zeros beyond the edge. kernel: the MASK as blur kernel. "
            "grayscale: brightness in three channels.",
        ),
        integer("factor", 4, 2, 32, "downsample only: pixels on a side of the squares."),
        integer("size", 11, 3, 61, "Blurs only: pixels on a side of the kernel, odd.", step=2),
        number("sigma", 1.5, 0.1, 20.0, "gaussian_blur only: its width in pixels.", step=0.1),
        number("angle", 0.0, -180.0, 180.0, "motion_blur only: its direction in degrees, 0 along a row, counter-clockwise.", step=1.0),
        socket("mask", "MASK", "mask: 1 where the picture is unknown. kernel: the kernel.", optional=True),
        socket("after", "FLOW_OPERATOR", "Applied before this one.", optional=True),
    )
    OUTPUTS = (Output("FLOW_OPERATOR", "operator", "For Apply Flow Operator and the costs."),)

    def run(self, kind: str, factor: int, size: int, sigma: float, angle: float, mask=None, after=None):
        from ..samplers import operators

        if kind in ("mask", "kernel") and mask is None:
            raise input_error(self.TITLE, "mask", None, f"a MASK, which kind '{kind}' needs", "Link a MASK or choose another kind.")
        if kind in ("gaussian_blur", "motion_blur") and size % 2 == 0:
            raise input_error(self.TITLE, "size", size, "an odd number from 3 to 61", f"Use {size + 1}.")
        made = {
            "mask": lambda: operators.Mask(1 - mask),
            "downsample": lambda: operators.Downsample(factor),
            "gaussian_blur": lambda: operators.Blur(operators.gaussian_kernel(size, sigma)),
            "motion_blur": lambda: operators.Blur(operators.motion_kernel(size, angle)),
            "kernel": lambda: operators.Blur(mask.reshape(-1, *mask.shape[-2:])[0]),
            "grayscale": operators.Grayscale,
            "identity": operators.Identity,
        }[kind]()
        return (made if after is None else operators.Chain((after, made)),)


class RectiflowApplyOperator(Node):
    """Measures a picture: makes the hole, the small or the blurred picture that steering then works back from."""

    TITLE = "Apply Flow Operator"
    GROUP = GROUP
    SEARCH_ALIASES = ["degrade", "measure"]
    INPUTS = (
        socket("operator", "FLOW_OPERATOR", "What is measured."),
        socket("image", "IMAGE", "The picture."),
        number("noise", 0.0, 0.0, 0.5, "Noise added to the measurement, in brightness of 0 to 1. Drawn once."),
        seed_input("Decides the noise."),
    )
    OUTPUTS = (Output("IMAGE", "measurement", "As the operator leaves it: smaller for downsample, black where a mask hides."),)

    def run(self, operator, image, noise: float, seed: int):
        from ..samplers.operators import measure

        return (measure(operator, image, noise, seed),)


class RectiflowLatentCost(Node):
    """Distance to a measured latent, without the decoder: closed form, no gradients. Best for masks and whole pictures."""

    TITLE = "Flow Latent Cost"
    GROUP = GROUP
    SEARCH_ALIASES = ["inpainting", "flowchef"]
    INPUTS = (
        socket("operator", "FLOW_OPERATOR", "What of the latent counts."),
        socket("latent", "LATENT", "The picture, encoded; it is measured here."),
        _BETA,
        *_schedule(),
    )
    OUTPUTS = (_COST,)

    def run(self, operator, latent, beta, beta_end=-1.0, sigma_hi=1.0, sigma_lo=0.0):
        from ..samplers.costs import LatentMeasurement

        return _part(LatentMeasurement(operator, latent["samples"]), beta, beta_end, sigma_hi, sigma_lo)


class RectiflowPixelCost(Node):
    """Distance to a measured picture, through the decoder: for small, blurred and grey pictures. Gradients of the decoder only."""

    TITLE = "Flow Pixel Cost"
    GROUP = GROUP
    SEARCH_ALIASES = ["super resolution", "deblur", "colorize", "flowchef"]
    INPUTS = (
        socket("operator", "FLOW_OPERATOR", "What was measured."),
        socket("image", "IMAGE", "The measurement, as Apply Flow Operator makes it."),
        socket("vae", "VAE", "Its decoder turns the model's guess into pixels."),
        _BETA,
        *_schedule(),
    )
    OUTPUTS = (_COST,)

    def run(self, operator, image, vae, beta, beta_end=-1.0, sigma_hi=1.0, sigma_lo=0.0):
        from ..samplers.costs import PixelMeasurement

        return _part(PixelMeasurement(operator, image, _decoder(vae, self.TITLE)), beta, beta_end, sigma_hi, sigma_lo)


class RectiflowEditCost(Node):
    """FlowChef's masked edit: first the whole source is kept, then only what lies outside the edited region."""

    TITLE = "Flow Edit Cost"
    GROUP = GROUP
    SEARCH_ALIASES = ["flowchef", "edit", "keep background"]
    INPUTS = (
        socket("source", "LATENT", "The picture that is edited, encoded."),
        socket("mask", "MASK", "1 where the picture may change."),
        number("full_until", 0.9, 0.0, 1.0, "Above this sigma the whole source is kept. Lower keeps more of its layout."),
        number("keep_until", 0.0, 0.0, 1.0, "Below this sigma nothing is kept; 0 keeps the surroundings to the end."),
        number("beta", 0.5, 0.0, 2.0, "Share of the distance to the source taken off in each steering step."),
    )
    OUTPUTS = (_COST,)

    def run(self, source, mask, full_until: float, keep_until: float, beta: float):
        from ..samplers.costs import CostPart, LatentMeasurement
        from ..samplers.operators import Identity, Mask

        if keep_until > full_until or keep_until == 1:
            got = (keep_until, full_until)
            raise input_error(self.TITLE, "keep_until, full_until", got, "keep_until at most full_until, below 1", "0 and 0.9 are usual.")
        parts = []
        if full_until < 1:
            parts.append(CostPart(LatentMeasurement(Identity(), source["samples"]), beta, beta, 1.0, full_until))
        if keep_until < full_until:
            parts.append(CostPart(LatentMeasurement(Mask(1 - mask), source["samples"]), beta, beta, full_until, keep_until))
        return (tuple(parts),)


class RectiflowScoreCost(Node):
    """Steers towards a higher score of the picture: any differentiable FLOW_SCORE."""

    TITLE = "Flow Score Cost"
    GROUP = GROUP
    SEARCH_ALIASES = ["classifier guidance", "clip guidance", "loss guidance"]
    INPUTS = (
        socket("score", "FLOW_SCORE", "A picture in, a number out; larger is better."),
        socket("vae", "VAE", "Its decoder turns the model's guess into pixels."),
        number("beta", 0.05, 0.0, 2.0, "How far each steering step moves the latent, as root mean square of its values.", step=0.005),
        *_schedule(),
    )
    OUTPUTS = (_COST,)

    def run(self, score, vae, beta, beta_end=-1.0, sigma_hi=1.0, sigma_lo=0.0):
        from ..samplers.costs import Score

        return _part(Score(score, _decoder(vae, self.TITLE)), beta, beta_end, sigma_hi, sigma_lo)


class RectiflowColourScore(Node):
    """Scores how near the mean colour of a picture, or of a region of it, is to a colour."""

    TITLE = "Colour Score"
    GROUP = GROUP
    SEARCH_ALIASES = ["color guidance", "tint"]
    INPUTS = (
        number("red", 0.5, 0.0, 1.0, "Red of the wanted mean colour."),
        number("green", 0.5, 0.0, 1.0, "Green of the wanted mean colour."),
        number("blue", 0.5, 0.0, 1.0, "Blue of the wanted mean colour."),
        socket("mask", "MASK", "The region whose mean counts; all of the picture when open.", optional=True),
    )
    OUTPUTS = (Output("FLOW_SCORE", "score", "For Flow Score Cost."),)

    def run(self, red: float, green: float, blue: float, mask=None):
        from ..samplers.scores import ColourScore

        return (ColourScore((red, green, blue), mask),)


class RectiflowClipVisionScore(Node):
    """Scores how alike a picture and a reference are to a CLIP image encoder."""

    TITLE = "CLIP Vision Score"
    GROUP = GROUP
    SEARCH_ALIASES = ["clip guidance", "style guidance", "similarity"]
    INPUTS = (
        socket("clip_vision", "CLIP_VISION", "The image encoder."),
        socket("reference", "IMAGE", "The picture to come near to; the first of a batch."),
    )
    OUTPUTS = (Output("FLOW_SCORE", "score", "For Flow Score Cost."),)

    def run(self, clip_vision, reference):
        from ..samplers.scores import ClipVisionScore

        return (ClipVisionScore(clip_vision, reference),)


class RectiflowClassScore(Node):
    """Scores how sure a classifier is of one class: the log-probability of the wanted example among all of them."""

    TITLE = "Class Score"
    GROUP = GROUP
    SEARCH_ALIASES = ["classifier guidance", "prototype", "nearest mean", "zero shot"]
    INPUTS = (
        socket("examples", "IMAGE", "A batch of pictures, one of each class."),
        integer("wanted", 1, 1, 1000, "Which of the examples shows the wanted class, counted from 1."),
        number("temperature", 0.01, 0.0001, 1.0,
            "How much distance counts as doubt. Small: only the nearest example counts; large: all classes stay likely.", step=0.001,
        ),
        number("other", 0.02, 0.0, 2.0, "Distance beyond which a picture is none of the classes; about 0.02 for pixels, 0.3 for CLIP."),
        socket("clip_vision", "CLIP_VISION",
            "Tells classes by content and style. Without it pictures are compared at 16×16 pixels, by colour and place.", optional=True,
        ),
    )
    OUTPUTS = (Output("FLOW_SCORE", "score", "For Flow Score Cost."),)

    def run(self, examples, wanted: int, temperature: float, other: float, clip_vision=None):
        from ..samplers.scores import ClassScore

        return (ClassScore(examples[..., :3], wanted - 1, temperature, other, clip_vision),)


class RectiflowSumCosts(Node):
    """Adds up to four costs; each keeps its own weight and schedule."""

    TITLE = "Sum Flow Costs"
    GROUP = GROUP
    SEARCH_ALIASES = ["combine costs", "add losses"]
    INPUTS = (
        socket("cost_1", "FLOW_COST", "A cost."),
        *(socket(f"cost_{number}", "FLOW_COST", "Another cost.", optional=True) for number in range(2, COSTS + 1)),
    )
    OUTPUTS = (_COST,)

    def run(self, **costs):
        return (sum((costs[f"cost_{place}"] for place in range(1, COSTS + 1) if costs.get(f"cost_{place}") is not None), ()),)


class RectiflowFlowChefSampler(Node):
    """Samples while a cost is driven down in every step: one model call a step and no gradient through the model."""

    TITLE = "FlowChef Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["steering", "inverse problem", "inpainting", "super resolution", "deblur", "guidance"]
    INPUTS = (
        socket("cost", "FLOW_COST", "What is driven down; Sum Flow Costs joins several."),
        integer("inner", 1, 1, 20, "Steering steps for each model call. More for small and blurred pictures."),
        choice("velocity", ("reused", "fresh"),
            "reused: one model call a step. fresh: asks the model again after steering, two calls a step.", advanced=True,
        ),
        choice("start_from", ("noise", "latent"),
            "noise: mix noise into the latent at the first sigma, as usual. latent: the latent already is the state there, for example "
            "an inverted picture.", advanced=True,
        ),
    )
    OUTPUTS = (Output("SAMPLER", "sampler", "For SamplerCustom or SamplerCustomAdvanced with falling sigmas."),)

    def run(self, cost, inner: int, velocity: str, start_from: str):
        from ..host import KSAMPLER
        from ..samplers.sampler_object import FlowSampler
        from ..samplers.steering import sample_flowchef

        return (FlowSampler(KSAMPLER(sample_flowchef, {"costs": cost, "inner": inner, "velocity": velocity}), start_from),)
