"""Runs inside ComfyUI's Python: mixed grains on ComfyUI's own classes, at toy sizes with random weights; prints one JSON object.

Started by test_mixed_grain_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import importlib
import json
import sys

import torch
from comfyui_families import FALLING, TOYS, Bench, load_pack

GIVEN = {
    "block_start": 0, "block_end": 200, "start_percent": 0.0, "end_percent": 1.0, "merge": "mean", "position": "centre",
    "weight_attention": True, "grain": 2,
}  # fmt: skip


def no_places(network) -> None:
    """Positions that do not tell tokens apart."""
    for name in ("pe_embedder", "rope_embedder"):
        if hasattr(network, name):
            embedder = getattr(network, name)
            plain = embedder.forward
            embedder.forward = lambda ids, plain=plain: plain(torch.zeros_like(ids))
    if hasattr(network, "pos_embed"):
        network.pos_embed.data.zero_()


def answers(name: str, node: type) -> dict:
    bench = Bench(name)
    height, width = bench.toy.latent[-2:]
    fine = torch.ones(1, height, width)
    try:
        off, _ = node().execute(model=bench.model, grain_map=fine, unmerge="delta", **GIVEN)
    except ValueError as refusal:
        return {"refused": str(refusal), "class": type(bench.model.model.diffusion_model).__name__}
    fine = fine.index_fill(-1, torch.arange(width // 2), 0.0)
    plain = bench.draw(FALLING)
    found = {"same_off": torch.equal(bench.draw(FALLING, off), plain), "steps": len(FALLING) - 1}
    model, report = node().execute(model=bench.model, grain_map=fine, unmerge="delta", **GIVEN)
    drawn = bench.draw(FALLING, model)
    text = report.text()
    found |= {"finite": bool(drawn.isfinite().all()), "moved": float((drawn - plain).abs().max()), "calls": report.calls,
              "tokens": report.tokens, "notes": report.notes, "flops": list(report.flops.values()), "said": "GFLOP" in text}  # fmt: skip
    # Tokens that are equal inside cells and have no places are drawn as the whole model draws them.
    no_places(bench.model.model.diffusion_model)
    patch = importlib.import_module("pack_under_test.families.tokens").token_spec(bench.model.model.diffusion_model, "test").patch[-1]
    cells = (2 * patch, height // (2 * patch), 2 * patch)
    rows, columns = cells[1] * cells[0], width // cells[0] * cells[0]
    tile = bench.noise[..., :rows:cells[0], :columns:cells[0]].repeat_interleave(cells[0], -1).repeat_interleave(cells[0], -2)
    bench.noise[..., :rows, :columns] = tile
    plain = bench.draw(FALLING)
    for unmerge in ("delta", "copy"):
        model, _ = node().execute(model=bench.model, grain_map=fine, unmerge=unmerge, **GIVEN)
        found[unmerge] = float((bench.draw(FALLING, model) - plain).abs().max() / plain.abs().max())
    return found


if __name__ == "__main__":
    grained = load_pack()["RectiflowMixedGrainTokens"]
    print(json.dumps({name: answers(name, grained) for name in sys.argv[2:] or TOYS}))
