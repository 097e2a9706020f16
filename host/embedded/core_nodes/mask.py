"""Masks (b, h, w) in 0..1."""

from __future__ import annotations

from .declare import IMAGE, MASK, MAX_RESOLUTION, CoreNode, boolean, combo, integer, number
from .limits import refuse_beyond_memory

_CHANNELS = ("red", "green", "blue", "alpha")
_PLACE = integer(0, 0, MAX_RESOLUTION, 1)
_SIZE = integer(512, 1, MAX_RESOLUTION, 1)


class _MaskNode(CoreNode):
    CATEGORY = "mask"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_mask"
    RETURN_TYPES = ("MASK",)


def as_batch(mask):
    """(…, h, w) as (b, h, w)."""
    return mask.reshape(-1, *mask.shape[-2:])


def as_picture(mask):
    """(…, h, w) as three equal channels (b, h, w, 3)."""
    return as_batch(mask)[..., None].expand(-1, -1, -1, 3)


class SolidMask(_MaskNode):
    """One value everywhere."""

    REQUIRED = {"value": number(1.0, 0.0, 1.0, 0.01), "width": _SIZE, "height": _SIZE}
    FUNCTION = "solid"

    def solid(self, value, width, height):
        import torch

        refuse_beyond_memory("SolidMask", "width, height", f"{width} x {height}", (height, width))
        return (torch.full((1, height, width), value, dtype=torch.float32, device="cpu"),)


class MaskToImage(_MaskNode):
    """A mask as a grey picture."""

    DISPLAY_NAME = "Convert Mask to Image"
    REQUIRED = {"mask": MASK}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "mask_to_image"

    def mask_to_image(self, mask):
        return (as_picture(mask),)


class ImageToMask(_MaskNode):
    """One channel of a picture."""

    DISPLAY_NAME = "Convert Image to Mask"
    REQUIRED = {"image": IMAGE, "channel": combo(*_CHANNELS)}
    FUNCTION = "image_to_mask"

    def image_to_mask(self, image, channel):
        from ....errors import input_error

        index = _CHANNELS.index(channel)
        if index >= image.shape[-1]:
            allowed = f"one of the picture's {image.shape[-1]} channels"
            raise input_error(self.DISPLAY_NAME, "channel", channel, allowed, "Choose a channel that the picture has.")
        return (image[..., index],)


class ImageColorToMask(_MaskNode):
    """1 where the picture has exactly this colour, rounded to 8 bits."""

    REQUIRED = {"image": IMAGE, "color": integer(0, 0, 0xFFFFFF, 1, display="color")}
    FUNCTION = "image_to_mask"

    def image_to_mask(self, image, color):
        import torch

        levels = (image[..., :3].clamp(0, 1) * 255.0).round().int()
        wanted = torch.tensor([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF], dtype=torch.int, device=levels.device)
        return ((levels == wanted).all(-1).float(),)


class InvertMask(_MaskNode):
    """1 − mask."""

    REQUIRED = {"mask": MASK}
    FUNCTION = "invert"

    def invert(self, mask):
        return (1.0 - mask,)


class CropMask(_MaskNode):
    """A rectangle of a mask."""

    REQUIRED = {"mask": MASK, "x": _PLACE, "y": _PLACE, "width": _SIZE, "height": _SIZE}
    FUNCTION = "crop"

    def crop(self, mask, x, y, width, height):
        return (as_batch(mask)[:, y : y + height, x : x + width],)


class MaskComposite(_MaskNode):
    """A mask put onto another at x, y by an operation; the result is clipped to 0..1."""

    REQUIRED = {
        "destination": MASK,
        "source": MASK,
        "x": _PLACE,
        "y": _PLACE,
        "operation": combo("multiply", "add", "subtract", "and", "or", "xor"),
    }
    FUNCTION = "combine"

    def combine(self, destination, source, x, y, operation):
        combined = as_batch(destination).clone()
        target = combined[:, y : y + source.shape[-2], x : x + source.shape[-1]]
        source = as_batch(source)[:, : target.shape[-2], : target.shape[-1]]
        if operation in ("and", "or", "xor"):
            before, other = target.round().bool(), source.round().bool()
            result = {"and": before & other, "or": before | other, "xor": before ^ other}[operation].float()
        else:
            result = {"multiply": target * source, "add": target + source, "subtract": target - source}[operation]
        target.copy_(result)
        return (combined.clamp(0.0, 1.0),)


class FeatherMask(_MaskNode):
    """A mask that fades towards its edges, linearly over so many pixels."""

    REQUIRED = {"mask": MASK, "left": _PLACE, "top": _PLACE, "right": _PLACE, "bottom": _PLACE}
    FUNCTION = "feather"

    def feather(self, mask, left, top, right, bottom):
        feathered = as_batch(mask).clone()
        for rows, first, last in ((feathered.transpose(-1, -2), left, right), (feathered, top, bottom)):
            _fade(rows, range(min(first, rows.shape[1])))
            # the nearest step to the far edge lands on index −0, the first one: ComfyUI does so, and pictures depend on it
            _fade(rows, range(0, -min(last, rows.shape[1]), -1))
        return (feathered,)


def _fade(rows, places: range) -> None:
    """Multiply row `places[i]` of (b, rows, columns) by (i + 1) / n, in place."""
    for step, place in enumerate(places, start=1):
        rows[:, place] *= step / len(places)


class GrowMask(_MaskNode):
    """A mask grown by `expand` pixels, or shrunk where it is negative; tapered corners grow like a diamond, others like a square."""

    REQUIRED = {"mask": MASK, "expand": integer(0, -MAX_RESOLUTION, MAX_RESOLUTION, 1), "tapered_corners": boolean(True)}
    FUNCTION = "expand_mask"

    def expand_mask(self, mask, expand, tapered_corners):
        import torch
        import torch.nn.functional as F

        sign = -1 if expand < 0 else 1  # shrinking is growing of what is not masked
        grown = as_batch(mask)[:, None] * sign  # (b, 1, h, w)
        for _ in range(min(abs(expand), sum(grown.shape[-2:]))):  # after height + width steps nothing changes any more
            if tapered_corners:
                grown = torch.maximum(F.max_pool2d(grown, (3, 1), 1, (1, 0)), F.max_pool2d(grown, (1, 3), 1, (0, 1)))
            else:
                grown = F.max_pool2d(grown, 3, 1, 1)
        return (grown[:, 0] * sign,)


class ThresholdMask(_MaskNode):
    """1 where the mask is above a value."""

    REQUIRED = {"mask": MASK, "value": number(0.5, 0.0, 1.0, 0.01)}
    FUNCTION = "image_to_mask"

    def image_to_mask(self, mask, value):
        return ((mask > value).float(),)
