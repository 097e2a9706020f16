"""Pictures between files and tensors: everything that touches Pillow.

Files come from strangers, so whatever a decoder does with one ends in a NodeInputError that names the node, the input and the
file, and sizes are judged from the header before anything is decoded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

from ....errors import NodeInputError, input_error
from .. import folder_paths
from ..node_helpers import pillow
from ..safe_files import UnsafePathError, write_new_file
from .limits import refuse_beyond_memory

__all__ = ["picture_path", "file_digest", "read_frames", "read_channel", "to_pictures", "png_text", "save_pngs", "save_path"]

_NO_ALPHA_SIZE = (64, 64)  # what ComfyUI gives as the mask of a picture without alpha
_INTERPRETED = {"EPS"}  # Pillow hands these to Ghostscript, which runs them as a program


def picture_path(node: str, input_name: str, name: str) -> str:
    """The checked path of a picture in the input folder, or in the one that an ending such as " [output]" names."""
    try:
        path = folder_paths.get_annotated_filepath(name)
    except UnsafePathError as error:
        raise input_error(node, input_name, name, "a file in the input, output or temp folder", f"Put it there; {error}.") from error
    if not os.path.isfile(path):
        raise input_error(node, input_name, name, "an existing file", "Check the name; files are looked for in the input folder.")
    return path


def file_digest(path: str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _open(path: str) -> Image.Image:
    Image.init()
    return Image.open(path, formats=[kind for kind in Image.ID if kind not in _INTERPRETED])


def _unreadable(node: str, input_name: str, name: str, path: str, error: Exception) -> NoReturn:
    if isinstance(error, Image.DecompressionBombError):
        allowed = f"a picture of at most {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
        raise input_error(node, input_name, name, allowed, f"Scale it down; {error}") from error
    reason = f"{type(error).__name__}: {error}".replace(path, name)
    raise input_error(node, input_name, name, "a picture that Pillow can read", f"Save it anew in a picture program ({reason}).") from error


def _eight_bit(frame: Image.Image) -> Image.Image:
    """32-bit grey, which is how Pillow reads 16-bit grey of some formats, scaled to 0..255."""
    return frame.point(lambda level: level * (1 / 255)) if frame.mode == "I" else frame


def _unit(band: Image.Image) -> torch.Tensor:
    """An 8-bit picture as float32 in 0..1, (h, w) or (h, w, 3)."""
    return torch.from_numpy(np.array(band).astype(np.float32) / 255.0)


def read_frames(node: str, input_name: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture file as IMAGE (n, h, w, 3) and MASK (n, h, w) = 1 − alpha.

    Turned as its EXIF says; frames of another size than the first are left out; of an MPO only the first frame counts. Without
    alpha the mask is zeros (n, 64, 64).
    """
    path = picture_path(node, input_name, name)
    try:
        picture = pillow(_open, path)
        width, height = picture.size
        count = getattr(picture, "n_frames", 1)
        refuse_beyond_memory(node, input_name, f"{name}, {width} x {height} x {count}", (count, height, width, 4))
        images, masks = _decode(picture)
    except NodeInputError:
        raise
    except Exception as error:  # a decoder may raise anything on a file made to break it
        _unreadable(node, input_name, name, path, error)
    size = images[0].shape[:2] if any(mask is not None for mask in masks) else _NO_ALPHA_SIZE
    masks = [torch.zeros(size) if mask is None else mask for mask in masks]
    return torch.stack(images), torch.stack(masks)


def _decode(picture: Image.Image) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    images, masks = [], []
    for frame in _frames(picture):
        pixels = _unit(_eight_bit(frame).convert("RGB"))  # (h, w, 3)
        if images and pixels.shape != images[0].shape:
            continue
        images.append(pixels)
        if frame.mode == "P" and "transparency" in frame.info:
            frame = frame.convert("RGBA")
        masks.append(1.0 - _unit(frame.getchannel("A")) if "A" in frame.getbands() else None)
    return images, masks


def _frames(picture: Image.Image) -> Iterator[Image.Image]:
    for frame in ImageSequence.Iterator(picture):
        yield pillow(ImageOps.exif_transpose, frame)
        if picture.format == "MPO":
            return


def read_channel(node: str, input_name: str, name: str, channel: str) -> torch.Tensor:
    """One channel ("alpha", "red", "green", "blue") of a picture's first frame as MASK (1, h, w); alpha is inverted."""
    path = picture_path(node, input_name, name)
    try:
        picture = pillow(_open, path)
        width, height = picture.size
        refuse_beyond_memory(node, input_name, f"{name}, {width} x {height}", (height, width, 4))
        picture = _eight_bit(pillow(ImageOps.exif_transpose, picture)).convert("RGBA")
        values = _unit(picture.getchannel(channel[0].upper()))[None]
    except NodeInputError:
        raise
    except Exception as error:  # a decoder may raise anything on a file made to break it
        _unreadable(node, input_name, name, path, error)
    return 1.0 - values if channel == "alpha" else values


def to_pictures(node: str, images: torch.Tensor) -> Iterator[Image.Image]:
    """8-bit pictures of IMAGE (b, h, w, 3 or 4); values are clipped and cut, not rounded, as ComfyUI does."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        raise input_error(node, "images", tuple(images.shape), "pictures (batch, height, width, 3 or 4)", "Connect an IMAGE output.")
    for number, image in enumerate(images):
        levels = 255.0 * image.float().cpu().numpy()
        unknown = np.isnan(levels)
        if unknown.any():
            logging.warning("%s: picture %d of %d holds %d NaN values, drawn as 0", node, number + 1, len(images), int(unknown.sum()))
            levels[unknown] = 0.0
        yield Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def png_text(node: str, prompt: object, extra_pnginfo: Mapping | None) -> PngInfo:
    """The graph as PNG text: `prompt`, and one text for each key of extra_pnginfo (`workflow`), all as JSON."""
    text = PngInfo()
    if prompt is not None:
        text.add_text("prompt", json.dumps(prompt))
    for key, value in (extra_pnginfo or {}).items():
        if not (isinstance(key, str) and 0 < len(key) < 80 and key.isascii() and key.isprintable()):
            raise input_error(node, "extra_pnginfo", key, "keys of 1 to 79 printable ASCII characters", "Rename the key.")
        text.add_text(key, json.dumps(value))
    return text


def save_path(node: str, prefix: str, folder: str, width: int = 0, height: int = 0) -> tuple[str, str, int, str]:
    """(folder, name, counter, subfolder) for files of a prefix; a prefix that is no name below `folder` is refused."""
    try:
        return folder_paths.get_save_image_path(prefix, folder, width, height)[:4]
    except (UnsafePathError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        allowed = "a name, with folders before it if wanted, below the output folder"
        raise input_error(node, "filename_prefix", prefix, allowed, f"Choose another prefix; {reason}.") from error


def save_pngs(
    node: str, images: torch.Tensor, prefix: str, folder: str, kind: str, text: PngInfo | None, compress_level: int
) -> list[dict[str, str]]:
    """Write one PNG a picture, each whole or not at all and never over another file.

    `%batch_num%` in the prefix becomes the place in the batch.

    Returns:
        file locators {"filename", "subfolder", "type"} in order.
    """
    from ..model_management import throw_exception_if_processing_interrupted

    pictures = to_pictures(node, images)
    first = next(pictures)
    path, name, counter, subfolder = save_path(node, prefix, folder, first.width, first.height)
    locators = []
    for number in range(len(images)):
        picture = first if number == 0 else next(pictures)
        throw_exception_if_processing_interrupted()
        stem = name.replace("%batch_num%", str(number))

        def write(file: BinaryIO, picture=picture) -> None:
            picture.save(file, format="PNG", pnginfo=text, compress_level=compress_level)

        try:
            filename, counter = write_new_file(path, lambda count, stem=stem: f"{stem}_{count:05}_.png", counter, write)
        except OSError as error:
            allowed = "a name that the disk takes"
            raise input_error(node, "filename_prefix", prefix, allowed, f"Nothing of it was written; {error.strerror}.") from error
        locators.append({"filename": filename, "subfolder": subfolder, "type": kind})
        counter += 1
    return locators
