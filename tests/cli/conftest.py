"""The command line in this process: a graph to spoil, and a way to call `rectiflow run` that says what came of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rectiflow.cli import main

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"


def node_of(graph: dict[str, Any], class_type: str) -> dict[str, Any]:
    """The only node of a class."""
    (found,) = [node for node in graph.values() if node["class_type"] == class_type]
    return found


def id_of(graph: dict[str, Any], class_type: str) -> str:
    (found,) = [node_id for node_id, node in graph.items() if node["class_type"] == class_type]
    return found


@pytest.fixture(scope="session")
def _text_to_image() -> dict[str, Any]:
    return json.loads((WORKFLOWS / "api" / "text_to_image.json").read_text(encoding="utf-8"))


@pytest.fixture
def graph(_text_to_image) -> dict[str, Any]:
    """The shipped text_to_image in two steps."""
    graph = copy.deepcopy(_text_to_image)
    node_of(graph, "KSampler")["inputs"]["steps"] = 2
    return graph


@dataclass(frozen=True)
class Answer:
    """What one call of the command line did."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Shell:
    """Calls commands with an output folder of the test's own."""

    folder: Path
    capture: Callable[[], Any]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def written(self) -> list[Path]:
        """Every file below the output folder, hidden and half-written ones too."""
        return sorted(path for path in self.out.rglob("*") if path.is_file())

    def call(self, *arguments: str) -> Answer:
        self.capture()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        captured = self.capture()
        return Answer(status, captured.out, captured.err)

    def run(self, graph: dict[str, Any] | Path | str, *arguments: str) -> Answer:
        """`rectiflow run`, of a file or of a graph that is written into one first."""
        if isinstance(graph, dict):
            path = self.folder / "graph.json"
            path.write_text(json.dumps(graph), encoding="utf-8")
            graph = path
        return self.call("run", str(graph), "--out", str(self.out), "--device", "cpu", *arguments)


@pytest.fixture
def shell(tmp_path, capsys) -> Shell:
    return Shell(tmp_path, capsys.readouterr)
