"""Prompts from outside may be anything: validation answers, the engine runs what is valid, and neither ever crashes."""

from __future__ import annotations

import copy
import json
import random
import time

import pytest
from rectiflow.tests.execution.toy_nodes import ToyHost, graph

SEED = 20251
MUTANTS = 1500
RUNS = 400

BASE = graph(
    n=("Number", {"value": 3}), l=("ListOf", {"a": "n.0", "b": 2}), s=("Add", {"a": "l.0", "b": "n.0"}),
    p=("Pick", {"pick": True, "yes": "s.0", "no": "n.0"}), g=("Gate", {"value": "p.0", "block": False}),
    e=("AddOneTimes", {"value": "g.0", "times": 2}), out=("Show", {"value": "e.0"}), too=("Show", {"value": "p.0"}),
)  # fmt: skip


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value, {"a": value}][:1]
    return value


ODD_VALUES = [
    None, True, False, 0, -1, 10**30, -(10**30), 10**400, 1e308, -0.0, float("nan"), float("inf"), "", "5", "NaN", "nul\0l", "😀\ud800",
    "x" * 20_000, [], [[]], ["n"], ["n", 0], ["n", 1], ["n", -1], ["n", 0.5], ["gone", 0], [0, 0], [None, None], ["n", "0"], ["n", 0, 0],
    ["out", 0], ["s", 0], {}, {"__value__": ["n", 0]}, {"__value__": nested(50)}, {"class_type": "Show"}, nested(200),
    {"a": {"b": [1, {}]}},
]  # fmt: skip
ODD_CLASSES = ["", "Numberr", "Show", "Fail", "CountDown", "Wait", "\0", "object", "__class__", "😀", "x" * 5000, None, 5, ["Show"], {}]


def mutated(rng: random.Random) -> dict:
    """The base prompt with one to four things about it changed."""
    prompt = copy.deepcopy(BASE)
    for _ in range(rng.randint(1, 4)):
        node_id = rng.choice(list(prompt))
        node = prompt[node_id]
        kind = rng.randrange(8)
        if kind == 0:
            del prompt[node_id]
        elif kind == 1:
            prompt[rng.choice(["new", "", "😀", "a.b", "x" * 3000, "s"])] = copy.deepcopy(node)
        elif not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
            prompt[node_id] = copy.deepcopy(BASE.get(node_id, BASE["n"]))
        elif kind == 2:
            node["class_type"] = rng.choice(ODD_CLASSES)
        elif kind == 3:
            prompt[node_id] = rng.choice([None, 5, [], "text", {}, {"inputs": {}}, {"class_type": "Show"}, {**node, "inputs": None}])
        elif kind == 4 and node["inputs"]:
            del node["inputs"][rng.choice(list(node["inputs"]))]
        elif kind == 5:
            node["inputs"][rng.choice(["a", "value", "extra", "", "self", "cls", "__class__", "prompt_id"])] = rng.choice(ODD_VALUES)
        elif node["inputs"]:
            node["inputs"][rng.choice(list(node["inputs"]))] = copy.deepcopy(rng.choice(ODD_VALUES))
    return prompt


def test_mutated_prompts_are_answered_and_what_is_valid_runs():
    rng = random.Random(SEED)
    toy = ToyHost()
    seconds, valid, failed = [], 0, 0
    for number in range(MUTANTS):
        prompt = mutated(rng)
        started = time.perf_counter()
        checked = toy.validate(prompt, rng.choice([None, None, ["out"], [], ["n", 5]]))
        seconds.append(time.perf_counter() - started)
        json.dumps([checked.error, checked.node_errors], default=str)
        assert checked.valid == bool(checked.outputs) == (checked.error is None)
        if checked.valid and valid < RUNS:
            valid += 1
            result = toy.executor.execute(prompt, str(number), {"client_id": "me"}, checked.outputs)
            failed += result["status"]["status_str"] == "error"
            assert toy.executor.success == (result["status"]["status_str"] == "success")
    assert valid > 200 and 0 < failed < valid  # the mutations reach both sides of the door
    assert sorted(seconds)[len(seconds) // 2] < 0.005
    assert toy.shown(copy.deepcopy(BASE)) == [8, 7]  # and afterwards everything is as it was


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: ascii(value)[:24])
def test_any_constant_in_any_place(value):
    toy = ToyHost()
    for node_id, node in BASE.items():
        for name in node["inputs"]:
            prompt = copy.deepcopy(BASE)
            prompt[node_id]["inputs"][name] = copy.deepcopy(value)
            checked = toy.validate(prompt)
            if checked.valid:
                toy.executor.execute(prompt, "fuzz", {}, checked.outputs)


def test_random_wiring():
    """Random graphs: every one is refused, or runs to its end with the value that plain Python computes."""
    rng = random.Random(SEED)
    toy = ToyHost()
    ran = 0
    for _ in range(300):
        size = rng.randint(1, 12)
        prompt = {"0": {"class_type": "Number", "inputs": {"value": 1}}}
        for index in range(1, size):
            low = index if rng.random() < 0.9 else size  # sometimes a link forward: a circle, or a node that is not there
            inputs = {name: [str(rng.randrange(low)), 0] for name in "ab"}
            prompt[str(index)] = {"class_type": "Add", "inputs": inputs}
        prompt["out"] = {"class_type": "Show", "inputs": {"value": [str(size - 1), 0]}}
        checked = toy.validate(prompt)
        expected = evaluated(prompt, str(size - 1), ())
        if expected is None:
            types = {error["type"] for entry in checked.node_errors.values() for error in entry["errors"]}
            assert not checked.valid and "dependency_cycle" in types
        else:
            assert toy.shown(prompt) == [expected]
            ran += 1
    assert 100 < ran < 300


def evaluated(prompt: dict, node_id: str, below: tuple) -> int | None:
    """The value of a node, or None when a circle is in the way."""
    if node_id in below:
        return None
    inputs = prompt[node_id]["inputs"]
    if "value" in inputs:
        return inputs["value"]
    parts = [evaluated(prompt, inputs[name][0], (*below, node_id)) for name in "ab"]
    return None if None in parts else sum(parts)
