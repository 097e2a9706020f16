"""`rectiflow run` when all is well: the forms a graph comes in, overrides, files, progress, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rectiflow.cli.overrides import Override, parse_override, read_value
from rectiflow.tests.cli.conftest import WORKFLOWS, node_of


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int32)


def test_a_graph_becomes_a_picture(shell, graph):
    answer = shell.run(graph)
    assert answer.status == 0, answer.err
    (picture,) = shell.written
    lines = answer.out.splitlines()
    assert lines[0] == str(picture) and re.fullmatch(r"\d+\.\d\d s", lines[1])
    assert pixels(picture).std() > 5


def test_the_result_as_json(shell, graph):
    answer = shell.run(graph, "--json")
    told = json.loads(answer.out)
    assert [Path(path) for path in told["files"]] == shell.written
    assert told["seconds"] >= told["node_seconds"][next(k for k, n in graph.items() if n["class_type"] == "KSampler")] > 0


def test_a_picture_carries_the_graph_that_made_it(shell, graph):
    shell.run(graph, "--set", "KSampler.seed=7")
    (first,) = shell.written
    shell.run(first)
    again = next(path for path in shell.written if path != first)
    assert np.array_equal(pixels(first), pixels(again))
    shell.run(first, "--set", "KSampler.seed=8")
    (other,) = set(shell.written) - {first, again}
    assert not np.array_equal(pixels(first), pixels(other))


def test_the_saved_workflow_is_the_same_graph(shell, graph):
    """The UI form beside the API form makes the same picture, and keeps its layout in it."""
    full = json.loads((WORKFLOWS / "api" / "text_to_image.json").read_text(encoding="utf-8"))
    assert shell.run(full).status == 0
    assert shell.run(WORKFLOWS / "text_to_image.json").status == 0
    first, second = shell.written
    assert np.array_equal(pixels(first), pixels(second))
    with Image.open(second) as picture:
        assert json.loads(picture.text["workflow"])["nodes"]


def test_a_changed_workflow_is_not_kept_as_if_it_were_unchanged(shell):
    assert shell.run(WORKFLOWS / "text_to_image.json", "--set", "KSampler.steps=2").status == 0
    (saved,) = shell.written
    with Image.open(saved) as picture:
        assert "workflow" not in picture.text
        assert node_of(json.loads(picture.text["prompt"]), "KSampler")["inputs"]["steps"] == 2


def test_pictures_are_never_overwritten(shell, graph):
    shell.run(graph)
    (first,) = shell.written
    before = first.read_bytes()
    shell.run(graph, "--set", "KSampler.seed=99")
    assert first.read_bytes() == before and len(shell.written) == 2


def test_a_graph_that_saves_nothing_says_so(shell, graph):
    save = node_of(graph, "SaveImage")
    save["class_type"] = "PreviewImage"
    answer = shell.run(graph)
    assert answer.status == 0 and "SaveImage" in answer.out and shell.written == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3.seed=7", Override("3", "seed", "7")),
        ("My node v1.2.text=a=b.c", Override("My node v1.2", "text", "a=b.c")),
        ("Prompt.text=", Override("Prompt", "text", "")),
    ],
)
def test_reading_overrides(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    "text, spec, expected",
    [
        ("7", ("INT", {}), 7),
        ("0.5", ("FLOAT", {}), 0.5),
        ("true", ("BOOLEAN", {}), True),
        ("euler", (["euler", "heun"], {}), "euler"),
        ("noto cat on blue", ("STRING", {}), "noto cat on blue"),
        ("123", ("STRING", {}), "123"),
        ("null", ("STRING", {}), "null"),
        ('"quoted"', ("STRING", {}), "quoted"),
        ('["4", 0]', ("MODEL", {}), ["4", 0]),
        ('["4", 0]', ("STRING", {}), ["4", 0]),
        ("7", None, 7),
    ],
)
def test_reading_values(text, spec, expected):
    assert read_value(text, spec) == expected


# --- as a process


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rectiflow", *map(str, arguments)]


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("number, status, word", [(signal.SIGINT, 130, b"interrupted"), (signal.SIGTERM, 143, b"stopped at node")])
def test_a_signal_stops_within_a_step(graph, tmp_path, number, status, word):
    """On a terminal: the bar moves; Ctrl-C ends the run soon; nothing is left; the next run is clean."""
    import pty

    node_of(graph, "KSampler")["inputs"]["steps"] = 10_000
    path, out = tmp_path / "graph.json", tmp_path / "out"
    path.write_text(json.dumps(graph), encoding="utf-8")
    reader, writer = pty.openpty()
    process = subprocess.Popen(command("run", path, "--out", out), stderr=writer, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    shown = read_until(reader, rb"KSampler.*[1-9]\d*/10000", seconds=60)
    interrupted = time.monotonic()
    process.send_signal(number)
    shown += drain(reader)
    printed, _ = process.communicate(timeout=30)
    assert time.monotonic() - interrupted < 10, "a step of the tiny model takes a tenth of a second"
    assert process.returncode == status and printed == ""
    assert word in shown and b"Traceback" not in shown
    assert not [path for path in out.rglob("*") if path.is_file()]

    done = subprocess.run(command("run", path, "--out", out, "--set", "KSampler.steps=1"), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr, "the progress bar belongs on a terminal only"


def read_until(reader: int, pattern: bytes, seconds: float) -> bytes:
    """What a terminal shows until the pattern appears in it."""
    shown, deadline = b"", time.monotonic() + seconds
    while not re.search(pattern, shown):
        assert time.monotonic() < deadline, shown[-2000:]
        if select.select([reader], [], [], 0.2)[0]:
            try:
                shown += os.read(reader, 4096)
            except OSError:  # the other end was closed
                raise AssertionError(shown[-2000:]) from None
    return shown


def drain(reader: int) -> bytes:
    shown = b""
    try:
        while block := os.read(reader, 4096):
            shown += block
    except OSError:
        pass
    os.close(reader)
    return shown
