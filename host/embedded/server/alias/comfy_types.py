"""`comfy.comfy_types`: the names with which packs annotate their nodes."""

from __future__ import annotations

from enum import Enum
from typing import Any, TypedDict

__all__ = ["IO", "CheckLazyMixin", "ComfyNodeABC", "FileLocator", "InputTypeDict", "InputTypeOptions", "HiddenInputTypeDict"]


class IO(str, Enum):
    """Socket types. Comparing with `!=` tells whether two cannot be connected: ANY fits everything, a union fits what it holds."""

    STRING = "STRING"
    IMAGE = "IMAGE"
    MASK = "MASK"
    LATENT = "LATENT"
    BOOLEAN = "BOOLEAN"
    INT = "INT"
    FLOAT = "FLOAT"
    COMBO = "COMBO"
    CONDITIONING = "CONDITIONING"
    SAMPLER = "SAMPLER"
    SIGMAS = "SIGMAS"
    GUIDER = "GUIDER"
    NOISE = "NOISE"
    CLIP = "CLIP"
    CONTROL_NET = "CONTROL_NET"
    VAE = "VAE"
    MODEL = "MODEL"
    LORA_MODEL = "LORA_MODEL"
    LOSS_MAP = "LOSS_MAP"
    CLIP_VISION = "CLIP_VISION"
    CLIP_VISION_OUTPUT = "CLIP_VISION_OUTPUT"
    STYLE_MODEL = "STYLE_MODEL"
    GLIGEN = "GLIGEN"
    UPSCALE_MODEL = "UPSCALE_MODEL"
    AUDIO = "AUDIO"
    WEBCAM = "WEBCAM"
    POINT = "POINT"
    FACE_ANALYSIS = "FACE_ANALYSIS"
    BBOX = "BBOX"
    SEGS = "SEGS"
    VIDEO = "VIDEO"
    ANY = "*"
    NUMBER = "FLOAT,INT"
    PRIMITIVE = "STRING,FLOAT,INT,BOOLEAN"

    __hash__ = str.__hash__

    def __str__(self) -> str:
        return self.value

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self.value, getattr(other, "value", other)) is True

    def __ne__(self, other: object) -> bool:
        other = getattr(other, "value", other)
        if self.value == "*" or other == "*":
            return False
        if not isinstance(other, str):
            return True
        ours, theirs = set(self.value.split(",")), set(other.split(","))
        return not (ours <= theirs or theirs <= ours)


class InputTypeOptions(TypedDict, total=False):
    """Options of one input; any key is allowed."""

    default: Any
    tooltip: str
    lazy: bool
    forceInput: bool


class HiddenInputTypeDict(TypedDict, total=False):
    """Hidden inputs of a node."""

    prompt: str
    extra_pnginfo: str
    unique_id: str


class InputTypeDict(TypedDict, total=False):
    """What INPUT_TYPES returns."""

    required: dict[str, tuple]
    optional: dict[str, tuple]
    hidden: HiddenInputTypeDict


class FileLocator(TypedDict):
    """A file in a ui result."""

    filename: str
    subfolder: str
    type: str


class ComfyNodeABC:
    """Base class that documents the attributes of a V1 node."""

    DESCRIPTION = ""
    CATEGORY = "sd"
    EXPERIMENTAL = False
    DEPRECATED = False

    @classmethod
    def INPUT_TYPES(cls) -> InputTypeDict:
        return {"required": {}}


class CheckLazyMixin:
    """Asks for every lazy input that is not there yet."""

    def check_lazy_status(self, **kwargs: Any) -> list[str]:
        return [name for name, value in kwargs.items() if value is None]
