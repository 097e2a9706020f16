"""What a node may use to build a graph: links, GraphBuilder for `expand`, ExecutionBlocker.

Names and signatures are those of ComfyUI's `comfy_execution.graph_utils`, so that a node written for it finds its way here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

__all__ = ["is_link", "ExecutionBlocker", "GraphBuilder", "Node", "add_graph_prefix"]


def is_link(value: object) -> bool:
    """Whether a prompt value is a link `[node id, output slot]`; every other value is a constant."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))


class ExecutionBlocker:
    """An output that stops its consumers from running.

    With a message, the first consumer it meets reports the message as an error and passes a silent blocker on;
    with None, consumers are skipped silently. In a list only the calls that would receive it are skipped.
    """

    def __init__(self, message: str | None):
        self.message = message


@dataclass
class _Prefix:
    """Where graphs built by the running node get their ids from: `<node>.<call>.<graph>.`"""

    root: str
    call: int
    graphs: Iterator[int]


_running: ContextVar[_Prefix | None] = ContextVar("rectiflow_graph_prefix", default=None)


class Node:
    """One node of a GraphBuilder."""

    def __init__(self, id: str, class_type: str, inputs: dict[str, Any]):
        self.id = id
        self.class_type = class_type
        self.inputs = inputs
        self.override_display_id: str | None = None

    def out(self, index: int) -> list:
        """The link to output `index`."""
        return [self.id, index]

    def get_input(self, key: str) -> Any:
        return self.inputs.get(key)

    def set_input(self, key: str, value: Any) -> None:
        """Set an input; None removes it."""
        if value is None:
            self.inputs.pop(key, None)
        else:
            self.inputs[key] = value

    def set_override_display_id(self, override_display_id: str) -> None:
        """Show this node's progress on another node of the graph than the expanding one."""
        self.override_display_id = override_display_id

    def serialize(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"class_type": self.class_type, "inputs": self.inputs}
        if self.override_display_id is not None:
            entry["override_display_id"] = self.override_display_id
        return entry


class GraphBuilder:
    """Builds a prompt-format graph whose ids are unique in the run and the same on every run of the same prompt.

    Args:
        prefix: put before every id; by default derived from the node, the call and the graph being built.
    """

    def __init__(self, prefix: str | None = None):
        self.prefix = GraphBuilder.alloc_prefix() if prefix is None else prefix
        self.nodes: dict[str, Node] = {}
        self._ids = itertools.count(1)

    @classmethod
    def set_default_prefix(cls, prefix_root: str, call_index: int, graph_index: int = 0) -> None:
        """Called by the executor before each call of a node; holds for that call's context only."""
        _running.set(_Prefix(prefix_root, call_index, itertools.count(graph_index)))

    @classmethod
    def alloc_prefix(cls, root: str | None = None, call_index: int | None = None, graph_index: int | None = None) -> str:
        running = _running.get()
        if running is None:
            running = _Prefix("", 0, itertools.count())
            _running.set(running)
        root = running.root if root is None else root
        call_index = running.call if call_index is None else call_index
        graph_index = next(running.graphs) if graph_index is None else graph_index
        return f"{root}.{call_index}.{graph_index}."

    def node(self, class_type: str, id: str | None = None, **inputs: Any) -> Node:
        """Add a node (or return the one that already has this id); `inputs` are constants or links."""
        full_id = self.prefix + (str(next(self._ids)) if id is None else id)
        if full_id not in self.nodes:
            self.nodes[full_id] = Node(full_id, class_type, inputs)
        return self.nodes[full_id]

    def lookup_node(self, id: str) -> Node | None:
        return self.nodes.get(self.prefix + id)

    def remove_node(self, id: str) -> None:
        del self.nodes[self.prefix + id]

    def replace_node_output(self, node_id: str, index: int, new_value: Any) -> None:
        """Replace every link to an output by another value; None removes the inputs that used it."""
        old = [self.prefix + node_id, index]
        for node in self.nodes.values():
            for key in [key for key, value in node.inputs.items() if is_link(value) and value == old]:
                node.set_input(key, new_value)

    def finalize(self) -> dict[str, dict]:
        """The graph in prompt format, for the `expand` key of a node's result."""
        return {node_id: node.serialize() for node_id, node in self.nodes.items()}


def add_graph_prefix(graph: Mapping[str, Mapping], outputs: Sequence, prefix: str) -> tuple[dict[str, dict], tuple]:
    """Copy a prompt-format graph with `prefix` before every id, in its links and in `outputs` too."""

    def moved(value):
        return [prefix + value[0], value[1]] if is_link(value) else value

    renamed = {
        prefix + node_id: {
            "class_type": node["class_type"],
            "inputs": {name: moved(value) for name, value in node.get("inputs", {}).items()},
        }
        for node_id, node in graph.items()
    }
    return renamed, tuple(moved(value) for value in outputs)
