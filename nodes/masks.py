"""Masks palette: which frames and cells of a video (or of a batch of pictures) the flow makes, and which are given to it."""

from __future__ import annotations

from .declare import Node, Output, choice, integer, number, socket, text

GROUP = "masks"
_MASK = Output("MASK", "mask", "1 where the flow generates, 0 where the picture is given: one picture a frame, at the size of the video.")
_MASKED = Output("LATENT", "latent", "The latent with its noise mask, for any sampler.")


def _frames_first(samples):
    """`(b, c, t, h, w)` as it is; a batch of pictures `(b, c, h, w)` as the frames of one video, `(1, c, b, h, w)`."""
    return samples if samples.ndim == 5 else samples.transpose(0, 1)[None]


def _with_mask(latent, samples, cells):
    """The LATENT with `samples` `(b, c, t, h, w)` and the mask `(t, h, w)` as noise mask, in the rank the latent had."""
    if latent["samples"].ndim == 5:
        return {**latent, "samples": samples, "noise_mask": cells[None, None]}
    return {**latent, "samples": samples[0].transpose(0, 1), "noise_mask": cells[:, None]}


class RectiflowVideoMaskBuilder(Node):
    """Makes the masks of video tasks: go on from given frames, fill in between, complete a part, or draw everything freely."""

    TITLE = "Video Mask"
    GROUP = GROUP
    SEARCH_ALIASES = ["vdt", "prediction", "interpolation", "completion", "outpaint", "inpaint video", "noise mask"]
    INPUTS = (
        socket("latent", "LATENT", "The video's latent, empty or encoded. A batch of pictures counts as frames."),
        choice("task",
            ("predict", "backward", "interpolate", "unconditional", "single_frame", "arbitrary", "spatial", "outpaint", "custom"),
            "What is given: predict the first frames, backward the last, interpolate every step-th, single_frame one, arbitrary some, "
            "spatial all but random blocks, outpaint the middle, custom the listed frames, unconditional nothing.",
        ),
        choice("vae_stride", ("4x8x8", "4x16x16", "8x32x32", "1x8x8", "1x4x4"),
            "Frames × height × width in pixels behind one latent cell: Wan 2.1 and Hunyuan 4x8x8, Wan 2.2 5B 4x16x16, LTX 8x32x32, "
            "pictures 1x8x8, the tiny model 1x4x4. A batch of pictures always has 1 frame a cell.",
        ),
        integer("given", 8, 0, 10000, "predict and backward: pixel frames that are given."),
        integer("step", 4, 2, 64, "interpolate: every step-th pixel frame is given, from the first."),
        integer("frame_index", -1, -1, 10000, "single_frame: the given pixel frame; -1 draws one.", advanced=True),
        text("frame_list", "", "custom: given pixel frames, such as 0,16,32-40,-1 (the last)."),
        number("p_generate", 0.8, 0.0, 1.0, "arbitrary: probability that a frame is generated.", advanced=True),
        number("spatial_ratio", 0.5, 0.0, 1.0, "spatial and outpaint: share of the picture that is generated."),
        integer("min_block", 4, 1, 256, "spatial: latent cells of the smallest block.", advanced=True),
        integer("start_gap", 0, 0, 64, "spatial and outpaint: so many frames at the start are given whole.", advanced=True),
        integer("end_gap", 0, 0, 64, "spatial and outpaint: so many frames at the end are given whole.", advanced=True),
        integer("feather", 0, 0, 64, "Softens the border inside the generated part, in pixels; in time borders stay hard.", advanced=True),
        integer("seed", 0, 0, 2**63 - 1, "Of the drawn tasks: same seed, same mask."),
        socket("known", "LATENT",
            "Encoded frames that are given: as many as the mask gives, in their order, or as many as the video has.", optional=True,
        ),
    )
    OUTPUTS = (_MASK, _MASKED, Output("STRING", "report", "Which frames are given, and how much of the video is generated."))

    def run(
        self, latent, task, vae_stride, given, step, frame_index, frame_list, p_generate, spatial_ratio, min_block, start_gap, end_gap,
        feather, seed, known=None,
    ):
        from dataclasses import replace

        from ..samplers.masks import Strides, VideoMask, build_mask, feathered, latent_mask, mask_report, place_known

        samples, strides = _frames_first(latent["samples"]), Strides.parse(vae_stride)
        if latent["samples"].ndim == 4:
            strides = replace(strides, time=1)
        frames, height, width = samples.shape[2:]
        plan = VideoMask(
            task, given, step, frame_index, frame_list, p_generate, spatial_ratio, min_block, start_gap, end_gap, seed=seed
        )  # fmt: skip
        mask = build_mask(plan, frames, height, width, strides, self.TITLE)  # pixel frames, latent cells
        mask = feathered(mask, -(-feather // min(strides.height, strides.width)))
        cells = latent_mask(mask, frames, height, width, self.TITLE)
        if known is not None:
            samples = place_known(samples, _frames_first(known["samples"]), cells, self.TITLE)
        pixels = mask.repeat_interleave(strides.height, 1).repeat_interleave(strides.width, 2)
        return (pixels, _with_mask(latent, samples, cells), mask_report(mask, cells))


class RectiflowVideoMaskCombine(Node):
    """Joins two video masks, cuts one out of the other, or exchanges given and generated."""

    TITLE = "Combine Video Masks"
    GROUP = GROUP
    SEARCH_ALIASES = ["mask union", "mask intersection", "invert mask"]
    INPUTS = (
        socket("first", "MASK", "1 where the flow generates; a mask of one frame holds for all frames."),
        choice("operation", ("union", "intersection", "difference", "invert"),
            "union: generate where either does. intersection: where both do. difference: where first does and second does not. invert: "
            "where first does not.",
        ),
        socket("second", "MASK", "Not used by invert.", optional=True),
    )
    OUTPUTS = (_MASK,)

    def run(self, first, operation: str, second=None):
        from ..samplers.masks import combine_masks

        frames = [None if mask is None else mask.reshape(-1, *mask.shape[-2:]) for mask in (first, second)]
        return (combine_masks(operation, *frames, where=self.TITLE),)


class RectiflowMaskedVideoCondition(Node):
    """Puts a mask on a latent at the latent's own size, frame by frame, and chooses how the model sees the given part."""

    TITLE = "Masked Video Condition"
    GROUP = GROUP
    SEARCH_ALIASES = ["set latent noise mask", "video inpaint", "vdt", "repaint"]
    INPUTS = (
        socket("model", "MODEL", "A flow model for video, or for pictures."),
        socket("latent", "LATENT", "The encoded video; what the mask gives is kept."),
        socket("mask", "MASK", "1 where the flow generates, one picture a pixel frame (or one for all), at the size of the video."),
        choice("known", ("auto", "noised", "clean_t0", "clean_shared"),
            "How the model sees the given part. auto: its own way. noised: with the noise of the step, for every flow model. clean_t0: "
            "clean, at time 0, for models with a time a frame. clean_shared: clean under the common time, for models trained so (VDT).",
        ),
    )
    OUTPUTS = (_MASKED, Output("MODEL", "model", "The model that shows the given part as chosen; sample with this one."))

    def run(self, model, latent, mask, known: str):
        from ..samplers.known_part import present_known
        from ..samplers.masks import latent_mask

        samples = _frames_first(latent["samples"])
        cells = latent_mask(mask.reshape(-1, *mask.shape[-2:]), *samples.shape[2:], self.TITLE)
        return (_with_mask(latent, samples, cells), present_known(model, known, self.TITLE))


class RectiflowRepaintSampler(Node):
    """Takes every step several times with fresh noise in between, so that what is generated fits what is given. For masked runs."""

    TITLE = "Repaint Sampler"
    GROUP = GROUP
    SEARCH_ALIASES = ["repaint", "resample", "inpaint", "time travel"]
    INPUTS = (
        integer("resample", 5, 0, 50, "How often a step is taken again; 0 is Euler. Model calls a step: resample + 1."),
        integer("seed_offset", 0, 0, 2**31 - 1, "Added to the run's seed for the fresh noise, so that it can vary alone.", advanced=True),
    )
    OUTPUTS = (Output("SAMPLER", "sampler", "For SamplerCustom or SamplerCustomAdvanced, with a known part that is noised."),)

    def run(self, resample: int, seed_offset: int):
        from ..host import KSAMPLER
        from ..samplers.repaint import sample_repaint

        return (KSAMPLER(sample_repaint, {"resample": resample, "seed_offset": seed_offset}),)


class RectiflowPasteKnown(Node):
    """Puts the given part back over what was generated, bit for bit. The last step of a masked run."""

    TITLE = "Paste Known"
    GROUP = GROUP
    SEARCH_ALIASES = ["latent composite masked", "restore known"]
    INPUTS = (
        socket("generated", "LATENT", "What the sampler returned."),
        socket("known", "LATENT", "The latent that the run started from, with the noise mask that decides."),
    )
    OUTPUTS = (Output("LATENT", "latent", "Given positions as they were, the others as generated; without a noise mask."),)

    def run(self, generated, known):
        from ..errors import input_error
        from ..samplers.masks import paste_known

        if "noise_mask" not in known:
            got = "a latent without a noise mask"
            raise input_error(self.TITLE, "known", got, "the latent of Video Mask or Masked Video Condition", "Connect that one.")
        made = generated["samples"]
        mask = known["noise_mask"]
        if made.ndim == 4:
            mask = mask.reshape(-1, 1, *mask.shape[-2:])
        if mask.ndim != made.ndim or mask.shape[2:] != made.shape[2:] or mask.shape[0] not in (1, made.shape[0]):
            allowed = f"a noise mask of the generated latent's size, {tuple(made.shape)}"
            raise input_error(self.TITLE, "known", tuple(mask.shape), allowed, "Put the mask on with Video Mask or Masked Video Condition.")
        pasted = paste_known(made, known["samples"], mask, self.TITLE)
        return ({**{key: value for key, value in generated.items() if key != "noise_mask"}, "samples": pasted},)
