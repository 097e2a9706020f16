"""Who is running, and how far: the executing context of a call and the progress of every node of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, NamedTuple

from .graph import DynamicPrompt

__all__ = [
    "ExecutionContext",
    "get_executing_context",
    "executing_node",
    "NodeState",
    "ProgressRegistry",
    "get_progress_state",
    "current_progress",
]


class ExecutionContext(NamedTuple):
    """The node call that the current thread of execution is in; `list_index` counts the calls over input lists."""

    prompt_id: str
    node_id: str
    list_index: int | None


_executing: ContextVar[ExecutionContext | None] = ContextVar("rectiflow_executing", default=None)


def get_executing_context() -> ExecutionContext | None:
    """The running node call, or None outside of one (a thread that a node started itself, for instance)."""
    return _executing.get()


class executing_node:
    """`with executing_node(prompt_id, node_id, index): …` makes this call the executing context."""

    def __init__(self, prompt_id: str, node_id: str, list_index: int | None = None):
        self._context = ExecutionContext(prompt_id, node_id, list_index)

    def __enter__(self) -> ExecutionContext:
        self._token = _executing.set(self._context)
        return self._context

    def __exit__(self, *exc: object) -> None:
        _executing.reset(self._token)


class NodeState(str, Enum):
    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    ERROR = "error"


class ProgressRegistry:
    """Progress of the nodes of one run.

    `nodes` maps a node id to the entry that a `progress_state` message carries: value, max, state, node_id, prompt_id,
    display_node_id, parent_node_id, real_node_id. An entry is replaced, never changed, so a message may hold on to it.

    Args:
        listener: called with (node id, preview or None) after each change; the preview is ("JPEG" | "PNG", PIL image, largest side).
    """

    def __init__(self, prompt_id: str, dynprompt: DynamicPrompt, listener: Callable[[str, Any], None] | None = None):
        self.prompt_id = prompt_id
        self.dynprompt = dynprompt
        self.nodes: dict[str, dict[str, Any]] = {}
        self._listener = listener

    def close(self) -> None:
        """Stop telling: the listener belongs to the run that holds this registry, a circle that would outlive the run."""
        self._listener = None

    def start_progress(self, node_id: str) -> None:
        self._set(node_id, NodeState.RUNNING, 0.0, 1.0)

    def update_progress(self, node_id: str, value: float, max_value: float, image: Any = None) -> None:
        self._set(node_id, NodeState.RUNNING, value, max_value, image)

    def finish_progress(self, node_id: str) -> None:
        entry = self.nodes.get(node_id)
        maximum = entry["max"] if entry else 1
        self._set(node_id, NodeState.FINISHED, maximum, maximum)

    def fail_progress(self, node_id: str) -> None:
        """Mark a node as failed; nobody is told, the error message says it."""
        if node_id in self.nodes:
            self.nodes[node_id] = {**self.nodes[node_id], "state": NodeState.ERROR.value}

    def where(self, node_id: str) -> dict[str, str | None]:
        """The ids that place a node on screen: itself, the node that shows it, the one that expanded into it, the one in the prompt."""
        return {
            "node_id": node_id,
            "display_node_id": self.dynprompt.get_display_node_id(node_id),
            "parent_node_id": self.dynprompt.get_parent_node_id(node_id),
            "real_node_id": self.dynprompt.get_real_node_id(node_id),
        }

    def _set(self, node_id: str, state: NodeState, value: float, maximum: float, preview: Any = None) -> None:
        entry = {"value": value, "max": maximum, "state": state.value, "prompt_id": self.prompt_id}
        self.nodes[node_id] = {**entry, **self.where(node_id)}
        if self._listener is not None:
            self._listener(node_id, preview)


_progress: ContextVar[ProgressRegistry | None] = ContextVar("rectiflow_progress", default=None)


def get_progress_state() -> ProgressRegistry:
    """The registry of the run that the caller is part of; an unconnected one outside of any run."""
    return _progress.get() or ProgressRegistry("", DynamicPrompt({}))


@contextmanager
def current_progress(registry: ProgressRegistry) -> Iterator[ProgressRegistry]:
    token = _progress.set(registry)
    try:
        yield registry
    finally:
        _progress.reset(token)
