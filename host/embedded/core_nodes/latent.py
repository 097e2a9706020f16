"""Latents: making, batching, resizing and mixing them.

A LATENT is a dict with `samples` (b, c, h, w), optionally `noise_mask` (n, 1, h, w), 1 where to repaint, and `batch_index`, the
place of each sample in the noise drawn from a seed. Dicts are copied and keys that a node does not know are kept.
"""

from __future__ import annotations

import math

from ....errors import input_error
from .composite import paste
from .declare import LATENT, MASK, MAX_RESOLUTION, CoreNode, SchemaNode, boolean, combo, integer, number
from .limits import refuse_beyond_memory

_LATENT_NODES = "comfy_extras.nodes_latent"
_UPSCALE_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "bislerp")


def _empty(node: str, width: int, height: int, batch_size: int, channels: int) -> dict:
    import torch

    from ..model_management import intermediate_device

    shape = (batch_size, channels, height // 8, width // 8)
    refuse_beyond_memory(node, "width, height, batch_size", f"{width} x {height} x {batch_size}", shape)
    return {"samples": torch.zeros(shape, device=intermediate_device())}


class EmptyLatentImage(CoreNode):
    """Zeros (b, 4, height / 8, width / 8); the sampler widens them to the channels of its model."""

    DISPLAY_NAME = "Empty Latent Image"
    DESCRIPTION = "Create a new batch of empty latent images to be denoised via sampling."
    CATEGORY = "latent"
    REQUIRED = {
        "width": integer(512, 16, MAX_RESOLUTION, 8, tooltip="The width of the latent images in pixels."),
        "height": integer(512, 16, MAX_RESOLUTION, 8, tooltip="The height of the latent images in pixels."),
        "batch_size": integer(1, 1, 4096, tooltip="The number of latent images in the batch."),
    }
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The empty latent image batch.",)
    FUNCTION = "generate"

    def generate(self, width, height, batch_size=1):
        return (_empty(self.DISPLAY_NAME, width, height, batch_size, 4),)


class EmptySD3LatentImage(SchemaNode):
    """Zeros (b, 16, height / 8, width / 8)."""

    CATEGORY = "latent/sd3"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_sd3"
    REQUIRED = {
        "width": integer(1024, 16, MAX_RESOLUTION, 16),
        "height": integer(1024, 16, MAX_RESOLUTION, 16),
        "batch_size": integer(1, 1, 4096),
    }
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "execute"

    def execute(self, width, height, batch_size=1):
        return (_empty("EmptySD3LatentImage", width, height, batch_size, 16),)


class SetLatentNoiseMask(CoreNode):
    """Only the masked part of the latent is sampled again."""

    DISPLAY_NAME = "Set Latent Noise Mask"
    CATEGORY = "latent/inpaint"
    REQUIRED = {"samples": LATENT, "mask": MASK}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "set_mask"

    def set_mask(self, samples, mask):
        return ({**samples, "noise_mask": mask.reshape(-1, 1, *mask.shape[-2:])},)


def _masks_for(samples: dict):
    """The noise masks (n, 1, h, w), repeated to one a sample; a single mask stays single."""
    masks, count = samples["noise_mask"], samples["samples"].shape[0]
    if 1 < masks.shape[0] < count:
        masks = masks.repeat(math.ceil(count / masks.shape[0]), 1, 1, 1)[:count]
    return masks


class LatentFromBatch(CoreNode):
    """Some latents of a batch; they keep the noise that they had in it."""

    DISPLAY_NAME = "Latent From Batch"
    CATEGORY = "latent/batch"
    REQUIRED = {"samples": LATENT, "batch_index": integer(0, 0, 63), "length": integer(1, 1, 64)}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "frombatch"

    def frombatch(self, samples, batch_index, length):
        count = samples["samples"].shape[0]
        start = min(count - 1, batch_index)
        chosen = slice(start, min(count, start + length))
        picked = {**samples, "samples": samples["samples"][chosen].clone()}
        if "noise_mask" in samples:
            masks = _masks_for(samples)
            picked["noise_mask"] = (masks if masks.shape[0] == 1 else masks[chosen]).clone()
        picked["batch_index"] = samples.get("batch_index", list(range(count)))[chosen]
        return (picked,)


class RepeatLatentBatch(CoreNode):
    """A batch, `amount` times; each repeat draws noise of its own."""

    DISPLAY_NAME = "Repeat Latent Batch"
    CATEGORY = "latent/batch"
    REQUIRED = {"samples": LATENT, "amount": integer(1, 1, 64)}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "repeat"

    def repeat(self, samples, amount):
        latent = samples["samples"]
        refuse_beyond_memory(self.DISPLAY_NAME, "amount", amount, (amount, *latent.shape), latent.element_size())
        repeated = {**samples, "samples": latent.repeat(amount, *[1] * (latent.ndim - 1))}
        if "noise_mask" in samples and samples["noise_mask"].shape[0] > 1:
            masks = samples["noise_mask"]
            repeated["noise_mask"] = masks.repeat(amount, *[1] * (masks.ndim - 1))
        if "batch_index" in samples:
            index = samples["batch_index"]
            stride = max(index) - min(index) + 1
            repeated["batch_index"] = [place + turn * stride for turn in range(amount) for place in index]
        return (repeated,)


def _resized_to(latent, like, repeat_batch: bool = True):
    """`latent` at the size of `like` (bilinear, centre crop), and with its batch if asked."""
    from ..utils import common_upscale, repeat_to_batch_size

    if latent.shape[1:] != like.shape[1:]:
        latent = common_upscale(latent, like.shape[-1], like.shape[-2], "bilinear", "center")
    return repeat_to_batch_size(latent, like.shape[0]) if repeat_batch else latent


class LatentBatch(SchemaNode):
    """Both latents in one batch; the second takes the size of the first."""

    CATEGORY = "latent/batch"
    RELATIVE_PYTHON_MODULE = _LATENT_NODES
    REQUIRED = {"samples1": LATENT, "samples2": LATENT}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "execute"

    def execute(self, samples1, samples2):
        import torch

        first, second = samples1["samples"], samples2["samples"]
        index = [place for part in (samples1, samples2) for place in part.get("batch_index", range(part["samples"].shape[0]))]
        joined = torch.cat((first, _resized_to(second, first, repeat_batch=False)))
        return ({**samples1, "samples": joined, "batch_index": index},)


class LatentBatchSeedBehavior(SchemaNode):
    """Whether the latents of a batch share one noise ("fixed") or draw one each ("random")."""

    CATEGORY = "latent/advanced"
    RELATIVE_PYTHON_MODULE = _LATENT_NODES
    REQUIRED = {"samples": LATENT, "seed_behavior": combo("random", "fixed", default="fixed")}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "execute"

    def execute(self, samples, seed_behavior):
        changed = dict(samples)
        index = changed.pop("batch_index", [0])
        if seed_behavior == "fixed":
            changed["batch_index"] = index[:1] * samples["samples"].shape[0]
        return (changed,)


class RebatchLatents(SchemaNode):
    """A list of latents as batches of `batch_size`; latents of different sizes do not meet in one batch."""

    DISPLAY_NAME = "Rebatch Latents"
    CATEGORY = "latent/batch"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_rebatch"
    REQUIRED = {"latents": LATENT, "batch_size": integer(1, 1, 4096)}
    RETURN_TYPES = ("LATENT",)
    OUTPUT_IS_LIST = (True,)
    INPUT_IS_LIST = True
    FUNCTION = "execute"

    def execute(self, latents, batch_size):
        from .rebatch import rebatch_latents

        return (rebatch_latents(latents, batch_size[0]),)


class LatentUpscale(CoreNode):
    """A latent at another size, given in pixels (at least 64); 0 keeps the aspect."""

    DISPLAY_NAME = "Upscale Latent"
    CATEGORY = "latent"
    REQUIRED = {
        "samples": LATENT,
        "upscale_method": combo(*_UPSCALE_METHODS),
        "width": integer(512, 0, MAX_RESOLUTION, 8),
        "height": integer(512, 0, MAX_RESOLUTION, 8),
        "crop": combo("disabled", "center"),
    }
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "upscale"

    def upscale(self, samples, upscale_method, width, height, crop):
        latent = samples["samples"]
        if width == 0 and height == 0:
            return (samples,)
        if width == 0:
            height = max(64, height)
            width = round(latent.shape[-1] * height / latent.shape[-2])
        elif height == 0:
            width = max(64, width)
            height = round(latent.shape[-2] * width / latent.shape[-1])
        return (_upscaled(self.DISPLAY_NAME, samples, max(64, width) // 8, max(64, height) // 8, upscale_method, crop),)


class LatentUpscaleBy(CoreNode):
    """A latent at a multiple of its size."""

    DISPLAY_NAME = "Upscale Latent By"
    CATEGORY = "latent"
    REQUIRED = {"samples": LATENT, "upscale_method": combo(*_UPSCALE_METHODS), "scale_by": number(1.5, 0.01, 8.0, 0.01)}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "upscale"

    def upscale(self, samples, upscale_method, scale_by):
        height, width = (round(size * scale_by) for size in samples["samples"].shape[-2:])
        if width < 1 or height < 1:
            raise input_error(self.DISPLAY_NAME, "scale_by", scale_by, "a factor that leaves a latent pixel", "Choose a larger one.")
        return (_upscaled(self.DISPLAY_NAME, samples, width, height, upscale_method, "disabled"),)


def _upscaled(node: str, samples: dict, width: int, height: int, method: str, crop: str) -> dict:
    from ..utils import common_upscale

    latent = samples["samples"]
    refuse_beyond_memory(node, "width, height", f"{width * 8} x {height * 8}", (*latent.shape[:-2], height, width), latent.element_size())
    return {**samples, "samples": common_upscale(latent, width, height, method, crop)}


class LatentRotate(CoreNode):
    """A latent turned clockwise."""

    DISPLAY_NAME = "Rotate Latent"
    CATEGORY = "latent/transform"
    REQUIRED = {"samples": LATENT, "rotation": combo("none", "90 degrees", "180 degrees", "270 degrees")}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "rotate"

    def rotate(self, samples, rotation):
        import torch

        turns = {"none": 0, "90 degrees": 1, "180 degrees": 2, "270 degrees": 3}[rotation]
        return ({**samples, "samples": torch.rot90(samples["samples"], k=turns, dims=(3, 2))},)


class LatentFlip(CoreNode):
    """A latent mirrored."""

    DISPLAY_NAME = "Flip Latent"
    CATEGORY = "latent/transform"
    REQUIRED = {"samples": LATENT, "flip_method": combo("x-axis: vertically", "y-axis: horizontally")}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "flip"

    def flip(self, samples, flip_method):
        return ({**samples, "samples": samples["samples"].flip(2 if flip_method.startswith("x") else 3)},)


class LatentCrop(CoreNode):
    """A part of a latent; everything is in pixels, and at least 64 of them stay where the latent has them."""

    DISPLAY_NAME = "Crop Latent"
    CATEGORY = "latent/transform"
    REQUIRED = {
        "samples": LATENT,
        "width": integer(512, 64, MAX_RESOLUTION, 8),
        "height": integer(512, 64, MAX_RESOLUTION, 8),
        "x": integer(0, 0, MAX_RESOLUTION, 8),
        "y": integer(0, 0, MAX_RESOLUTION, 8),
    }
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "crop"

    def crop(self, samples, width, height, x, y):
        latent = samples["samples"]
        top, left = (max(0, min(offset // 8, size - 8)) for offset, size in zip((y, x), latent.shape[-2:]))
        return ({**samples, "samples": latent[..., top : top + height // 8, left : left + width // 8]},)


class LatentCompositeMasked(CoreNode):
    """One latent pasted onto another; places are in pixels."""

    CATEGORY = "latent"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_mask"
    REQUIRED = {
        "destination": LATENT,
        "source": LATENT,
        "x": integer(0, 0, MAX_RESOLUTION, 8),
        "y": integer(0, 0, MAX_RESOLUTION, 8),
        "resize_source": boolean(False),
    }
    OPTIONAL = {"mask": MASK}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "composite"

    def composite(self, destination, source, x, y, resize_source, mask=None):
        pasted = paste(destination["samples"], source["samples"], x // 8, y // 8, mask, resize_source)
        return ({**destination, "samples": pasted},)


class LatentAdd(SchemaNode):
    """samples1 + samples2."""

    CATEGORY = "latent/advanced"
    RELATIVE_PYTHON_MODULE = _LATENT_NODES
    REQUIRED = {"samples1": LATENT, "samples2": LATENT}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "execute"

    def execute(self, samples1, samples2):
        first = samples1["samples"]
        return ({**samples1, "samples": first + _resized_to(samples2["samples"], first)},)


class LatentSubtract(SchemaNode):
    """samples1 − samples2."""

    CATEGORY = "latent/advanced"
    RELATIVE_PYTHON_MODULE = _LATENT_NODES
    REQUIRED = {"samples1": LATENT, "samples2": LATENT}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "execute"

    def execute(self, samples1, samples2):
        first = samples1["samples"]
        return ({**samples1, "samples": first - _resized_to(samples2["samples"], first)},)


class LatentMultiply(SchemaNode):
    """samples · multiplier."""

    CATEGORY = "latent/advanced"
    RELATIVE_PYTHON_MODULE = _LATENT_NODES
    REQUIRED = {"samples": LATENT, "multiplier": number(1.0, -10.0, 10.0, 0.01)}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "execute"

    def execute(self, samples, multiplier):
        return ({**samples, "samples": samples["samples"] * multiplier},)


class LatentInterpolate(SchemaNode):
    """Blend of two latents by direction and length of each pixel's channel vector; `ratio` 1 is samples1."""

    CATEGORY = "latent/advanced"
    RELATIVE_PYTHON_MODULE = _LATENT_NODES
    REQUIRED = {"samples1": LATENT, "samples2": LATENT, "ratio": number(1.0, 0.0, 1.0, 0.01)}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "execute"

    def execute(self, samples1, samples2, ratio):
        import torch

        first = samples1["samples"]
        second = _resized_to(samples2["samples"], first)
        lengths = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (first, second)]  # (b, 1, h, w)
        units = [torch.nan_to_num(part / length) for part, length in zip((first, second), lengths)]
        direction = units[0] * ratio + units[1] * (1.0 - ratio)
        direction = torch.nan_to_num(direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True))
        return ({**samples1, "samples": direction * (lengths[0] * ratio + lengths[1] * (1.0 - ratio))},)
