"""JSON and binary frames, byte by byte, and the command line."""

from __future__ import annotations

import json
import struct
from io import BytesIO

import pytest
from PIL import Image
from rectiflow.host.embedded.server.json_text import dumps, nested_deeper_than
from rectiflow.host.embedded.server.messages import encode_json, encode_preview, encode_preview_with_metadata, encode_text
from rectiflow.host.embedded.server.options import parse_arguments

PICTURE = Image.new("RGB", (100, 40), (255, 0, 0))


def test_json_is_always_valid():
    class Odd:
        def __str__(self):
            return "odd"

    value = {"nan": float("nan"), "inf": [float("-inf")], "tuple": (1, 2), 3: Odd(), "surrogate": "\ud800", "fine": 0.1}
    assert json.loads(dumps(value)) == {"nan": None, "inf": [None], "tuple": [1, 2], "3": "odd", "surrogate": "\ud800", "fine": 0.1}
    assert json.loads(encode_json("x", {"a": float("nan")})) == {"type": "x", "data": {"a": None}}


def test_depth_is_measured_exactly():
    value: object = 0
    for depth in range(1, 6):
        value = [value] if depth % 2 else {"a": value}
        assert not nested_deeper_than(value, depth) and nested_deeper_than(value, depth - 1)
    assert not nested_deeper_than("text", 0)


def test_preview_layouts():
    frame = encode_preview(("JPEG", PICTURE, 50))
    assert struct.unpack(">II", frame[:8]) == (1, 1) and Image.open(BytesIO(frame[8:])).size == (50, 20)
    frame = encode_preview(("PNG", PICTURE, None))
    assert struct.unpack(">II", frame[:8]) == (1, 2) and Image.open(BytesIO(frame[8:])).size == (100, 40)
    frame = encode_preview_with_metadata(("JPEG", PICTURE.convert("RGBA"), None), {"node_id": "é7"})
    kind, length = struct.unpack(">II", frame[:8])
    assert kind == 4 and json.loads(frame[8 : 8 + length]) == {"node_id": "é7", "image_type": "image/jpeg"}
    assert Image.open(BytesIO(frame[8 + length :])).format == "JPEG"
    assert encode_text("12", "wörd") == struct.pack(">II", 3, 2) + b"12" + "wörd".encode()


def test_flags_mean_what_they_mean_in_comfyui(tmp_path):
    assert parse_arguments([]).listen == ("127.0.0.1",)
    assert parse_arguments(["--listen"]).listen == ("0.0.0.0", "::")
    assert parse_arguments(["--listen", "127.2.2.2,127.3.3.3"]).only_loopback and not parse_arguments(["--listen"]).only_loopback
    given = parse_arguments(
        [
            "--temp-directory",
            str(tmp_path),
            "--cache-lru",
            "7",
            "--cpu",
            "--extra-model-paths-config",
            "a",
            "b",
            "--extra-model-paths-config",
            "c",
        ]
    )
    assert given.temp_directory == tmp_path / "temp" and given.cache_lru == 7 and given.host.device == "cpu"
    assert [str(path) for path in given.extra_model_paths] == ["a", "b", "c"]
    assert parse_arguments(["--max-upload-size", "1.5"]).limits.upload_bytes == 1572864
    assert parse_arguments(["--fast", "fp16_accumulation", "--lowvram", "--reserve-vram", "1"]).port == 8188


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70000"], ["--cache-lru", "-1"], ["--cache-lru", "2", "--cache-none"], ["--user-directory", "/no/such/folder"],
        ["--front-end-root", "/no/such/folder"], ["--tls-keyfile", "x"], ["--front-end-version", "a/b@1"], ["--max-upload-size", "nan"],
        ["--no-such-flag"], ["--preview-size", "0"], ["--port", "x"],
    ],
)  # fmt: skip
def test_unusable_flags_end_with_status_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err
