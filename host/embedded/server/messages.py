"""The wire forms of websocket messages: JSON text frames and the binary layouts of ComfyUI's protocol.

A binary frame begins with a big-endian uint32 that names its kind.
"""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps

from .json_text import dumps

__all__ = ["BinaryEvent", "encode_json", "encode_preview", "encode_preview_with_metadata", "encode_text"]

JPEG_QUALITY = 95


class BinaryEvent:
    """First uint32 of a binary frame."""

    PREVIEW_IMAGE = 1
    UNENCODED_PREVIEW_IMAGE = 2
    TEXT = 3
    PREVIEW_IMAGE_WITH_METADATA = 4


def encode_json(event: str, data: Any) -> str:
    return dumps({"type": event, "data": data})


def _encode_image(preview: tuple[str, Image.Image, int | None]) -> bytes:
    """`preview` is (JPEG or PNG, picture, longest side or None)."""
    kind, picture, longest_side = preview
    if longest_side is not None:
        picture = ImageOps.contain(picture, (longest_side, longest_side), Image.Resampling.BILINEAR)
    if kind == "JPEG" and picture.mode not in ("RGB", "L"):
        picture = picture.convert("RGB")
    target = BytesIO()
    picture.save(target, format=kind, quality=JPEG_QUALITY, compress_level=1)
    return target.getvalue()


def encode_preview(preview: tuple[str, Image.Image, int | None]) -> bytes:
    """Kind 1: uint32 image type (1 JPEG, 2 PNG), picture. For clients that did not announce metadata support."""
    return struct.pack(">II", BinaryEvent.PREVIEW_IMAGE, 2 if preview[0] == "PNG" else 1) + _encode_image(preview)


def encode_preview_with_metadata(preview: tuple[str, Image.Image, int | None], metadata: dict[str, Any]) -> bytes:
    """Kind 4: uint32 length, JSON that names node, prompt and image type, picture."""
    text = dumps({**metadata, "image_type": "image/png" if preview[0] == "PNG" else "image/jpeg"}).encode()
    return struct.pack(">II", BinaryEvent.PREVIEW_IMAGE_WITH_METADATA, len(text)) + text + _encode_image(preview)


def encode_text(node_id: str, text: str) -> bytes:
    """Kind 3: uint32 length, node id, UTF-8 text shown on the node."""
    node = node_id.encode("utf-8", "replace")
    return struct.pack(">II", BinaryEvent.TEXT, len(node)) + node + text.encode("utf-8", "replace")
