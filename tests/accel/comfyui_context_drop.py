"""Runs inside ComfyUI's Python: Context Drop on ComfyUI's own classes, at toy sizes with random weights; prints one JSON object.

Started by test_context_drop_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import json
import sys

import torch
from comfyui_families import FALLING, TOYS, Bench, load_pack

GIVEN = {"weighted": True, "layers": "all", "start_percent": 0.0, "end_percent": 1.0, "min_tokens": 1, "base_tokens": 64}


def answers(name: str, node: type) -> dict:
    bench = Bench(name)
    try:
        off, _ = node().execute(model=bench.model, factor=1, **GIVEN)
    except ValueError as refusal:
        return {"refused": str(refusal), "class": type(bench.model.model.diffusion_model).__name__}
    plain = bench.draw(FALLING)
    model, report = node().execute(model=bench.model, factor=2, **GIVEN)
    found = bench.draw(FALLING, model)
    try:
        free, log = node().execute(model=bench.model, factor=2, pool="rope_free", **GIVEN)
        drawn = bench.draw(FALLING, free)
        before = {"finite": bool(drawn.isfinite().all()), "calls": log.calls, "moved": float((drawn - found).abs().max())}
    except ValueError as refusal:
        before = {"refused": str(refusal)}
    return {
        "free": before,
        "same_off": torch.equal(bench.draw(FALLING, off), plain), "finite": bool(found.isfinite().all()), "calls": report.calls,
        "share": report.share, "moved": float((found - plain).abs().max()), "steps": len(FALLING) - 1,
    }  # fmt: skip


if __name__ == "__main__":
    drop = load_pack()["RectiflowContextDrop"]
    print(json.dumps({name: answers(name, drop) for name in sys.argv[2:] or TOYS}))
