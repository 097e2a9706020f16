"""The graph while it runs: the prompt with its expansions, and the list of nodes that still have to run."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from .graph_utils import ExecutionBlocker, is_link
from .node_face import Faces, get_input_info

__all__ = [
    "DependencyCycleError",
    "NodeInputError",
    "NodeNotFoundError",
    "DuplicateNodeError",
    "DynamicPrompt",
    "TopologicalSort",
    "ExecutionList",
    "ExecutionBlocker",
    "get_input_info",
    "links_of",
]


class DependencyCycleError(Exception):
    """Nodes wait for each other. `node_id` is the one to blame on screen."""

    def __init__(self, message: str, node_id: str = ""):
        super().__init__(message)
        self.node_id = node_id


class NodeInputError(Exception):
    """check_lazy_status asked for an input that does not exist or is a constant."""


class NodeNotFoundError(Exception):
    """A link points at a node that is not in the graph."""


class DuplicateNodeError(Exception):
    """An expansion uses an id that the graph already has."""


def links_of(node: dict[str, Any]) -> Iterable[tuple[str, list]]:
    """(input name, link) for every linked input of a prompt entry."""
    return [(name, value) for name, value in node["inputs"].items() if is_link(value)]


class DynamicPrompt:
    """The prompt as it was sent, plus the ephemeral nodes that expansions added to it during the run."""

    def __init__(self, original_prompt: dict[str, dict]):
        self.original_prompt = original_prompt
        self._added: dict[str, dict] = {}
        self._parents: dict[str, str] = {}
        self._display: dict[str, str] = {}

    def get_node(self, node_id: str) -> dict[str, Any]:
        node = self._added.get(node_id)
        if node is None:
            node = self.original_prompt.get(node_id)
            if node is None:
                raise NodeNotFoundError(f"Node {node_id} not found")
        return node

    def has_node(self, node_id: str) -> bool:
        return node_id in self._added or node_id in self.original_prompt

    def add_ephemeral_node(self, node_id: str, node_info: dict, parent_id: str, display_id: str) -> None:
        self._added[node_id] = node_info
        self._parents[node_id] = parent_id
        self._display[node_id] = display_id

    def get_real_node_id(self, node_id: str) -> str:
        """The node of the original prompt that this node was expanded from (itself, if it is one)."""
        while node_id in self._parents:
            node_id = self._parents[node_id]
        return node_id

    def get_parent_node_id(self, node_id: str) -> str | None:
        return self._parents.get(node_id)

    def get_display_node_id(self, node_id: str) -> str:
        """The node on screen that shows this node's progress."""
        seen = set()  # a node may override the display of its children as it likes, in a circle too
        while node_id in self._display and node_id not in seen:
            seen.add(node_id)
            node_id = self._display[node_id]
        return node_id

    def all_node_ids(self) -> set[str]:
        return set(self.original_prompt) | set(self._added)

    def get_original_prompt(self) -> dict[str, dict]:
        return self.original_prompt


class TopologicalSort:
    """Nodes that still have to run and who waits for whom. Nodes may be added while it is being dissolved."""

    def __init__(self, dynprompt: DynamicPrompt, faces: Faces):
        self.dynprompt = dynprompt
        self.faces = faces
        self.pending: dict[str, int] = {}  # node id → order of arrival
        self.blocks: dict[str, int] = {}  # node id → how many nodes or tasks it waits for
        self.blocking: dict[str, dict[str, None]] = {}  # node id → the nodes that wait for it
        self.external_blocks = 0
        self.unblocked = asyncio.Event()
        self._arrivals = itertools.count()

    def is_cached(self, node_id: str) -> bool:
        return False

    def on_ready(self, node_id: str) -> None:
        """A pending node has nothing left to wait for."""

    def is_empty(self) -> bool:
        return not self.pending

    def add_node(self, node_id: str, include_lazy: bool = False) -> None:
        """Add a node and every ancestor that it needs for certain (not those behind lazy inputs, nor cached ones)."""
        to_visit = [node_id]
        added, edges = [], []
        while to_visit:
            current = to_visit.pop()
            if current in self.pending:
                continue
            node = self.dynprompt.get_node(current)
            self.pending[current] = next(self._arrivals)
            self.blocks[current] = 0
            self.blocking[current] = {}
            added.append(current)
            lazy = () if include_lazy else self.faces[node["class_type"]].lazy
            for name, (source, _) in links_of(node):
                if name not in lazy and not self.is_cached(source):
                    to_visit.append(source)
                    edges.append((source, current))
        for source, waiting in edges:
            self._add_edge(source, waiting)
        for current in added:
            if self.blocks[current] == 0:
                self.on_ready(current)

    def add_strong_link(self, from_node_id: str, from_socket: int, to_node_id: str) -> None:
        """Make a pending node wait for another one, which is added when it is not there yet."""
        if not self.is_cached(from_node_id):
            self.add_node(from_node_id)
            self._add_edge(from_node_id, to_node_id)

    def _add_edge(self, source: str, waiting: str) -> None:
        if waiting not in self.blocking[source]:
            self.blocking[source][waiting] = None
            self.blocks[waiting] += 1

    def make_input_strong_link(self, to_node_id: str, to_input: str) -> None:
        """Turn a lazy input of a pending node into a dependency."""
        inputs = self.dynprompt.get_node(to_node_id)["inputs"]
        if to_input not in inputs:
            raise NodeInputError(f"Node {to_node_id} says it needs input {to_input}, but it has no such input")
        if not is_link(inputs[to_input]):
            raise NodeInputError(f"Node {to_node_id} says it needs input {to_input}, but that value is a constant")
        self.add_strong_link(*inputs[to_input], to_node_id)

    def add_external_block(self, node_id: str) -> Callable[[], None]:
        """Park a pending node until the returned function is called (an asynchronous call is under way)."""
        self.external_blocks += 1
        self.blocks[node_id] += 1

        def unblock() -> None:
            self.external_blocks -= 1
            self.blocks[node_id] -= 1
            if self.blocks[node_id] == 0:
                self.on_ready(node_id)
            self.unblocked.set()

        return unblock

    def pop_node(self, node_id: str) -> None:
        """The node is done: those that waited for it wait for one node less."""
        del self.pending[node_id]
        for waiting in self.blocking.pop(node_id):
            self.blocks[waiting] -= 1
            if self.blocks[waiting] == 0:
                self.on_ready(waiting)

    def nodes_in_cycle(self) -> list[str]:
        """What remains when everything that waits for nothing is taken away again and again."""
        remaining = {node_id: 0 for node_id in self.pending}
        for waiting in self.blocking.values():
            for node_id in waiting:
                remaining[node_id] += 1
        free = [node_id for node_id, count in remaining.items() if count == 0]
        while free:
            node_id = free.pop()
            del remaining[node_id]
            for waiting in self.blocking[node_id]:
                remaining[waiting] -= 1
                if remaining[waiting] == 0:
                    free.append(waiting)
        return list(remaining)


class ExecutionList(TopologicalSort):
    """The list that the executor takes nodes from.

    Order among ready nodes is a courtesy, not a promise: outputs and asynchronous nodes first, then nodes that feed an output,
    then nodes two steps away from one, then the others as they arrived.
    """

    def __init__(self, dynprompt: DynamicPrompt, faces: Faces, is_cached: Callable[[str], bool]):
        super().__init__(dynprompt, faces)
        self._is_cached = is_cached
        self._ready: list[tuple[int, int, str]] = []

    def is_cached(self, node_id: str) -> bool:
        return self._is_cached(node_id)

    def on_ready(self, node_id: str) -> None:
        heapq.heappush(self._ready, (self._rank(node_id), self.pending[node_id], node_id))

    def take(self) -> str | None:
        """The next ready node, or None when all wait. The node stays pending until `pop_node` or `put_back`."""
        while self._ready:
            _, arrival, node_id = heapq.heappop(self._ready)
            if self.pending.get(node_id) == arrival and self.blocks[node_id] == 0:
                return node_id
        return None

    def put_back(self, node_id: str) -> None:
        """The node taken last is not done yet; it is ready again at once when it waits for nothing."""
        if self.blocks[node_id] == 0:
            self.on_ready(node_id)

    def cycle_error(self) -> DependencyCycleError:
        """Names the first node that an expansion made, since cycles of the prompt itself do not pass validation."""
        cycle = self.nodes_in_cycle()
        blamed = next((shown for node_id in cycle if (shown := self.dynprompt.get_display_node_id(node_id)) != node_id), cycle[0])
        return DependencyCycleError("Dependency cycle detected: " + " → ".join(cycle[:20]), blamed)

    def _rank(self, node_id: str) -> int:
        face = self._face(node_id)
        if face.output_node or face.is_async:
            return 0
        consumers = self.blocking[node_id]
        if any(self._face(consumer).output_node for consumer in consumers):
            return 1
        if any(self._face(further).output_node for consumer in consumers for further in self.blocking[consumer]):
            return 2
        return 3

    def _face(self, node_id: str):
        return self.faces[self.dynprompt.get_node(node_id)["class_type"]]
