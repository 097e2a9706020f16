"""Graphs from files: prompts and saved workflows as JSON, and both out of a PNG's text."""

from __future__ import annotations

import copy
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import NodeInputError, input_error
from .registry import NodeRegistry
from .ui_format import is_ui_format, ui_to_prompt

__all__ = ["LoadedGraph", "load_graph", "read_graph_file", "read_png_text", "parse_graph_json"]

MAX_GRAPH_BYTES = 32 * 1024**2  # thousands of nodes take about one
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNK_HEAD = 8  # length and kind


@dataclass(frozen=True)
class LoadedGraph:
    """A prompt in API format, and the saved workflow it came from, where there is one."""

    prompt: dict[str, dict]
    workflow: dict[str, Any] | None = None


def load_graph(graph: Mapping[str, Any] | str | os.PathLike, registry: NodeRegistry) -> LoadedGraph:
    """Whatever form a graph has, as a prompt of one's own to change.

    Args:
        graph: a prompt, a saved workflow, the body of a POST to /prompt, or the path of a JSON or PNG file with one.
        registry: tells the names of widget values, where a workflow has to be converted.

    Raises:
        NodeInputError: the file or the object holds no graph; the message says where it went wrong.
    """
    if isinstance(graph, (str, os.PathLike)):
        return _loaded(read_graph_file(graph), registry, os.fspath(graph))
    return _loaded(copy.deepcopy(dict(graph)), registry, "graph")


def read_graph_file(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file. Of a PNG: `{"prompt": …, "workflow": …}`, as far as the picture carries them."""
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            head = stream.read(len(PNG_SIGNATURE))
            if head == PNG_SIGNATURE:
                return _graphs_in_png(path)
            data = head + stream.read(MAX_GRAPH_BYTES)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "a JSON or PNG file") from error
    if len(data) > MAX_GRAPH_BYTES:
        raise _unreadable(path, "a larger file", f"at most {MAX_GRAPH_BYTES} bytes")
    return parse_graph_json(data, str(path))


def parse_graph_json(data: bytes | str, source: str) -> dict[str, Any]:
    """Parse a JSON object; an error names line and column."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        graph = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(source, f"line {error.lineno}, column {error.colno}: {error.msg}", "valid JSON") from error
    except UnicodeDecodeError as error:
        raise _unreadable(source, f"byte {error.start} that is not UTF-8", "UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested too deep
        raise _unreadable(source, str(error), "numbers and nesting of ordinary size") from error
    if not isinstance(graph, dict):
        raise _unreadable(source, f"a JSON {type(graph).__name__}", "a JSON object")
    return graph


def read_png_text(path: str | os.PathLike, keys: tuple[str, ...] = ("prompt", "workflow")) -> dict[str, str]:
    """Text entries of a PNG, without decoding its pixels. Inflates no more than MAX_GRAPH_BYTES per entry."""
    found: dict[str, str] = {}
    for kind, body in _png_chunks(Path(path)):
        key, _, rest = body.partition(b"\0")
        name = key.decode("latin-1")
        if name in keys and name not in found:
            found[name] = _text(_text_bytes(kind, rest, path))
    return found


def _loaded(graph: dict[str, Any], registry: NodeRegistry, source: str) -> LoadedGraph:
    if is_ui_format(graph):
        return LoadedGraph(ui_to_prompt(graph, registry), graph)
    prompt, workflow = graph, None
    if "class_type" not in graph and isinstance(graph.get("prompt"), dict) and "class_type" not in graph["prompt"]:
        prompt = graph["prompt"]
        saved = graph.get("workflow") or ((graph.get("extra_data") or {}).get("extra_pnginfo") or {}).get("workflow")
        workflow = saved if is_ui_format(saved) else None
    elif is_ui_format(graph.get("workflow")):
        return LoadedGraph(ui_to_prompt(graph["workflow"], registry), graph["workflow"])
    if not prompt or not any(isinstance(node, dict) and "class_type" in node for node in prompt.values()):
        raise _unreadable(source, f"an object with {', '.join(list(graph)[:5]) or 'nothing in it'}", "a prompt or a saved workflow")
    return LoadedGraph(prompt, workflow)


def _graphs_in_png(path: Path) -> dict[str, Any]:
    texts = read_png_text(path)
    if not texts:
        raise _unreadable(path, "a PNG without a graph", "a picture saved by a SaveImage node, with its metadata")
    return {key: parse_graph_json(text, f"{path} ({key})") for key, text in texts.items()}


def _png_chunks(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of the text chunks. Pixel data is skipped over; a length that leaves the file ends the search."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        stream.seek(len(PNG_SIGNATURE))
        while len(head := stream.read(PNG_CHUNK_HEAD)) == PNG_CHUNK_HEAD:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"IEND" or stream.tell() + length > size:
                return
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                if length > MAX_GRAPH_BYTES:
                    raise _unreadable(path, f"a text of {length} bytes", f"at most {MAX_GRAPH_BYTES}")
                yield kind, stream.read(length)
                stream.seek(4, os.SEEK_CUR)  # checksum
            else:
                stream.seek(length + 4, os.SEEK_CUR)


def _text_bytes(kind: bytes, rest: bytes, path: str | os.PathLike) -> bytes:
    """The text of a chunk, after its key."""
    if kind == b"tEXt":
        return rest
    if kind == b"zTXt":
        return _inflated(rest[1:], path)
    compressed, body = rest[:1] == b"\x01", rest[2:]
    text = body.split(b"\0", 2)[-1]  # behind language and translated key
    return _inflated(text, path) if compressed else text


def _inflated(data: bytes, path: str | os.PathLike) -> bytes:
    try:
        stream = zlib.decompressobj()
        text = stream.decompress(data, MAX_GRAPH_BYTES)
    except zlib.error as error:
        raise _unreadable(path, str(error), "PNG text that can be inflated") from error
    if stream.unconsumed_tail:
        raise _unreadable(path, "compressed text that grows without bound", f"at most {MAX_GRAPH_BYTES} bytes of text")
    return text


def _text(data: bytes) -> str:
    """UTF-8, as the interface reads it, else Latin-1, as the PNG standard says."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _unreadable(source: str | os.PathLike, found: str, allowed: str) -> NodeInputError:
    return input_error("graph file", os.fspath(source), found, allowed, "Check the file.")
