"""Pictures (b, h, w, c) in 0..1: resizing, cutting, joining."""

from __future__ import annotations

import math

from ....errors import input_error
from .composite import paste
from .declare import IMAGE, MASK, MAX_RESOLUTION, CoreNode, SchemaNode, boolean, combo, integer, number
from .limits import refuse_beyond_memory

_UPSCALE_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")
_IMAGES = "comfy_extras.nodes_images"
_PLACE = integer(0, 0, MAX_RESOLUTION, 1)
_SIZE = integer(512, 1, MAX_RESOLUTION, 1)
_PADDING = integer(0, 0, MAX_RESOLUTION, 8)
# Sizes that Flux Kontext was trained on (width, height)
_KONTEXT_SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104), (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
)  # fmt: skip


def _resized(node: str, image, width: int, height: int, method: str, crop: str = "disabled"):
    from ..utils import common_upscale

    if width < 1 or height < 1:
        raise input_error(node, "width, height", f"{width} x {height}", "at least 1 x 1 pixel", "Choose a larger size.")
    refuse_beyond_memory(node, "width, height", f"{width} x {height}", (image.shape[0], height, width, image.shape[-1]))
    return common_upscale(image.movedim(-1, 1), width, height, method, crop).movedim(1, -1)


class ImageScale(CoreNode):
    """A picture at another size; a width or height of 0 keeps the aspect, both keep the picture."""

    DISPLAY_NAME = "Upscale Image"
    CATEGORY = "image/upscaling"
    REQUIRED = {
        "image": IMAGE,
        "upscale_method": combo(*_UPSCALE_METHODS),
        "width": integer(512, 0, MAX_RESOLUTION, 1),
        "height": integer(512, 0, MAX_RESOLUTION, 1),
        "crop": combo("disabled", "center"),
    }
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"

    def upscale(self, image, upscale_method, width, height, crop):
        if width == 0 and height == 0:
            return (image,)
        old_height, old_width = image.shape[1:3]
        width = width or max(1, round(old_width * height / old_height))
        height = height or max(1, round(old_height * width / old_width))
        return (_resized(self.DISPLAY_NAME, image, width, height, upscale_method, crop),)


class ImageScaleBy(CoreNode):
    """A picture at a multiple of its size."""

    DISPLAY_NAME = "Upscale Image By"
    CATEGORY = "image/upscaling"
    REQUIRED = {"image": IMAGE, "upscale_method": combo(*_UPSCALE_METHODS), "scale_by": number(1.0, 0.01, 8.0, 0.01)}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"

    def upscale(self, image, upscale_method, scale_by):
        height, width = (round(size * scale_by) for size in image.shape[1:3])
        return (_resized(self.DISPLAY_NAME, image, width, height, upscale_method),)


class ImageScaleToTotalPixels(SchemaNode):
    """A picture with about so many megapixels (1024² each)."""

    CATEGORY = "image/upscaling"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_post_processing"
    REQUIRED = {"image": IMAGE, "upscale_method": combo(*_UPSCALE_METHODS), "megapixels": number(1.0, 0.01, 16.0, 0.01)}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "execute"

    def execute(self, image, upscale_method, megapixels):
        height, width = image.shape[1:3]
        scale = math.sqrt(int(megapixels * 1024 * 1024) / (width * height))
        return (_resized("ImageScaleToTotalPixels", image, round(width * scale), round(height * scale), upscale_method),)


class FluxKontextImageScale(SchemaNode):
    """A picture at the size, of those that Flux Kontext was trained on, whose aspect is nearest; cut at the centre."""

    DESCRIPTION = "This node resizes the image to one that is more optimal for flux kontext."
    CATEGORY = "advanced/conditioning/flux"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_flux"
    REQUIRED = {"image": IMAGE}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "execute"

    def execute(self, image):
        aspect = image.shape[2] / image.shape[1]
        width, height = min(_KONTEXT_SIZES, key=lambda size: (abs(aspect - size[0] / size[1]), size))
        return (_resized("FluxKontextImageScale", image, width, height, "lanczos", "center"),)


class ImageInvert(CoreNode):
    """1 − image."""

    DISPLAY_NAME = "Invert Image"
    CATEGORY = "image"
    REQUIRED = {"image": IMAGE}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "invert"

    def invert(self, image):
        return (1.0 - image,)


class ImageBatch(CoreNode):
    """Both pictures in one batch; the second takes the size of the first (bilinear, cut at the centre)."""

    DISPLAY_NAME = "Batch Images"
    CATEGORY = "image"
    REQUIRED = {"image1": IMAGE, "image2": IMAGE}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "batch"

    def batch(self, image1, image2):
        import torch

        if image1.shape[1:] != image2.shape[1:]:
            image2 = _resized(self.DISPLAY_NAME, image2, image1.shape[2], image1.shape[1], "bilinear", "center")
        return (torch.cat((image1, image2)),)


class RebatchImages(SchemaNode):
    """A list of pictures as batches of `batch_size`."""

    DISPLAY_NAME = "Rebatch Images"
    CATEGORY = "image/batch"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_rebatch"
    REQUIRED = {"images": IMAGE, "batch_size": integer(1, 1, 4096)}
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_IS_LIST = (True,)
    INPUT_IS_LIST = True
    FUNCTION = "execute"

    def execute(self, images, batch_size):
        import torch

        singles = [picture for batch in images for picture in batch.split(1)]
        size = batch_size[0]
        return ([torch.cat(singles[start : start + size]) for start in range(0, len(singles), size)],)


class RepeatImageBatch(CoreNode):
    """A batch, `amount` times."""

    CATEGORY = "image/batch"
    RELATIVE_PYTHON_MODULE = _IMAGES
    REQUIRED = {"image": IMAGE, "amount": integer(1, 1, 4096)}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "repeat"

    def repeat(self, image, amount):
        refuse_beyond_memory("RepeatImageBatch", "amount", amount, (amount, *image.shape), image.element_size())
        return (image.repeat(amount, 1, 1, 1),)


class ImageFromBatch(CoreNode):
    """Some pictures of a batch."""

    CATEGORY = "image/batch"
    RELATIVE_PYTHON_MODULE = _IMAGES
    REQUIRED = {"image": IMAGE, "batch_index": integer(0, 0, 4095), "length": integer(1, 1, 4096)}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "frombatch"

    def frombatch(self, image, batch_index, length):
        start = min(image.shape[0] - 1, batch_index)
        return (image[start : start + length].clone(),)


class EmptyImage(CoreNode):
    """One colour everywhere; `color` is 0xRRGGBB."""

    CATEGORY = "image"
    REQUIRED = {
        "width": _SIZE,
        "height": _SIZE,
        "batch_size": integer(1, 1, 4096),
        "color": integer(0, 0, 0xFFFFFF, 1, display="color"),
    }
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "generate"

    def generate(self, width, height, batch_size=1, color=0):
        import torch

        shape = (batch_size, height, width, 3)
        refuse_beyond_memory("EmptyImage", "width, height, batch_size", f"{width} x {height} x {batch_size}", shape)
        channels = torch.tensor([(color >> shift & 0xFF) / 0xFF for shift in (16, 8, 0)])
        return (channels.expand(shape).clone(),)


class ImageCrop(CoreNode):
    """A rectangle of a picture; at least its last pixel."""

    DISPLAY_NAME = "Image Crop"
    CATEGORY = "image/transform"
    RELATIVE_PYTHON_MODULE = _IMAGES
    REQUIRED = {"image": IMAGE, "width": _SIZE, "height": _SIZE, "x": _PLACE, "y": _PLACE}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "crop"

    def crop(self, image, width, height, x, y):
        left, top = min(x, image.shape[2] - 1), min(y, image.shape[1] - 1)
        return (image[:, top : top + height, left : left + width],)


class ImageRotate(CoreNode):
    """A picture turned clockwise."""

    CATEGORY = "image/transform"
    RELATIVE_PYTHON_MODULE = _IMAGES
    REQUIRED = {"image": IMAGE, "rotation": combo("none", "90 degrees", "180 degrees", "270 degrees")}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "rotate"

    def rotate(self, image, rotation):
        import torch

        turns = {"none": 0, "90 degrees": 1, "180 degrees": 2, "270 degrees": 3}[rotation]
        return (torch.rot90(image, k=turns, dims=(2, 1)),)


class ImageFlip(CoreNode):
    """A picture mirrored."""

    CATEGORY = "image/transform"
    RELATIVE_PYTHON_MODULE = _IMAGES
    REQUIRED = {"image": IMAGE, "flip_method": combo("x-axis: vertically", "y-axis: horizontally")}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "flip"

    def flip(self, image, flip_method):
        return (image.flip(1 if flip_method.startswith("x") else 2),)


class ImagePadForOutpaint(CoreNode):
    """A picture with a grey border to be painted, and the mask of it, which fades into the picture over `feathering` pixels."""

    DISPLAY_NAME = "Pad Image for Outpainting"
    CATEGORY = "image"
    REQUIRED = {"image": IMAGE, "left": _PADDING, "top": _PADDING, "right": _PADDING, "bottom": _PADDING} | {
        "feathering": integer(40, 0, MAX_RESOLUTION, 1)
    }
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "expand_image"

    def expand_image(self, image, left, top, right, bottom, feathering):
        import torch

        batch, height, width, channels = image.shape
        shape = (batch, height + top + bottom, width + left + right, channels)
        refuse_beyond_memory(self.DISPLAY_NAME, "left, top, right, bottom", (left, top, right, bottom), shape)
        padded = torch.full(shape, 0.5)
        padded[:, top : top + height, left : left + width] = image
        mask = torch.ones(shape[1:3])
        fade = torch.zeros(height, width)
        if feathering > 0 and feathering * 2 < min(height, width):
            distance = torch.minimum(_to_border(height, top, bottom)[:, None], _to_border(width, left, right))  # (h, w)
            fade = (((feathering - distance).clamp(min=0) / feathering) ** 2).float()
        mask[top : top + height, left : left + width] = fade
        return (padded, mask[None])


def _to_border(size: int, before: int, after: int):
    """Pixels from each place to the nearer padded end; `size` where no end is padded."""
    import torch

    place = torch.arange(size, dtype=torch.float64)
    far = torch.full_like(place, size)
    return torch.minimum(place if before else far, size - place if after else far)


class GetImageSize(CoreNode):
    """Width, height and batch size as numbers."""

    DISPLAY_NAME = "Get Image Size"
    DESCRIPTION = "Returns width and height of the image, and passes it through unchanged."
    CATEGORY = "image"
    RELATIVE_PYTHON_MODULE = _IMAGES
    REQUIRED = {"image": IMAGE}
    HIDDEN = {"unique_id": "UNIQUE_ID"}
    RETURN_TYPES = ("INT", "INT", "INT")
    RETURN_NAMES = ("width", "height", "batch_size")
    FUNCTION = "get_size"

    def get_size(self, image, unique_id=None):
        batch, height, width = image.shape[:3]
        return (width, height, batch)


class ImageCompositeMasked(CoreNode):
    """One picture pasted onto another; the source loses an alpha that the destination lacks, and counts as opaque in the other case."""

    CATEGORY = "image"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_mask"
    REQUIRED = {"destination": IMAGE, "source": IMAGE, "x": _PLACE, "y": _PLACE, "resize_source": boolean(False)}
    OPTIONAL = {"mask": MASK}
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "composite"

    def composite(self, destination, source, x, y, resize_source, mask=None):
        import torch.nn.functional as F

        if destination.shape[-1] > source.shape[-1]:
            source = F.pad(source, (0, destination.shape[-1] - source.shape[-1]), value=1.0)  # opaque
        source = source[..., : destination.shape[-1]]
        return (paste(destination.movedim(-1, 1), source.movedim(-1, 1), x, y, mask, resize_source).movedim(1, -1),)
