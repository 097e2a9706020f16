"""The examples of docs pages run as they stand there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.errors import NodeInputError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_policy.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's Python block as a module."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40, "the page promises forty lines"
    file = tmp_path / "doubling.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("docs_example_policy", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_policy_of_the_page_runs_and_decides_as_it_says(example, tiny):
    noise = tiny.noise([1])
    plain = tiny.sample("noto cat on blue", noise, steps=16)
    for growth, computed in ((1, list(range(16))), (2, [0, 1, 3, 7, 15])):
        log = CacheLog()
        model = attach(tiny.model, CachePlan(example.DoublingReuse(growth=growth), "output", Limits()), log, "test")
        drawn = tiny.sample("noto cat on blue", noise, steps=16, model=model)
        assert [visit.index for visit in log.last.visits if visit.decision == "full"] == computed
        assert torch.equal(drawn, plain) is (growth == 1) and bool(torch.isfinite(drawn).all())


def test_the_policy_of_the_page_refuses_what_it_says(example, tiny):
    with pytest.raises(NodeInputError, match="growth"):
        attach(tiny.model, CachePlan(example.DoublingReuse(growth=9)), CacheLog(), "test")
