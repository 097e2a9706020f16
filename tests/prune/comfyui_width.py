"""Runs inside ComfyUI's Python: masks and narrower layers on ComfyUI's own classes of every family; prints one JSON object.

Started by test_width_in_comfyui.py with the pack's folder as its only argument.
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
from comfy.patcher_extension import CallbacksMP  # noqa: E402  isort: skip

BEFORE = CallbacksMP.ON_PRE_RUN


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def lora(model, to) -> object:
    """`to` with a difference on every matrix of the first block of MODEL."""
    model.detach()
    patched, generator = to.clone(), torch.Generator().manual_seed(5)
    weights = {name: value for name, value in model.model.named_parameters() if ".0." in name and value.ndim == 2}
    patches = {name: ("diff", (0.02 * torch.randn(value.shape, generator=generator),)) for name, value in weights.items()}
    assert len(patched.add_patches(patches)) == len(patches)
    return patched


def answers(pack: str, nodes: dict, name: str) -> dict:
    compact, width = (importlib.import_module(f"{pack}.accel.prune.{module}") for module in ("compact", "width"))
    toy = Toy(nodes, FAMILIES[name], 0.1)
    # ComfyUI leaves this flag off on a weight that it patched and put back, and torch folds products over strided input by it: last bits
    toy.model.model.diffusion_model.requires_grad_(False)
    model, euler = toy.model, comfy.samplers.sampler_object("euler")

    def draw(of):
        return toy.draw(toy.picture, euler, toy.target, of)

    groups = width.groups_of(model, "test")
    values = {group.key: torch.rand(group.count, generator=torch.Generator().manual_seed(place)) for place, group in enumerate(groups)}
    scores = width.WidthScores("", "", "random", values)
    kept = width.kept_units(groups, scores, width.WidthCut(0.34, "local", 1, 0), model)
    plan = width.width_plan(model, kept, groups, "test")
    masked, narrow = width.mask_model(model, plan, BEFORE, "test"), compact.compact_model(model, plan, "test")
    whole, shown, small = draw(model), draw(masked), draw(narrow)
    found = {"kinds": sorted({group.kind for group in groups}), "narrow": distance(small, shown), "changed": distance(shown, whole)}
    found["lora"] = distance(draw(lora(model, narrow)), draw(lora(model, masked)))
    model.detach()
    before = draw(compact.compact_model(lora(model, model), plan, "test"))
    found["lora_order"] = torch.equal(before, draw(lora(model, narrow)))
    found["unloaded"] = unloaded(width, lora(model, masked), draw)
    none = width.width_plan(model, dict.fromkeys((group.key for group in groups), ()), groups, "test")
    found["nothing_left"] = distance(draw(compact.compact_model(model, none, "test")), draw(width.mask_model(model, none, BEFORE, "test")))
    turns = [torch.equal(draw(of), first) for _ in range(7) for of, first in ((model, whole), (narrow, small), (masked, shown))]
    found["turns"] = sum(turns)
    model.detach()
    found["low_rank"] = factored(importlib.import_module(f"{pack}.accel.prune.low_rank"), model, draw, whole)
    return found


def factored(low_rank, model, draw, whole) -> dict:
    """Modulation in factors of full rank, with a LoRA, after the host has moved the weights away, and at rank 2; or why not."""
    try:
        full, _ = low_rank.factor_modulation(model, 65536, "test")
    except ValueError as refusal:
        return {"refused": str(refusal)}
    found = {"full": distance(draw(full), whole), "two": distance(draw(low_rank.factor_modulation(model, 2, "test")[0]), whole)}
    expected, patched = draw(lora(model, model)), lora(model, full)
    found |= {"lora": distance(draw(patched), expected), "lora_moved": distance(expected, whole)}
    comfy.model_management.load_models_gpu([patched])
    patched.partially_unload(torch.device("cpu"), 1 << 40)
    found["unloaded"] = distance(draw(patched), expected)
    patched.detach()
    found["back"] = torch.equal(draw(model), whole)
    return found


def unloaded(width, masked, draw) -> dict:
    """A model with masks and a LoRA whose weights the host has moved away: the LoRA comes to stand behind the masks, and not in the run."""
    wanted = draw(masked)
    comfy.model_management.load_models_gpu([masked])
    masked.partially_unload(torch.device("cpu"), 1 << 40)
    functions = [(layer, getattr(layer, "weight_function", ())) for layer in masked.model.modules()]
    layers = [layer for layer, found in functions if any(isinstance(function, width.ColumnMask) for function in found)]
    behind = sum(not isinstance(layer.weight_function[-1], width.ColumnMask) for layer in layers)
    masked.pre_run()
    last = all(isinstance(layer.weight_function[-1], width.ColumnMask) for layer in layers)
    masked.cleanup()
    return {"behind": behind, "last": last, "error": distance(draw(masked), wanted)}


def main() -> None:
    nodes = load_pack()
    pack = nodes["RectiflowCompactWidth"].__module__.rsplit(".nodes.", 1)[0]
    print(json.dumps({name: answers(pack, nodes, name) for name in FAMILIES}))


if __name__ == "__main__":
    main()
