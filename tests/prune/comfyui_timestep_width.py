"""Runs inside ComfyUI's Python: width by timestep on ComfyUI's own classes, at toy sizes with random weights; prints one JSON object.

Started by test_timestep_width_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "accel"))
from comfyui_families import TOYS, Bench, load_pack  # noqa: E402

VISITS = torch.tensor([0.9, 0.6, 0.4, 0.1, 0.0])  # one in each of four buckets


def answers(name: str, nodes: dict) -> dict:
    bench = Bench(name)
    made, applied = nodes["RectiflowTimestepWidthTable"](), nodes["RectiflowApplyTimestepWidth"]()
    given = {"model": bench.model, "positive": bench.prompts[0], "negative": bench.prompts[1], "cfg": 2.0, "seed": 0, "buckets": 4,
             "latent": {"samples": torch.zeros(bench.toy.latent)}}  # fmt: skip
    try:
        ones, _ = made.execute(**given, target_flops=1.0)
    except ValueError as refusal:
        return {"refused": str(refusal), "class": type(bench.model.model.diffusion_model).__name__}
    plain = bench.draw(VISITS)
    found = {"same_off": torch.equal(bench.draw(VISITS, applied.execute(model=bench.model, table=ones, exec="slice")[0]), plain)}
    table, text = made.execute(**given, target_flops=0.9)
    found |= {"flops": sum(table.flops) / 4, "said": "4 buckets" in text}
    parts = {part: importlib.import_module(f"pack_under_test.accel.prune.{part}") for part in ("timestep_width", "width_run")}
    groups = parts["timestep_width"].time_groups(bench.model, "test")
    found["kinds"] = sorted({group.kind for group in groups})
    generator = torch.Generator().manual_seed(1)
    kept = {group.key: tuple(torch.randperm(group.count, generator=generator)[: max(1, group.count // 2)].sort().values.tolist())
            for group in groups}  # fmt: skip
    tables = {"table": lambda sigma: (parts["timestep_width"].bucket_of(sigma, 4), table.at(sigma)), "half": lambda sigma: (0, kept)}
    for case, kept_at in tables.items():
        sliced, masked = (bench.draw(VISITS, parts["width_run"].with_units(bench.model, groups, kept_at, how, "test"))
                          for how in ("slice", "mask"))  # fmt: skip
        scale = float(masked.abs().max())
        found[case] = {"error": float((sliced - masked).abs().max()) / scale, "moved": float((masked - plain).abs().max()) / scale}
    found["restored"] = torch.equal(bench.draw(VISITS), plain)
    return found


if __name__ == "__main__":
    pack = load_pack()
    print(json.dumps({name: answers(name, pack) for name in sys.argv[2:] or TOYS}))
