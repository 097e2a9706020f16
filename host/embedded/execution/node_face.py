"""What the engine knows of a node class, read once per validation or run.

INPUT_TYPES may list folders, so it is neither called per input nor kept between runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["InputFace", "NodeFace", "Faces", "UnknownNodeClass", "get_input_info"]


class UnknownNodeClass(LookupError):
    """A graph names a class that is not registered."""


@dataclass(frozen=True)
class InputFace:
    """One declared input: its type (a string, or a list of choices), where it was declared, its options."""

    type: Any
    category: str
    options: Mapping[str, Any]

    @property
    def choices(self) -> list | tuple | None:
        """The allowed values of a drop-down, in either of its two spellings; None for any other input."""
        if isinstance(self.type, (list, tuple)):
            return self.type
        if self.type == "COMBO" and isinstance(self.options.get("options"), (list, tuple)) and not self.options.get("multiselect"):
            return self.options["options"]
        return None

    def as_config(self) -> tuple:
        """`[type, options]`, as errors show it."""
        return (self.type, self.options)


def _read_input(declared: Any, category: str) -> InputFace:
    if isinstance(declared, str):  # hidden inputs are bare names
        return InputFace(declared, category, {})
    return InputFace(declared[0], category, declared[1] if len(declared) > 1 else {})


class NodeFace:
    """The attributes of a V1 node class that steer execution, with ComfyUI's defaults filled in."""

    def __init__(self, class_type: str, cls: type):
        self.class_type = class_type
        self.cls = cls
        types = cls.INPUT_TYPES()
        self.inputs: dict[str, InputFace] = {}
        for category in ("required", "optional", "hidden"):
            for name, declared in (types.get(category) or {}).items():
                self.inputs.setdefault(name, _read_input(declared, category))
        self.hidden: dict[str, str] = dict(types.get("hidden") or {})
        self.lazy = frozenset(name for name, declared in self.inputs.items() if declared.options.get("lazy"))
        self.raw_links = frozenset(name for name, declared in self.inputs.items() if declared.options.get("rawLink"))
        self.output_node = getattr(cls, "OUTPUT_NODE", False) is True
        self.input_is_list = bool(getattr(cls, "INPUT_IS_LIST", False))
        self.output_is_list = getattr(cls, "OUTPUT_IS_LIST", None)
        self.is_async = inspect.iscoroutinefunction(getattr(cls, getattr(cls, "FUNCTION", ""), None))
        self.has_lazy_check = getattr(cls, "check_lazy_status", None) is not None
        self.has_change_token = hasattr(cls, "IS_CHANGED")
        self.keyed_by_id = bool(getattr(cls, "NOT_IDEMPOTENT", False)) or "UNIQUE_ID" in self.hidden.values()

    @property
    def return_types(self) -> tuple:
        return tuple(self.cls.RETURN_TYPES)

    def declared(self) -> list[tuple[str, InputFace]]:
        """Required and optional inputs in their order of declaration."""
        return [(name, face) for name, face in self.inputs.items() if face.category != "hidden"]


class Faces:
    """NodeFace by class id, made on first use."""

    def __init__(self, classes: Mapping[str, type]):
        self._classes = classes
        self._faces: dict[str, NodeFace] = {}

    def __getitem__(self, class_type: str) -> NodeFace:
        face = self._faces.get(class_type)
        if face is None:
            if class_type not in self._classes:
                raise UnknownNodeClass(f"node class {class_type!r} is not registered")
            face = self._faces[class_type] = NodeFace(class_type, self._classes[class_type])
        return face


def get_input_info(class_def: type, input_name: str, valid_inputs: Mapping | None = None) -> tuple:
    """(type, category, options) of one input of a class, or three times None when it is not declared."""
    types = valid_inputs or class_def.INPUT_TYPES()
    for category in ("required", "optional", "hidden"):
        if input_name in types.get(category, {}):
            face = _read_input(types[category][input_name], category)
            return face.type, face.category, face.options
    return None, None, None
