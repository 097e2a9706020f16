"""The benches' held-out pictures are the listed ones, and none of them is a picture that the tiny model learned."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_sheet_holds_32_unseen_pictures(monkeypatch):
    spec = importlib.util.spec_from_file_location("held_out", ROOT / "bench" / "held_out.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "held_out", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    found = module.load_held_out()  # raises where a hash differs
    learned = set(json.loads((ROOT / "tiny" / "vocabulary.json").read_text())["things"].values())
    assert len(found) == 32 == len({entry.sha256 for entry, _ in found})
    assert not {entry.name for entry, _ in found} & learned
    assert {entry.style for entry, _ in found} == {"twemoji", "noto"}
    assert all(entry.caption.startswith(entry.style) and entry.caption.endswith("on white") for entry, _ in found)
