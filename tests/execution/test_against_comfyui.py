"""The same prompts through both engines: what is refused and why, what is said in which order, what comes out."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rectiflow.host.embedded import Host
from rectiflow.host.embedded.execution.executor import PromptExecutor
from rectiflow.host.embedded.execution.registry import NodeRegistry
from rectiflow.host.embedded.execution.validation import validate_prompt
from rectiflow.tests.execution.shared_nodes import CLASSES
from rectiflow.tests.execution.toy_nodes import graph

pytestmark = pytest.mark.comfyui

CASES = {
    "plain": graph(n=("Number", {"value": "7"}), s=("Add", {"a": "n.0", "b": 2.9}), out=("Show", {"value": "s.0"})),
    "lists": graph(m=("Numbers", {"first": 1, "count": 3}), s=("Add", {"a": "m.0", "b": 1}), out=("Show", {"value": "s.0"})),
    "whole lists": graph(m=("Numbers", {"first": 1, "count": 3}), t=("Total", {"values": "m.0"}), out=("Show", {"value": "t.0"})),
    "lazy": graph(
        n=("Number", {"value": 1}), o=("Number", {"value": 2}), p=("Pick", {"first": True, "one": "n.0", "two": "o.0"}),
        out=("Show", {"value": "p.0"}),
    ),
    "expansion": graph(n=("Number", {"value": 1}), r=("Repeat", {"value": "n.0", "times": 3}), out=("Show", {"value": "r.0"})),
    "asynchronous": graph(n=("Number", {"value": 1}), w=("Later", {"value": "n.0"}), out=("Show", {"value": "w.0"})),
    "always changed": graph(c=("Changes", {"value": 1}), s=("Add", {"a": "c.0", "b": 1}), out=("Show", {"value": "s.0"})),
    "failing": graph(n=("Number", {"value": 1}), f=("Fail", {"value": "n.0"}), out=("Show", {"value": "f.0"})),
    "one good output": graph(n=("Number", {"value": 1}), good=("Show", {"value": "n.0"}), bad=("Add", {"a": "x", "b": 1}),
                             out=("Show", {"value": "bad.0"})),
    "types": graph(h=("Half", {"x": 0.5, "how": "up"}), s=("Add", {"a": "h.0", "b": 1}), out=("Show", {"value": "s.0"})),
    "ranges": graph(n=("Number", {"value": 500}), h=("Half", {"x": -0.1, "how": "sideways"}), a=("Show", {"value": "n.0"}),
                    b=("Show", {"value": "h.0"})),
    "missing input": graph(s=("Add", {"a": 1}), out=("Show", {"value": "s.0"})),
    "long link": graph(s=("Add", {"a": [1, 2, 3], "b": 1}), out=("Show", {"value": "s.0"})),
    "own validator": graph(s=("Strict", {"a": 20, "b": 1}), out=("Show", {"value": "s.0"})),
    "own validator refuses": graph(s=("Strict", {"a": 60, "b": 9}), out=("Show", {"value": "s.0"})),
    "link to nothing": {"out": {"class_type": "Show", "inputs": {"value": ["99", 0]}}},
    "inner link to nothing": {**graph(out=("Show", {"value": 1})), "s": {"class_type": "Add", "inputs": {"a": ["99", 0], "b": 1}}},
    "no class": {"1": {"inputs": {}}},
    "unknown class": {"1": {"class_type": "Nope", "inputs": {}}},
    "no outputs": graph(n=("Number", {"value": 1})),
    "wrapped list": {"out": {"class_type": "Show", "inputs": {"value": {"__value__": [1, 2, 3]}}}},
}  # fmt: skip
CASES["inner link to nothing"]["out"]["inputs"]["value"] = ["s", 0]
TARGETS = {"one good output": ["good"]}

# Said better here than there, on purpose: which link leads to nothing, which names are near.
OWN_WORDS = ("exception_during_validation", "exception_during_inner_validation", "invalid_prompt")


@pytest.fixture(scope="module")
def theirs():
    """What ComfyUI says of every case, from one process."""
    path = Path(os.environ["COMFYUI_PATH"])
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    script = Path(__file__).with_name("comfyui_engine.py")
    cases = json.dumps([[prompt, TARGETS.get(name)] for name, prompt in CASES.items()])
    run = subprocess.run([python, str(script)], input=cases, capture_output=True, text=True, cwd=path, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(zip(CASES, json.loads(run.stdout)))


def ours(name: str) -> dict:
    registry = NodeRegistry()
    registry.add(CLASSES)
    prompt = copy.deepcopy(CASES[name])
    checked = asyncio.run(validate_prompt(registry, prompt, TARGETS.get(name), "run"))
    messages: list = []
    executor = PromptExecutor(
        Host(paths=None, registry=registry, memory=None), send=lambda event, data, client: messages.append([event, copy.deepcopy(data)])
    )
    runs = []
    for _ in range(2 if checked.valid else 0):
        messages.clear()
        history = executor.execute(copy.deepcopy(prompt), "run", {"client_id": "me"}, checked.outputs)
        runs.append({"messages": list(messages), "history": {**history, "success": executor.success}})
    answer = {**checked._asdict(), "prompt": prompt, "runs": runs}
    return json.loads(json.dumps(answer, default=str))


def comparable_error(error: dict) -> tuple:
    own = error["type"] in OWN_WORDS
    return error["type"], error["message"], None if own else error["details"], error["extra_info"].get("input_name")


@pytest.mark.parametrize("name", CASES)
def test_validation_says_the_same(name, theirs):
    mine, other = ours(name), theirs[name]
    assert mine["valid"] == other["valid"] and sorted(mine["outputs"]) == other["outputs"]
    if other["error"] is None:
        assert mine["error"] is None
    else:
        assert mine["error"]["type"] == other["error"]["type"] and mine["error"]["message"] == other["error"]["message"]
        assert mine["error"]["details"].split(";")[0] == other["error"]["details"] or "exception" in str(other["node_errors"])
    assert set(mine["node_errors"]) == set(other["node_errors"])
    for node_id, entry in other["node_errors"].items():
        assert mine["node_errors"][node_id]["class_type"] == entry["class_type"]
        # There a marked node is also charged with every output that fails later, whether it depends on it or not.
        assert set(mine["node_errors"][node_id]["dependent_outputs"]) <= set(entry["dependent_outputs"])
        # ComfyUI walks a set of input names, so the order of its errors differs from run to run.
        assert sorted(map(comparable_error, mine["node_errors"][node_id]["errors"]), key=str) == sorted(
            map(comparable_error, entry["errors"]), key=str
        )
    assert without_tokens(mine["prompt"]) == without_tokens(other["prompt"])  # coerced in place alike


def without_tokens(prompt: dict) -> dict:
    """ComfyUI notes the change token in the prompt."""
    return {node_id: {key: value for key, value in node.items() if key != "is_changed"} for node_id, node in prompt.items()}


def told(run: dict) -> list:
    """The messages without what depends on the clock, the file or the order of a set."""
    kept = []
    for event, data in run["messages"]:
        data = {key: value for key, value in data.items() if key not in ("timestamp", "traceback")}
        for key in ("current_outputs", "executed", "nodes"):
            if isinstance(data.get(key), list):
                data[key] = sorted(data[key])
        kept.append([event, data])
    return kept


@pytest.mark.parametrize("name", CASES)
def test_runs_say_the_same_in_the_same_order(name, theirs):
    mine, other = ours(name)["runs"], theirs[name]["runs"]
    assert len(mine) == len(other)
    for my_run, their_run in zip(mine, other):
        assert told(my_run) == told(their_run)
        assert my_run["history"]["outputs"] == their_run["history"]["outputs"]
        assert my_run["history"]["meta"] == their_run["history"]["meta"]
        assert my_run["history"]["success"] == their_run["history"]["success"]
