"""`--set NODE.INPUT=VALUE`: change an input of a graph before it runs."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .failures import CommandError, node_name

__all__ = ["Override", "apply_overrides", "parse_override", "refuse_non_finite"]

FORM = "--set NODE.INPUT=VALUE, for example --set KSampler.seed=7"


@dataclass(frozen=True)
class Override:
    """node: id, class_type or title. value: the text as it was typed."""

    node: str
    input_name: str
    value: str


def parse_override(text: str) -> Override:
    """Read `NODE.INPUT=VALUE`; the node may hold dots, the input may not."""
    target, equals, value = text.partition("=")
    node, dot, input_name = target.rpartition(".")
    if not (equals and dot and node.strip() and input_name.strip()):
        raise CommandError(f"--set got '{text}'; the form is {FORM}.")
    return Override(node.strip(), input_name.strip(), value)


def apply_overrides(prompt: dict[str, Any], overrides: Iterable[Override], object_info: Mapping[str, Mapping]) -> None:
    """Change the prompt in place.

    Args:
        prompt: a graph in API format. object_info: node class → its description, as /object_info gives it.

    Raises:
        CommandError: no or several nodes fit, or the node has no such input.
    """
    for override in overrides:
        node_id = find_node(prompt, override.node)
        node = prompt[node_id]
        inputs = node.setdefault("inputs", {})
        declared = _declared_inputs(object_info.get(node.get("class_type")) or {})
        if override.input_name not in inputs and override.input_name not in declared:
            known = [*declared, *(name for name in inputs if name not in declared)]
            nearest = difflib.get_close_matches(override.input_name, known, n=1) or known
            message = f"--set: {node_name(node_id, prompt)} has no input '{override.input_name}'. It has: {', '.join(nearest)}."
            raise CommandError(message.replace("It has", "The nearest is") if len(nearest) == 1 and len(known) > 1 else message)
        inputs[override.input_name] = read_value(override.value, declared.get(override.input_name))


def _declared_inputs(description: Mapping[str, Any]) -> dict[str, Any]:
    groups = description.get("input") or {}
    return {name: spec for group in ("required", "optional") for name, spec in (groups.get(group) or {}).items()}


def find_node(prompt: Mapping[str, Any], name: str) -> str:
    """The id of the node with that id, else with that class_type, else with that title."""
    nodes = {node_id: node for node_id, node in prompt.items() if isinstance(node, dict)}
    if name in nodes:
        return name
    by_class = [node_id for node_id, node in nodes.items() if node.get("class_type") == name]
    by_title = [node_id for node_id, node in nodes.items() if (node.get("_meta") or {}).get("title") == name]
    found = by_class or by_title
    if len(found) == 1:
        return found[0]
    if found:
        raise CommandError(f"--set: {len(found)} nodes are called '{name}'; give the id of one: {', '.join(found)}.")
    listed = ", ".join(node_name(node_id, prompt) for node_id in list(nodes)[:30])
    raise CommandError(f"--set: the graph has no node '{name}'. It has: {listed}.")


def read_value(text: str, spec: Any) -> Any:
    """JSON where it is JSON, else the text itself; text that a STRING input takes stays text even if it looks like a number."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    is_text_input = isinstance(spec, (list, tuple)) and spec and spec[0] == "STRING"
    return text if is_text_input and not isinstance(value, (str, list)) else value


def refuse_non_finite(prompt: Mapping[str, Any]) -> None:
    """JSON knows no NaN and no Infinity, Python's reader takes them: no range check would catch a NaN later.

    Raises:
        CommandError: an input holds one.
    """
    for node_id, node in prompt.items():
        inputs = node.get("inputs") if isinstance(node, dict) else None
        for name, value in (inputs if isinstance(inputs, dict) else {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise CommandError(f"{node_name(node_id, prompt)}: input '{name}' got {value}; allowed: a finite number. Enter a number.")
