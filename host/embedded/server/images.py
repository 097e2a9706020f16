"""Pictures as GET /view sends them and as POST /upload/… stores them; no HTTP in here."""

from __future__ import annotations

import hashlib
import os
import shutil
from io import BytesIO
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..safe_files import write_new_file
from .files import replace_file

__all__ = ["encode_preview_file", "encode_channel", "store_upload", "with_alpha_of"]

PREVIEW_FORMATS = ("webp", "jpeg")
DEFAULT_QUALITY = 90


def encode_preview_file(path: str, wish: str, channel: str) -> tuple[bytes, str]:
    """(bytes, format) of a smaller copy. `wish` is "webp;90" or "jpeg;75"; jpeg has no alpha, so channels with one get webp."""
    parts = wish.split(";")
    kind = parts[0] if parts[0] in PREVIEW_FORMATS and "a" not in channel else "webp"
    quality = int(parts[-1]) if parts[-1].isascii() and parts[-1].isdigit() and len(parts[-1]) < 4 else DEFAULT_QUALITY
    target = BytesIO()
    with Image.open(path) as picture:
        picture = picture.convert("RGB") if kind == "jpeg" or channel == "rgb" else picture
        picture.save(target, format=kind, quality=min(max(quality, 1), 100))
    return target.getvalue(), kind


def encode_channel(path: str, channel: str) -> bytes:
    """PNG of the colours alone ("rgb") or of the alpha channel alone ("a", opaque where the picture has none)."""
    target = BytesIO()
    with Image.open(path) as picture:
        if channel == "rgb":
            picture.convert("RGB").save(target, format="PNG")
        else:
            alpha = Image.new("RGBA", picture.size)
            alpha.putalpha(picture.convert("RGBA").getchannel("A"))
            alpha.save(target, format="PNG")
    return target.getvalue()


def with_alpha_of(original: str, mask: BinaryIO) -> bytes:
    """The original picture as PNG with the upload's alpha channel; texts in the original (its graph) are kept."""
    with Image.open(original) as picture, Image.open(mask) as upload:
        texts = PngInfo()
        for key, text in getattr(picture, "text", {}).items():
            texts.add_text(key, text)
        result = picture.convert("RGBA")
        result.putalpha(upload.convert("RGBA").getchannel("A").resize(result.size))
        target = BytesIO()
        result.save(target, format="PNG", compress_level=4, pnginfo=texts)
    return target.getvalue()


def store_upload(folder: str, filename: str, source: BinaryIO, overwrite: bool) -> str:
    """Write an upload into `folder` and return its name.

    Unless `overwrite`, an existing file is kept: equal bytes reuse its name, others become `name (1).png`, `name (2).png` …
    """
    os.makedirs(folder, exist_ok=True)
    if overwrite:
        replace_file(os.path.join(folder, filename), source.read())
        return filename
    stem, ending = os.path.splitext(filename)
    content = _digest(source)
    number = 0
    while os.path.exists(path := os.path.join(folder, _numbered(stem, ending, number))):
        with open(path, "rb") as existing:
            if _digest(existing) == content:
                return _numbered(stem, ending, number)
        number += 1
    return write_new_file(folder, lambda n: _numbered(stem, ending, n), number, lambda target: shutil.copyfileobj(source, target))[0]


def _numbered(stem: str, ending: str, number: int) -> str:
    return f"{stem} ({number}){ending}" if number else stem + ending


def _digest(file: BinaryIO) -> bytes:
    """SHA-256 of a whole file; the position is set back to the start."""
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    return digest.digest()
