"""Runs inside ComfyUI's Python: the RoPE node on ComfyUI's own classes, at toy sizes with random weights; prints one JSON object.

Started by test_rope_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import json
import sys

import torch
from comfyui_families import FALLING, TOYS, Bench, load_pack

LENGTH = 7  # tokens a side trained at, as the node has them at least
PLAIN = {"train_rows": LENGTH, "train_columns": LENGTH, "scale_from": "per_axis", "scale": 0.0, "attention_scale": "off"}


def interpolating(model):
    """The model with an embedder that is asked for places divided by 2 in rows and columns: interpolation, made without our table."""
    patched = model.clone()
    name = next(name for name in ("pe_embedder", "rope_embedder") if hasattr(model.model.diffusion_model, name))
    original = model.get_model_object(f"diffusion_model.{name}")

    class Halved(torch.nn.Module):
        axes_dim, theta = original.axes_dim, original.theta

        def forward(self, ids):
            ids = ids.float().clone()
            ids[..., 1:] /= 2.0
            return original(ids)

    patched.add_object_patch(f"diffusion_model.{name}", Halved())
    return patched


def answers(name: str, node: type) -> dict:
    bench = Bench(name)

    def scaled(method: str, **changed):
        return node().execute(model=bench.model, method=method, **{**PLAIN, **changed})[0]

    try:
        scaled("ntk")
    except ValueError as refusal:
        return {"refused": str(refusal), "class": type(bench.model.model.diffusion_model).__name__}
    found, plain = {"family": name}, bench.draw(FALLING)
    found["same_inside"] = torch.equal(bench.draw(FALLING, scaled("resonance_yarn", attention_scale="paper_log")), plain)
    interpolated = bench.draw(FALLING, scaled("position_interpolation", scale=2.0))
    found["moved"] = float((interpolated - plain).abs().max())
    found["error"] = float((interpolated - bench.draw(FALLING, interpolating(bench.model))).abs().max())
    bench.noise = bench.random((*bench.toy.latent[:-2], 10, 24))  # 5 × 12 tokens
    wide = bench.draw(FALLING)
    found["same_off"] = torch.equal(bench.draw(FALLING, scaled("none")), wide)
    timed = bench.draw(FALLING, scaled("time_aware"))
    try:
        picture, both = (bench.draw(FALLING, scaled("none", attention_scale="paper_log", apply_to=to)) for to in ("picture", "all"))
        found["picture"] = [float((picture - other).abs().max()) for other in (wide, both)]
    except ValueError as refusal:
        found["picture"] = str(refusal)
    found["finite"], found["moved_wide"] = bool(timed.isfinite().all()), float((timed - wide).abs().max())
    return found


if __name__ == "__main__":
    rope = load_pack()["RectiflowRopeExtrapolation"]
    print(json.dumps({name: answers(name, rope) for name in sys.argv[2:] or TOYS}))
