"""Runs inside ComfyUI's Python: pictures of three sizes in one sequence on ComfyUI's own classes, at toy sizes; prints one JSON object.

Started by test_packing_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import json
import sys

from comfyui_families import FALLING, TOYS, Bench, load_pack


def answers(name: str, nodes: dict) -> dict:
    bench = Bench(name)
    sizes = ((6, 8), (4, 10), (8, 4))
    starts = [bench.random((*bench.toy.latent[:-2], *size)) for size in sizes]
    given = {f"latent_{number}": {"samples": start} for number, start in enumerate(starts, start=1)}
    try:
        model, latent, packing = nodes["RectiflowPackLatents"]().execute(model=bench.model, **given)
    except ValueError as refusal:
        return {"refused": str(refusal)}
    bench.noise = latent["samples"]
    drawn = {"samples": bench.draw(FALLING, model)}
    together = nodes["RectiflowUnpackLatents"]().execute(latent=drawn, packing=packing, index=0)[0]
    errors = []
    for start, found in zip(starts, together, strict=True):
        bench.noise = start
        alone = bench.draw(FALLING)
        errors.append(float((found["samples"] - alone).abs().max() / alone.abs().max()))
    return {"errors": errors}


if __name__ == "__main__":
    found = load_pack()
    print(json.dumps({name: answers(name, found) for name in sys.argv[2:] or TOYS}))
