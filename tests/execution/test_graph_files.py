"""Graphs out of files: JSON in every form, PNG text in every kind of chunk, and files that are not what they seem."""

from __future__ import annotations

import json
import random
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.execution.graph_files import MAX_GRAPH_BYTES, load_graph, read_graph_file, read_png_text
from rectiflow.tests.execution.toy_nodes import ToyHost, graph

PROMPT = graph(n=("Number", {"value": 1}), out=("Show", {"value": "n.0"}))
WORKFLOW = {
    "version": 0.4, "last_node_id": 1, "last_link_id": 0, "links": [],
    "nodes": [{"id": 1, "type": "Number", "mode": 0, "order": 0, "inputs": [], "outputs": [{"name": "INT"}], "widgets_values": [4]}],
}  # fmt: skip
CONVERTED = {"1": {"class_type": "Number", "inputs": {"value": 4}, "_meta": {"title": "Number"}}}


@pytest.fixture
def registry():
    return ToyHost().registry


def picture(path, **texts) -> str:
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return str(path)


@pytest.mark.parametrize(
    ("content", "prompt", "workflow"),
    [
        (PROMPT, PROMPT, None),
        (WORKFLOW, CONVERTED, WORKFLOW),
        ({"prompt": PROMPT, "client_id": "me"}, PROMPT, None),
        ({"prompt": PROMPT, "extra_data": {"extra_pnginfo": {"workflow": WORKFLOW}}}, PROMPT, WORKFLOW),
        ({"prompt": PROMPT, "workflow": WORKFLOW}, PROMPT, WORKFLOW),
        ({"workflow": WORKFLOW}, CONVERTED, WORKFLOW),
    ],
    ids=["prompt", "workflow", "POST body", "POST body with workflow", "both", "workflow inside"],
)
def test_every_form_of_a_graph(registry, tmp_path, content, prompt, workflow):
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    for given in (content, file, str(file)):
        loaded = load_graph(given, registry)
        assert (loaded.prompt, loaded.workflow) == (prompt, workflow)


def test_what_is_loaded_is_the_callers_own(registry):
    loaded = load_graph(PROMPT, registry)
    loaded.prompt["n"]["inputs"]["value"] = 99
    assert PROMPT["n"]["inputs"]["value"] == 1


def test_pictures(registry, tmp_path):
    both = load_graph(picture(tmp_path / "both.png", prompt=PROMPT, workflow=WORKFLOW), registry)
    assert (both.prompt, both.workflow) == (PROMPT, WORKFLOW)
    assert load_graph(picture(tmp_path / "p.png", prompt=PROMPT), registry).workflow is None
    assert load_graph(picture(tmp_path / "w.png", workflow=WORKFLOW), registry).prompt == CONVERTED


def chunk(kind: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", len(body) if length is None else length) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


TEXT = '{"a": "é 😀"}'


@pytest.mark.parametrize(
    "text_chunk",
    [
        chunk(b"tEXt", b"prompt\0" + TEXT.encode()),
        chunk(b"zTXt", b"prompt\0\0" + zlib.compress(TEXT.encode())),
        chunk(b"iTXt", b"prompt\0\0\0en\0key\0" + TEXT.encode()),
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(TEXT.encode())),
    ],
    ids=["tEXt", "zTXt", "iTXt", "iTXt compressed"],
)
def test_every_kind_of_text_chunk(tmp_path, text_chunk):
    file = tmp_path / "x.png"
    file.write_bytes(png(chunk(b"IHDR", bytes(13)), text_chunk, chunk(b"tEXt", b"prompt\0later one")))
    assert read_png_text(file) == {"prompt": TEXT}


def test_latin_1_text_as_the_standard_has_it(tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(png(chunk(b"tEXt", b"prompt\0" + "é".encode("latin-1"))))
    assert read_png_text(file) == {"prompt": "é"}


def test_pixels_are_never_decoded(tmp_path):
    """A header that claims 2^31 × 2^31 pixels is of no interest."""
    file = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)
    file.write_bytes(png(chunk(b"IHDR", header), chunk(b"IDAT", b"\0" * 100), chunk(b"tEXt", b"prompt\0{}")))
    assert read_png_text(file) == {"prompt": "{}"}


def test_compressed_text_that_grows_without_bound(tmp_path):
    file = tmp_path / "bomb.png"
    file.write_bytes(png(chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b" " * (MAX_GRAPH_BYTES + 1), 9))))
    with pytest.raises(NodeInputError, match="grows without bound"):
        read_graph_file(file)


BROKEN = {
    "empty": (b"", "line 1, column 1"),
    "not json": (b'{"a": 1,\n "b": }', "line 2, column 7"),
    "cut": (b'{"a": {"class_type"', "line 1, column 20"),
    "not text": (b'{"a": "\xff\xfe"}', "byte 7 that is not UTF-8"),
    "a list": (b"[1, 2]", "a JSON list"),
    "a number": (b"5", "a JSON int"),
    "no graph": (b'{"a": 1}', "an object with a"),
    "nothing": (b"{}", "nothing in it"),
    "deep": (b"[" * 200_000, "numbers and nesting of ordinary size"),
    "long number": (b'{"a": ' + b"9" * 10_000 + b"}", "numbers and nesting of ordinary size"),
    "png without a graph": (png(chunk(b"IHDR", bytes(13))), "a PNG without a graph"),
    "png with text that is no json": (png(chunk(b"tEXt", b"prompt\0{oops")), r"\(prompt\)"),
    "png with text that is not compressed": (png(chunk(b"zTXt", b"prompt\0\0plain")), "can be inflated"),
    "png cut in a chunk": (png(chunk(b"tEXt", b"prompt\0{}", length=1000)), "a PNG without a graph"),
    "png with a chunk beyond the file": (png(chunk(b"tEXt", b"prompt\0{}", length=2**32 - 1)), "a PNG without a graph"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_files_that_hold_no_graph_are_refused_with_the_place(registry, tmp_path, content, reason):
    file = tmp_path / "graph"
    file.write_bytes(content)
    with pytest.raises(NodeInputError, match=reason):
        load_graph(file, registry)


def test_files_that_are_not_there(registry, tmp_path):
    with pytest.raises(NodeInputError, match="No such file"):
        load_graph(tmp_path / "absent.json", registry)
    with pytest.raises(NodeInputError):
        load_graph(tmp_path, registry)  # a folder


def test_a_byte_order_mark_is_no_error(registry, tmp_path):
    file = tmp_path / "graph.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(PROMPT).encode())
    assert load_graph(file, registry).prompt == PROMPT


def test_damaged_files_never_raise_anything_else(registry, tmp_path):
    rng = random.Random(3)
    file = tmp_path / "graph"
    picture(tmp_path / "p.png", prompt=PROMPT, workflow=WORKFLOW)
    originals = [json.dumps(PROMPT).encode(), json.dumps(WORKFLOW).encode(), (tmp_path / "p.png").read_bytes()]
    read = 0
    for _ in range(600):
        content = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content[: rng.randint(0, len(content))] if rng.random() < 0.2 else content)
        try:
            load_graph(file, registry)
            read += 1
        except NodeInputError:
            pass
    assert 30 < read < 570
