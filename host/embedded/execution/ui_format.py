"""From the graph that the interface saves to the prompt that it would queue.

What the interface does when a person presses Run is done here without it: Note, Reroute and PrimitiveNode vanish, muted nodes
are left out, bypassed ones are replaced by an input of matching type, subgraphs are unfolded (ids `parent:child`), and
widget values get the names of their inputs. Reads schema 0.4 (links as lists) and schema 1 (links as objects).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import NodeInputError, input_error
from .node_face import Faces
from .registry import NodeRegistry
from .widget_values import named_widget_values

__all__ = ["is_ui_format", "ui_to_prompt"]

MUTED, BYPASSED = 2, 4
NOTES = frozenset({"Note", "MarkdownNote"})
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
ANY_TYPE = ("*", "", 0, -1, None)
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = "-10", "-20"


def is_ui_format(graph: Any) -> bool:
    """Whether a JSON object is a graph as the interface saves it (not a prompt)."""
    return isinstance(graph, Mapping) and isinstance(graph.get("nodes"), list) and not isinstance(graph.get("class_type"), str)


def ui_to_prompt(workflow: Mapping[str, Any], registry: NodeRegistry) -> dict[str, dict]:
    """Convert a saved workflow.

    Classes that are not registered are kept with what is known of them, so that validation names them; those without any
    slot are decoration and are left out.

    Raises:
        NodeInputError: the file does not hold together (a link to nothing, a circle of reroutes, a subgraph inside itself).
    """
    try:
        return _Converter(workflow, registry).convert()
    except NodeInputError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        found = f"{type(error).__name__}: {error}"
        raise _damaged("workflow", found, "a graph as ComfyUI saves it") from error


def _damaged(where: str, found: object, allowed: str) -> NodeInputError:
    return input_error("UI workflow", where, found, allowed, "Open it in the interface and save it again.")


@dataclass(frozen=True)
class _Link:
    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True)
class _Constant:
    """What an input resolves to when a PrimitiveNode or a subgraph's own widget feeds it."""

    value: Any


def _read_links(stored: Iterable) -> dict[str, _Link]:
    links = {}
    for link in stored or ():
        if isinstance(link, Mapping):
            ends = (link["id"], link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"])
        else:
            ends = tuple(link)[:5]
        links[str(ends[0])] = _Link(str(ends[1]), int(ends[2]), str(ends[3]), int(ends[4]))
    return links


class _Level:
    """The root graph, or one unfolded instance of a subgraph.

    path: ids of the subgraph nodes that lead here. host: the subgraph node in the parent level.
    """

    def __init__(self, data: Mapping, path: tuple[str, ...] = (), parent: _Level | None = None, host: Mapping | None = None):
        self.data = data
        self.path = path
        self.parent = parent
        self.host = host
        self.nodes = {str(node["id"]): node for node in data["nodes"]}
        self.links = _read_links(data.get("links"))
        self.children: dict[str, _Level] = {}

    def run_id(self, node: Mapping) -> str:
        return ":".join((*self.path, str(node["id"])))

    def link_into(self, node: Mapping, slot: int) -> _Link | None:
        link_id = _slots(node, "inputs")[slot].get("link")
        if link_id is None:
            return None
        if str(link_id) not in self.links:
            raise _damaged(f"node {self.run_id(node)}", f"link {link_id}", "links that the file contains")
        return self.links[str(link_id)]

    def link_out(self, slot: int) -> _Link | None:
        """The inner link that feeds an output of this subgraph."""
        outlet = str((self.data.get("outputNode") or {}).get("id", SUBGRAPH_OUTPUT))
        return next((link for link in self.links.values() if link.target == outlet and link.target_slot == slot), None)

    def comes_from_host(self, link: _Link) -> bool:
        return self.parent is not None and link.origin == str((self.data.get("inputNode") or {}).get("id", SUBGRAPH_INPUT))

    def host_slot(self, link: _Link) -> int | None:
        """Which input of the subgraph node stands for the inlet that a link starts at; names count, then places."""
        inputs = _slots(self.host, "inputs")
        name = self.data["inputs"][link.origin_slot].get("name")
        by_name = [slot for slot, declared in enumerate(inputs) if declared.get("name") == name]
        if by_name:
            return by_name[0]
        return link.origin_slot if link.origin_slot < len(inputs) else None


def _slots(node: Mapping, side: str) -> list[Mapping]:
    return node.get(side) or []


class _Converter:
    def __init__(self, workflow: Mapping[str, Any], registry: NodeRegistry):
        self.registry = registry
        self.faces = Faces(registry)
        self.subgraphs = dict(_definitions(workflow))
        self.root = _Level(workflow)

    def convert(self) -> dict[str, dict]:
        prompt: dict[str, dict] = {}
        for level in self._unfold(self.root, frozenset()):
            for node in sorted(level.nodes.values(), key=lambda node: node.get("order", 0)):
                if self._runs(level, node):
                    prompt[level.run_id(node)] = self._entry(level, node)
        for entry in prompt.values():
            for name in [name for name, value in entry["inputs"].items() if isinstance(value, list) and value[0] not in prompt]:
                del entry["inputs"][name]
        return prompt

    def _unfold(self, level: _Level, inside: frozenset[str]) -> Iterator[_Level]:
        """A level and, depth first, those of its active subgraph nodes."""
        inner: list[_Level] = []
        for node_id, node in level.nodes.items():
            definition = self.subgraphs.get(str(node["type"]))
            if definition is None or node.get("mode", 0) in (MUTED, BYPASSED):
                continue
            if str(node["type"]) in inside:
                raise _damaged(f"node {level.run_id(node)}", definition.get("name"), "subgraphs that do not contain themselves")
            level.children[node_id] = _Level(definition, (*level.path, node_id), level, node)
            inner.extend(self._unfold(level.children[node_id], inside | {str(node["type"])}))
        yield level
        yield from inner

    def _runs(self, level: _Level, node: Mapping) -> bool:
        kind = str(node["type"])
        if node.get("mode", 0) in (MUTED, BYPASSED) or kind in NOTES or kind in (REROUTE, PRIMITIVE) or kind in self.subgraphs:
            return False
        return kind in self.registry or bool(_slots(node, "inputs") or _slots(node, "outputs"))

    def _entry(self, level: _Level, node: Mapping) -> dict[str, Any]:
        kind = str(node["type"])
        if kind in self.registry:
            values = named_widget_values(node, self.faces[kind])
            title = node.get("title") or self.registry.display_names.get(kind, kind)
        else:
            values = dict(node.get("widgets_values_named") or {})
            title = node.get("title") or kind
        values.update(_promoted_by_proxy(level, node))
        inputs = {name: _as_constant(value) for name, value in values.items()}
        for slot, declared in enumerate(_slots(node, "inputs")):
            source = self._source_of(level, node, slot)
            if isinstance(source, _Constant):
                inputs[declared["name"]] = _as_constant(source.value)
            elif source is not None:
                inputs[declared["name"]] = source
        return {"inputs": inputs, "class_type": kind, "_meta": {"title": title}}

    def _source_of(self, level: _Level, node: Mapping, slot: int) -> list | _Constant | None:
        """Follow what feeds an input, through reroutes, bypassed nodes and the walls of subgraphs, to a node that runs."""
        wanted = _slots(node, "inputs")[slot].get("type")
        seen: set[tuple] = set()
        while True:
            here = (level.path, str(node["id"]), slot)
            if here in seen:
                raise _damaged(f"node {level.run_id(node)}", "a circle of links", "reroutes and subgraphs that lead to a node")
            seen.add(here)
            link = level.link_into(node, slot)
            if link is None:
                return None
            step = self._step_over(level, link, wanted)
            if not isinstance(step, _Inlet):
                return step
            level, node, slot, wanted = step.level, step.node, step.slot, step.wanted

    def _step_over(self, level: _Level, link: _Link, wanted: Any) -> list | _Constant | _Inlet | None:
        """From a link to the output it starts at, or to the input behind it where nothing runs in between."""
        while True:
            if level.comes_from_host(link):
                return _through_wall(level, link)
            origin = level.nodes.get(link.origin)
            if origin is None:
                raise _damaged(f"a link of graph {':'.join(level.path) or 'root'}", link.origin, "nodes that the file contains")
            kind = str(origin["type"])
            if origin.get("mode", 0) == MUTED or kind in NOTES:
                return None
            if origin.get("mode", 0) == BYPASSED:
                slot = _bypass_slot(origin, link.origin_slot, wanted)
                return None if slot is None else _Inlet(level, origin, slot, _slots(origin, "inputs")[slot].get("type"))
            if kind == PRIMITIVE:
                values = origin.get("widgets_values") or [None]
                return _Constant(values[0])
            if kind == REROUTE:
                return _Inlet(level, origin, 0, wanted)
            if kind not in self.subgraphs:
                return [level.run_id(origin), link.origin_slot]
            level = level.children[link.origin]
            inner = level.link_out(link.origin_slot)
            if inner is None:
                return None
            link = inner


@dataclass(frozen=True)
class _Inlet:
    """An input that stands in for an output, and the type that is looked for behind it."""

    level: _Level
    node: Mapping
    slot: int
    wanted: Any


def _through_wall(level: _Level, link: _Link) -> _Inlet | _Constant | None:
    """Out of a subgraph: to what feeds its node, or to the value of the widget that its node shows instead."""
    slot = level.host_slot(link)
    if slot is None:
        return None
    declared = _slots(level.host, "inputs")[slot]
    if declared.get("link") is not None:
        return _Inlet(level.parent, level.host, slot, declared.get("type"))
    if not declared.get("widget"):
        return None
    named = level.host.get("widgets_values_named") or {}
    if declared["name"] in named:
        return _Constant(named[declared["name"]])
    shown = [slot_["name"] for slot_ in _slots(level.host, "inputs") if slot_.get("widget")]
    stored = level.host.get("widgets_values") or []
    if isinstance(stored, list) and len(stored) == len(shown):
        value = stored[shown.index(declared["name"])]
        return None if value is None else _Constant(value)
    return None  # the inner node's own widget holds the value


def _promoted_by_proxy(level: _Level, node: Mapping) -> dict[str, Any]:
    """Values that the subgraph node shows for widgets of this inner node (`properties.proxyWidgets`, in the order of its values)."""
    if level.host is None:
        return {}
    proxies = (level.host.get("properties") or {}).get("proxyWidgets")
    stored = level.host.get("widgets_values")
    if not isinstance(proxies, list) or not isinstance(stored, list) or len(proxies) != len(stored):
        return {}
    mine = ((proxy[1], value) for proxy, value in zip(proxies, stored) if str(proxy[0]) == str(node["id"]))
    return {name: value for name, value in mine if value is not None}


def _definitions(graph: Mapping) -> Iterator[tuple[str, Mapping]]:
    """Every subgraph definition, those inside of definitions too."""
    for definition in (graph.get("definitions") or {}).get("subgraphs") or ():
        yield str(definition["id"]), definition
        yield from _definitions(definition)


def _as_constant(value: Any) -> Any:
    """A list is wrapped, since a bare one means a link."""
    return {"__value__": value} if isinstance(value, list) else value


def _bypass_slot(node: Mapping, output: int, wanted: Any) -> int | None:
    """Which input a bypassed node hands on for an output: the one across, else the first of the same type, else of a fitting one."""
    inputs = _slots(node, "inputs")
    if wanted in ("*", ""):
        return (output if output < len(inputs) else 0) if inputs else None
    made = _slots(node, "outputs")[output].get("type")

    def fits(slot: int) -> bool:
        return _connects(inputs[slot].get("type"), made) and _connects(inputs[slot].get("type"), wanted)

    if output < len(inputs) and fits(output):
        return output
    same = (slot for slot, declared in enumerate(inputs) if declared.get("type") == wanted)
    return next(same, next(filter(fits, range(len(inputs))), None))


def _connects(one: Any, other: Any) -> bool:
    """The interface's rule for links: equal, any, or an overlap of comma-separated types, without regard to case."""
    if one in ANY_TYPE or other in ANY_TYPE or one == other:
        return True
    return bool({part.strip() for part in str(one).lower().split(",")} & {part.strip() for part in str(other).lower().split(",")})
