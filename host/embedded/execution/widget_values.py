"""From the widget values of a saved node to named inputs.

The interface stores them by position, with values of widgets that are no inputs in between: what happens to a seed after a
run, the text filter of a drop-down, the upload button. Newer files name them as well (`widgets_values_named`), which wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .node_face import InputFace, NodeFace

__all__ = ["named_widget_values", "has_widget"]

WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
AFTER_GENERATE = frozenset({"fixed", "increment", "increment-wrap", "decrement", "randomize"})
SEED_NAMES = ("seed", "noise_seed")  # integers of these names get the control without asking for it
UPLOADS = {"image_upload": "image", "animated_image_upload": "image", "video_upload": "video", "audio_upload": "audio"}
EMPTY = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}


@dataclass(frozen=True)
class _Place:
    """One position in `widgets_values`: an input's (`name`), or a helper widget's, which `helper` recognises by its value."""

    name: str | None
    helper: Callable[[Any], bool] | None = None


def has_widget(declared: InputFace) -> bool:
    """Whether the interface gives this input a widget (it may still be fed by a link)."""
    if declared.category == "hidden" or declared.options.get("forceInput"):
        return False
    return isinstance(declared.type, (list, tuple)) or str(declared.type) in WIDGET_TYPES


def named_widget_values(node: Mapping[str, Any], face: NodeFace) -> dict[str, Any]:
    """Input name → value for every widget of a node; a value that the file lacks is the input's default."""
    values = {name: _default(declared) for name, declared in face.inputs.items() if has_widget(declared)}
    stored = node.get("widgets_values_named") or node.get("widgets_values")
    if isinstance(stored, Mapping):
        found = ((name, stored[name]) for name in values if name in stored)
    else:
        found = _by_position(list(stored or ()), face)
    values.update((name, value) for name, value in found if value is not None)
    return {name: value for name, value in values.items() if value is not None}


def _by_position(stored: list, face: NodeFace) -> Iterator[tuple[str, Any]]:
    """Walk the places; a helper's place takes a value only while there are more values than inputs, since old files and files
    of other programs leave helpers out."""
    places = _places(face)
    surplus = len(stored) - sum(place.name is not None for place in places)
    position = 0
    for place in places:
        if position >= len(stored):
            return
        if place.name is not None:
            yield place.name, stored[position]
            position += 1
        elif surplus > 0 and place.helper(stored[position]):
            surplus -= 1
            position += 1


def _places(face: NodeFace) -> list[_Place]:
    """Required inputs, the upload button, optional inputs; controls behind the widget that they control."""
    places: list[_Place] = []
    for category in ("required", "optional"):
        for name, declared in face.inputs.items():
            if declared.category == category and has_widget(declared):
                places.append(_Place(name))
                places.extend(_controls(name, declared))
        if category == "required":
            kinds = {kind for declared in face.inputs.values() for option, kind in UPLOADS.items() if declared.options.get(option)}
            places.extend(_Place(None, lambda value, kind=kind: value in (kind, "", None)) for kind in sorted(kinds))
    return places


def _controls(name: str, declared: InputFace) -> Iterator[_Place]:
    is_drop_down = isinstance(declared.type, (list, tuple)) or declared.type == "COMBO"
    by_name = declared.type == "INT" and name in SEED_NAMES
    if declared.options.get("control_after_generate", by_name):
        yield _Place(None, lambda value: isinstance(value, str) and value in AFTER_GENERATE)
        if is_drop_down:
            yield _Place(None, lambda value: isinstance(value, str))


def _default(declared: InputFace) -> Any:
    if "default" in declared.options:
        return declared.options["default"]
    if declared.choices is not None:
        return declared.choices[0] if declared.choices else None
    return EMPTY.get(str(declared.type)) if isinstance(declared.type, str) else None
