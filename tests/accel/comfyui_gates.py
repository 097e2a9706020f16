"""Runs inside ComfyUI's Python: gated caches on ComfyUI's own classes of every family; prints one JSON object.

Started by test_gates_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samplers"))

from comfyui_editing import FAMILIES, Toy, load_pack  # noqa: E402  starts ComfyUI on the CPU

import torch  # noqa: E402  isort: skip
import comfy.samplers  # noqa: E402  isort: skip

# The layer that reads the modulated input of the first block, below diffusion_model.
READERS = {
    "Flux": "double_blocks.0.img_attn.qkv", "HunyuanVideo": "double_blocks.0.img_attn.qkv", "SD3": "joint_blocks.0.x_block.attn.qkv",
    "Wan": "blocks.0.self_attn.q", "Qwen-Image": "transformer_blocks.0.attn.to_q", "LTX-Video": "transformer_blocks.0.attn1.to_q",
}  # fmt: skip
LIMITS = {"max_consecutive": -1, "warmup_steps": 1, "tail_steps": 1, "start_percent": 0.0, "end_percent": 1.0}


def caches(nodes: dict, model, threshold: float):
    """(name, MODEL, report) of every gate that looks at the first block, and of the one that does not."""
    gate = {"last_order": 1, "first_order": 1, "gate": "hidden", "gate_reduce": "mean", "err_mode": "instant", "basis": "newton"}
    node = nodes["RectiflowConfidenceGatedTaylor"]()
    yield "confidence", *node.execute(model=model, threshold=threshold, subsample=1, **gate, **LIMITS)
    for rule in ("first_block", "modulated_input", "input_change"):
        widgets = {"threshold": threshold, "curve": "", "forecast_order": 0}
        yield rule, *nodes["RectiflowReuseCache"]().execute(model=model, rule=rule, **widgets, **LIMITS)


def modulated_error(nodes: dict, toy: Toy, name: str) -> float:
    """Between what the first attention reads and what our function says it reads."""
    pack = nodes["RectiflowReuseCache"].__module__.rsplit(".nodes.", 1)[0]
    modulation = importlib.import_module(f"{pack}.families.modulation")
    transformer = toy.model.model.diffusion_model
    ours, theirs, read = [], [], modulation.modulated_input(transformer, "test")

    def patch(args, extra):
        ours.append(read(args))
        return extra["original_block"](args)

    handle = transformer.get_submodule(READERS[name]).register_forward_pre_hook(lambda module, args: theirs.append(args[0].clone()))
    model = toy.model.clone()
    model.set_model_patch_replace(patch, "dit", "double_block", 0)
    try:
        toy.draw(toy.picture, comfy.samplers.sampler_object("euler"), toy.target, model)
    finally:
        handle.remove()
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def answers(nodes: dict, name: str) -> dict:
    toy = Toy(nodes, FAMILIES[name], 0.1)
    euler = comfy.samplers.sampler_object("euler")
    plain = toy.draw(toy.picture, euler, toy.target)
    found = {"modulated": modulated_error(nodes, toy, name), "off": [], "visits": {}, "finite": []}
    for _, model, _ in caches(nodes, toy.model, 0.0):
        found["off"].append(torch.equal(toy.draw(toy.picture, euler, toy.target, model), plain))
    for rule, model, report in caches(nodes, toy.model, 5.0):
        found["finite"].append(bool(torch.isfinite(toy.draw(toy.picture, euler, toy.target, model)).all()))
        found["visits"][rule] = "".join("F" if visit.decision == "full" else "." for visit in report.last.visits)
    return found


def main() -> None:
    nodes = load_pack()
    print(json.dumps({name: answers(nodes, name) for name in FAMILIES}))


if __name__ == "__main__":
    main()
