"""How a core node is declared: a table of inputs, the output types, and the method that ComfyUI calls by the same name.

Ids, inputs, defaults and texts are ComfyUI 0.3.64's, because graphs, interfaces and scripts are written against them; a test
compares them with a recorded /object_info. Bodies import torch themselves, so that listing the nodes does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "MAX_RESOLUTION", "CoreNode", "SchemaNode", "AnyType", "integer", "number", "boolean", "text", "combo", "files", "seed",
    "MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "MASK", "NOISE", "GUIDER", "SAMPLER", "SIGMAS", "tip",
]  # fmt: skip

MAX_RESOLUTION = 16384

InputSpec = tuple  # (type,) or (type, options), as INPUT_TYPES returns it

MODEL: InputSpec = ("MODEL",)
CLIP: InputSpec = ("CLIP",)
VAE: InputSpec = ("VAE",)
CONDITIONING: InputSpec = ("CONDITIONING",)
LATENT: InputSpec = ("LATENT",)
IMAGE: InputSpec = ("IMAGE",)
MASK: InputSpec = ("MASK",)
NOISE: InputSpec = ("NOISE",)
GUIDER: InputSpec = ("GUIDER",)
SAMPLER: InputSpec = ("SAMPLER",)
SIGMAS: InputSpec = ("SIGMAS",)


class AnyType(str):
    """A socket type that every other type fits: ComfyUI asks `received != wanted` first."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def tip(spec: InputSpec, tooltip: str) -> InputSpec:
    """The same input with a hover text."""
    return (spec[0], {**(spec[1] if len(spec) > 1 else {}), "tooltip": tooltip})


def integer(default: int, low: int, high: int, step: int | None = None, **options: Any) -> InputSpec:
    """An INT; `low` and `high` are inclusive."""
    return ("INT", {"default": default, "min": low, "max": high} | ({} if step is None else {"step": step}) | options)


def number(default: float, low: float, high: float, step: float, **options: Any) -> InputSpec:
    """A FLOAT; `low` and `high` are inclusive."""
    return ("FLOAT", {"default": default, "min": low, "max": high, "step": step, **options})


def boolean(default: bool, **options: Any) -> InputSpec:
    return ("BOOLEAN", {"default": default, **options})


def text(**options: Any) -> InputSpec:
    return ("STRING", options)


def combo(*values: str, **options: Any) -> InputSpec:
    return (list(values), options) if options else (list(values),)


def seed(**options: Any) -> InputSpec:
    return integer(0, 0, 0xFFFFFFFFFFFFFFFF, control_after_generate=True, **options)


def files(kind: str, **options: Any) -> Callable[[], InputSpec]:
    """A drop-down of the installed files of a model kind, read each time the node is described."""

    def installed() -> InputSpec:
        from ..folder_paths import get_filename_list

        return combo(*get_filename_list(kind), **options)

    return installed


class CoreNode:
    """A node under ComfyUI's class id, which is the class's name.

    A subclass sets REQUIRED and OPTIONAL (input name → spec, or a function that gives the spec), HIDDEN, RETURN_TYPES,
    FUNCTION (ComfyUI's method name, for packs that call core nodes directly), CATEGORY and where they differ from the
    defaults DISPLAY_NAME, DESCRIPTION, RETURN_NAMES, OUTPUT_TOOLTIPS, OUTPUT_NODE and RELATIVE_PYTHON_MODULE.
    """

    DISPLAY_NAME: str | None = None
    DESCRIPTION = ""
    REQUIRED: Mapping[str, InputSpec | Callable[[], InputSpec]] = {}
    OPTIONAL: Mapping[str, InputSpec | Callable[[], InputSpec]] = {}
    HIDDEN: Mapping[str, str] = {}
    RETURN_TYPES: tuple[str, ...] = ()
    RELATIVE_PYTHON_MODULE = "nodes"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict]:
        table: dict[str, dict] = {"required": cls._specs(cls.REQUIRED)}
        if cls.OPTIONAL:
            table["optional"] = cls._specs(cls.OPTIONAL)
        if cls.HIDDEN:
            table["hidden"] = dict(cls.HIDDEN)
        return table

    @classmethod
    def _specs(cls, declared: Mapping[str, Any]) -> dict[str, tuple]:
        """Fresh copies: whoever reads the table may write into it."""
        specs = {name: spec() if callable(spec) else spec for name, spec in declared.items()}
        return {name: tuple(part.copy() if isinstance(part, (list, dict)) else part for part in spec) for name, spec in specs.items()}


class SchemaNode(CoreNode):
    """A core node that ComfyUI 0.3.64 declares with its V3 schema: /object_info writes such a node a little differently."""

    OUTPUT_TOOLTIPS: tuple[str | None, ...] = ()
    EXPERIMENTAL = False

    @classmethod
    def _specs(cls, declared: Mapping[str, Any]) -> dict[str, tuple]:
        specs = {}
        for name, (kind, *options) in super()._specs(declared).items():
            options = options[0] if options else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {**options, "multiselect": False, "options": kind}
            specs[name] = (kind, options)
        return specs

    @classmethod
    def node_info(cls) -> dict[str, Any]:
        inputs = cls.INPUT_TYPES()
        outputs = list(cls.RETURN_TYPES)
        return {
            "input": inputs,
            "input_order": {group: list(table) for group, table in inputs.items()},
            "output": outputs,
            "output_is_list": list(getattr(cls, "OUTPUT_IS_LIST", [False] * len(outputs))),
            "output_name": list(getattr(cls, "RETURN_NAMES", outputs)),
            "output_tooltips": list(cls.OUTPUT_TOOLTIPS) or [None] * len(outputs),
            "name": cls.__name__,
            "display_name": cls.DISPLAY_NAME,
            "description": inspect.cleandoc(cls.DESCRIPTION),
            "python_module": cls.RELATIVE_PYTHON_MODULE,
            "category": cls.CATEGORY,
            "output_node": getattr(cls, "OUTPUT_NODE", False),
            "deprecated": False,
            "experimental": cls.EXPERIMENTAL,
            "api_node": False,
        }
