"""Constants as nodes, and a look at any value."""

from __future__ import annotations

import json
import sys

from .declare import AnyType, CoreNode, SchemaNode, text

_LIMITS = {"min": -sys.maxsize, "max": sys.maxsize}


class PreviewAny(CoreNode):
    """Any value as text: strings as they are, numbers printed, the rest as JSON or as Python shows it."""

    DISPLAY_NAME = "Preview Any"
    CATEGORY = "utils"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_preview_any"
    REQUIRED = {"source": (AnyType("*"), {})}
    OUTPUT_NODE = True
    FUNCTION = "main"

    def main(self, source=None):
        return {"ui": {"text": (_shown(source),)}}


def _shown(value) -> str:
    if value is None:
        return "None"
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    for show in (json.dumps, str):
        try:
            return show(value)
        except Exception:  # any object may arrive here, and its own __str__ may fail
            continue
    return "source exists, but could not be serialized."


class _Primitive(SchemaNode):
    CATEGORY = "utils/primitive"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_primitive"
    FUNCTION = "execute"

    def execute(self, value):
        return (value,)


class PrimitiveString(_Primitive):
    """A line of text."""

    DISPLAY_NAME = "String"
    REQUIRED = {"value": text(multiline=False)}
    RETURN_TYPES = ("STRING",)


class PrimitiveStringMultiline(_Primitive):
    """Text of many lines."""

    DISPLAY_NAME = "String (Multiline)"
    REQUIRED = {"value": text(multiline=True)}
    RETURN_TYPES = ("STRING",)


class PrimitiveInt(_Primitive):
    """A whole number."""

    DISPLAY_NAME = "Int"
    REQUIRED = {"value": ("INT", {**_LIMITS, "control_after_generate": True})}
    RETURN_TYPES = ("INT",)


class PrimitiveFloat(_Primitive):
    """A number."""

    DISPLAY_NAME = "Float"
    REQUIRED = {"value": ("FLOAT", dict(_LIMITS))}
    RETURN_TYPES = ("FLOAT",)


class PrimitiveBoolean(_Primitive):
    """Yes or no."""

    DISPLAY_NAME = "Boolean"
    REQUIRED = {"value": ("BOOLEAN", {})}
    RETURN_TYPES = ("BOOLEAN",)
