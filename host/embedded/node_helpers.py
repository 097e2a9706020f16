"""Small helpers that nodes import under ComfyUI's names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from PIL import ImageFile, UnidentifiedImageError

__all__ = ["conditioning_set_values", "pillow", "hasher", "string_to_torch_dtype"]


def conditioning_set_values(conditioning: list, values: dict[str, Any] | None = None, append: bool = False) -> list:
    """A copy of a CONDITIONING with `values` written into every entry's dict.

    With `append` a value is put behind the one already there (`old + new`), as reference latents are collected.
    """
    changed = []
    for entry in conditioning:
        options = dict(entry[1])
        for key, value in (values or {}).items():
            previous = options.get(key) if append else None
            options[key] = value if previous is None else previous + value
        changed.append([entry[0], options])
    return changed


def pillow(function: Callable, argument: Any) -> Any:
    """Call a Pillow function; when a file is cut short, once more with truncated pictures allowed."""
    try:
        return function(argument)
    except (OSError, UnidentifiedImageError, ValueError):
        allowed = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            return function(argument)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = allowed


def hasher() -> Callable:
    """The hash that uploaded files are compared by."""
    return hashlib.sha256


def string_to_torch_dtype(string: str) -> torch.dtype | None:
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(string)
