"""Writes the interface's form of every graph from its API twin, so that the two never drift.

    python -m rectiflow.workflows.build              the UI files beside this script
    python -m rectiflow.workflows.build --pictures   also runs each graph and writes its picture

workflows/api/<name>.json is what people edit; workflows/<name>.json is what the template browser lists. Nodes are laid out in
columns: a node stands right of everything it reads from.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .notes import NOTES

__all__ = ["NOTES", "api_graph", "graph_names", "object_info", "to_ui"]

FOLDER = Path(__file__).parent
NAMESPACE = uuid.UUID("6f2b7f0e-6a39-4cf5-93a8-4d0b6c7a1c55")  # any fixed one: a graph's id follows from its name
CORE_VERSION = "0.3.64"
WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
OPTIONAL_SHAPE = 7  # the interface's number for the hollow circle of an optional socket

# Pixels of the interface's canvas.
COLUMN_GAP, ROW_GAP, TITLE, SLOT, WIDGET, TEXT_BOX, PREVIEW = 60, 40, 30, 20, 24, 90, 280
WIDTH, WIDE, NOTE_HEIGHT, COLUMN_HEIGHT = 270, 340, 150, 1200
PICTURE_NODES = frozenset({"SaveImage", "PreviewImage"})
DRAWING = frozenset({"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced", "RectiflowFlowInvert", "RectiflowTrain"})


@dataclass
class Placed:
    """A node on the canvas."""

    number: int
    class_id: str
    inputs: Mapping[str, Any]
    title: str
    info: Mapping[str, Any]
    column: int = 0
    position: tuple[int, int] = (0, 0)
    links_out: dict[int, list[int]] = field(default_factory=dict)

    def declared(self) -> Iterator[tuple[str, Any, Mapping[str, Any], bool]]:
        """(name, type, options, optional) in the order of the node's table."""
        for section in ("required", "optional"):
            for name, (kind, *options) in self.info["input"].get(section, {}).items():
                yield name, kind, options[0] if options else {}, section == "optional"

    def widgets(self) -> list[tuple[str, Any, Mapping[str, Any]]]:
        return [(name, kind, options) for name, kind, options, _ in self.declared() if _is_widget(kind, options)]

    def sockets(self) -> list[tuple[str, str, bool]]:
        return [(name, kind, optional) for name, kind, options, optional in self.declared() if not _is_widget(kind, options)]

    def size(self) -> tuple[int, int]:
        boxes = sum(bool(options.get("multiline")) for _, _, options in self.widgets())
        controls = sum(_has_control(name, options) for name, _, options in self.widgets())
        slots = max(len(self.sockets()), len(self.info["output"]))
        height = 10 + slots * SLOT + (len(self.widgets()) - boxes + controls) * WIDGET + boxes * TEXT_BOX
        pictures = self.class_id in PICTURE_NODES
        return WIDE if boxes or pictures else WIDTH, height + PREVIEW * pictures + 2 * TEXT_BOX * (self.class_id == "PreviewAny")

    def room(self) -> int:
        """Its height and what a run adds to it: the interface shows previews below the widgets."""
        return self.size()[1] + PREVIEW * (self.class_id in DRAWING)


def _is_widget(kind: Any, options: Mapping[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def _has_control(name: str, options: Mapping[str, Any]) -> bool:
    """The interface adds a second widget, control_after_generate, after every seed."""
    return bool(options.get("control_after_generate")) or name in ("seed", "noise_seed")


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def graph_names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "api").glob("*.json"))


def api_graph(name: str) -> dict[str, dict]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def object_info() -> dict[str, dict]:
    """The tables of every node the embedded host has, in the form of GET /object_info."""
    from ..host.embedded import make_host

    return json.loads(json.dumps(make_host().registry.all_object_info()))


def to_ui(name: str, graph: Mapping[str, Mapping], info: Mapping[str, Mapping], note: str) -> dict[str, Any]:
    """The graph as the interface saves it (version 0.4), with a note in the upper left corner.

    Args:
        name: the file's stem; decides the graph's id.
        graph: API form; node ids are whole numbers.
        info: object_info of at least the graph's classes.
        note: Markdown for the note.
    """
    nodes = {
        key: Placed(int(key), entry["class_type"], entry["inputs"], entry.get("_meta", {}).get("title", ""), info[entry["class_type"]])
        for key, entry in graph.items()
    }
    order = _topological(nodes)
    _lay_out(order)
    links = _link_table(nodes, order)
    number = 1 + max(node.number for node in order)
    drawn = [_drawn_node(node, place, links) for place, node in enumerate(order, start=1)]
    return {
        "id": str(uuid.uuid5(NAMESPACE, name)),
        "revision": 0,
        "last_node_id": number,
        "last_link_id": len(links),
        "nodes": [_drawn_note(number, note), *drawn],
        "links": [[link, *ends] for link, ends in enumerate(links, start=1)],
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.8, "offset": [40, 60]}},
        "version": 0.4,
    }


def _topological(nodes: Mapping[str, Placed]) -> list[Placed]:
    """Sources first; each node's column is one more than the furthest column it reads from."""
    order: list[Placed] = []
    done: set[str] = set()

    def visit(key: str) -> None:
        if key in done:
            return
        done.add(key)
        sources = [value[0] for value in nodes[key].inputs.values() if _is_link(value)]
        for source in sources:
            visit(source)
        nodes[key].column = 1 + max((nodes[source].column for source in sources), default=-1)
        order.append(nodes[key])

    for key in sorted(nodes, key=int):
        visit(key)
    return order


def _lay_out(order: list[Placed]) -> None:
    """Stack each column from the top; a node stands level with the source that it alone reads, so that equal rows line up."""
    readers = _readers(order)
    tops: dict[str, int] = {}
    left = 0
    for number, members in enumerate(_columns(order, readers)):
        top = _pitch(NOTE_HEIGHT) if number == 0 else 0
        for node in members:
            level = next((tops[source] for source in _sources(node) if len(readers[source]) == 1), 0)
            top = max(top, level)
            tops[str(node.number)] = top
            node.position = (left, top)
            top += _pitch(node.room())
        left += max(WIDE if number == 0 else 0, *(node.size()[0] for node in members)) + COLUMN_GAP


def _columns(order: list[Placed], readers: Mapping[str, list[Placed]]) -> list[list[Placed]]:
    """Nodes that read nothing move up beside their first reader; where a column gets too high they move on to the left."""
    for node in order:
        if not _sources(node) and readers[str(node.number)]:
            node.column = max(0, min(reader.column for reader in readers[str(node.number)]) - 1)
    columns = [[node for node in order if node.column == number] for number in range(1 + max(node.column for node in order))]
    for number in range(len(columns) - 1, 0, -1):
        for node in [node for node in columns[number] if not _sources(node)]:
            if sum(_pitch(member.room()) for member in columns[number]) > COLUMN_HEIGHT:
                columns[number].remove(node)
                columns[number - 1].append(node)
    return columns


def _readers(order: list[Placed]) -> dict[str, list[Placed]]:
    return {str(node.number): [other for other in order if str(node.number) in _sources(other)] for node in order}


def _pitch(height: int) -> int:
    return height + TITLE + ROW_GAP


def _sources(node: Placed) -> list[str]:
    return [value[0] for value in node.inputs.values() if _is_link(value)]


def _socket_names(node: Placed) -> list[str]:
    return [name for name, _, _ in node.sockets()] + [name for name, _, _ in node.widgets()]


def _link_table(nodes: Mapping[str, Placed], order: list[Placed]) -> list[tuple]:
    """(from node, from slot, to node, to slot, type) of every link; its number is its place, from 1."""
    links: list[tuple] = []
    for node in order:
        for place, name in enumerate(_socket_names(node)):
            value = node.inputs.get(name)
            if _is_link(value):
                source = nodes[value[0]]
                links.append((source.number, value[1], node.number, place, source.info["output"][value[1]]))
                source.links_out.setdefault(value[1], []).append(len(links))
    return links


def _drawn_node(node: Placed, place: int, links: list[tuple]) -> dict[str, Any]:
    incoming = {ends[3]: link for link, ends in enumerate(links, start=1) if ends[2] == node.number}
    inputs = [
        {"name": name, "type": kind, **({"shape": OPTIONAL_SHAPE} if optional else {}), "link": incoming.get(slot)}
        for slot, (name, kind, optional) in enumerate(node.sockets())
    ]
    values: list[Any] = []
    for slot, (name, kind, options) in enumerate(node.widgets(), start=len(inputs)):
        shown = "COMBO" if isinstance(kind, list) else kind
        inputs.append({"name": name, "type": shown, "widget": {"name": name}, "link": incoming.get(slot)})
        value = node.inputs.get(name)
        values.append(options.get("default") if value is None or _is_link(value) else value)
        if _has_control(name, options):
            values.append("fixed")
    outputs = [
        {"name": name, "type": kind, "links": node.links_out.get(slot) or None}
        for slot, (kind, name) in enumerate(zip(node.info["output"], node.info["output_name"]))
    ]
    core = not node.class_id.startswith("Rectiflow")
    titled = {"title": node.title} if node.title not in ("", node.info["display_name"]) else {}
    return {
        "id": node.number,
        "type": node.class_id,
        "pos": list(node.position),
        "size": list(node.size()),
        "flags": {},
        "order": place,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        **titled,
        "properties": {
            "cnr_id": "comfy-core" if core else "rectiflow",
            **({"ver": CORE_VERSION} if core else {}),
            "Node name for S&R": node.class_id,
        },
        "widgets_values": values,
    }


def _drawn_note(number: int, note: str) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [0, 0],
        "size": [WIDE, NOTE_HEIGHT],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "What to change",
        "properties": {},
        "widgets_values": [note],
        "color": "#432",
        "bgcolor": "#653",
    }


def written(ui: Mapping[str, Any]) -> str:
    return json.dumps(ui, indent=2, ensure_ascii=False) + "\n"


def _paint(name: str) -> None:
    """Run the graph on the embedded host and keep its last picture as <name>.jpg."""
    import tempfile

    from PIL import Image

    from ..host.embedded import make_host, run_graph

    with tempfile.TemporaryDirectory() as folder:
        result = run_graph(api_graph(name), make_host(folder))
        with Image.open(result.files[-1]) as picture:
            picture.convert("RGB").save(FOLDER / f"{name}.jpg", quality=92)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these graphs; all by default")
    parser.add_argument("--pictures", action="store_true", help="also run each graph and write its picture")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(graph_names())
    if unknown:
        parser.error(f"no graph {', '.join(sorted(unknown))}; there are {', '.join(graph_names())}")
    info = object_info()
    for name in options.names or graph_names():
        ui = to_ui(name, api_graph(name), info, NOTES[name])
        (FOLDER / f"{name}.json").write_text(written(ui), encoding="utf-8")
        if options.pictures:
            _paint(name)


if __name__ == "__main__":
    main()
