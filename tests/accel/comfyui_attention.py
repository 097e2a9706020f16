"""Runs inside ComfyUI's Python: attention nodes on ComfyUI's own classes, at toy sizes with random weights; prints one JSON object.

Started by test_attention_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import importlib
import json

import torch
from comfyui_families import FALLING, TOYS, Bench, load_pack

import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip

FAMILIES = ("Flux", "Chroma", "SD3", "Lumina 2", "Qwen-Image", "Wan", "HunyuanVideo")
PATTERNS = ("grat_block", "band_1d", "frame_band")
REFUSED = ("LTX-Video", "Mochi", "AuraFlow")
RETTENTION = {
    "keep": 0.2, "pattern": "grat_block", "warmup_steps": 1, "period": 2, "ramp": 0.0, "rho_max": 1.0, "use_ratio": True,
    "use_residual": True, "residual_dtype": "same", "residual_device": "model", "memory_gib": 1.0, "min_tokens": 1,
}  # fmt: skip
NEAR = torch.tensor([0.9, 0.89999, 0.0])  # two steps of a schedule at which a model is nearly the same


def grouped(bench: Bench, **changed):
    """(MODEL, log) with groups of 1 × 2 × 3 tokens that see themselves alone."""
    part = importlib.import_module("pack_under_test.accel.attention.grouped")
    options = {"group": (1, 2, 3), "radius": 0, **changed}
    rule = part.GroupRule("block", options.pop("group"), options.pop("radius"))
    log = part.AttentionLog()
    return part.attach_grouped(bench.model, part.GroupedAttention(rule, log, "test", **{"min_tokens": 1, **options})), log


def seen_by_hand(bench: Bench) -> torch.Tensor:
    """The picture under the same groups written as a mask of pairs, by an override of our own that every image attention meets."""
    part = importlib.import_module("pack_under_test.accel.attention.grouped")
    sparse = importlib.import_module("pack_under_test.kernels.block_sparse_attention")
    spec = importlib.import_module("pack_under_test.families.tokens").attention_spec(bench.model.model.diffusion_model, "test")
    grid = importlib.import_module("pack_under_test.accel.region.grid").TokenGrid.of(bench.noise.shape[2:], spec.patch, "test")
    image, text = grid.count, bench.toy.length if spec.text_inside else 0
    refiners = len(getattr(bench.model.model.diffusion_model, "context_refiner", ())) * 2
    numbers = {"calls": 0}

    def override(func, q, k, v, heads, *rest, **more):
        joined = not more.get("skip_reshape")
        tokens = q.shape[1] if joined else q.shape[2]
        numbers["calls"] += 1
        counted = bool(spec.blocks) or (numbers["calls"] - 1) % (refiners + spec.layers) >= refiners
        own = k.shape[1 if joined else 2] == tokens
        if not own or not counted or tokens not in (image, image + text):
            return func(q, k, v, heads, *rest, **more)
        extra = tokens - image
        layout = part.group_layout(grid.sides, part.GroupRule("block", (1, 2, 3), 0), *((0, extra) if spec.text_last else (extra, 0)))
        if joined:
            q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
        out = sparse.reference(q, k, v, layout, rest[0] if rest else more.get("mask"))
        return out if more.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    model = bench.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return bench.draw(FALLING, model)


def answers(name: str, nodes: dict) -> dict:
    bench = Bench(name)
    try:
        model, log = grouped(bench)
    except ValueError as refusal:
        return {"refused": str(refusal)}
    plain, out = bench.draw(FALLING), bench.draw(FALLING, model)
    found = {"finite": bool(out.isfinite().all()), "moved": float((out - plain).abs().max()), "sparse": log.sparse, "dense": log.dense}
    found["error"] = float((out - seen_by_hand(bench)).abs().max())
    off, _ = grouped(bench, radius=64)
    found["same_off"] = torch.equal(bench.draw(FALLING, off), plain)
    found["rettention"] = {pattern: rettention(bench, nodes["RectiflowRettention"], pattern) for pattern in PATTERNS}
    exact, _ = nodes["RectiflowRettention"]().execute(model=bench.model, **{**RETTENTION, "period": 1})
    found["measured_only_is_exact"] = torch.equal(bench.draw(FALLING, exact), plain)
    return found


def unmoved(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The same x at both sigmas; what the model says at the second."""
    for sigma in sigmas[:-1]:
        denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
    return denoised


def rettention(bench: Bench, node, pattern: str) -> dict:
    """Largest change of the second of two evaluations, the first of which measures, with the correction and without."""

    def draw(model) -> torch.Tensor:
        prompts = [[[text.clone(), dict(given)] for text, given in prompt] for prompt in bench.prompts]
        nothing = torch.zeros_like(bench.noise)
        sampler = comfy.samplers.KSAMPLER(unmoved)
        return comfy.sample.sample_custom(model, bench.noise, 2.0, sampler, NEAR, *prompts, nothing, disable_pbar=True, seed=0)

    plain, errors = draw(bench.model), []
    options = {**RETTENTION, "pattern": pattern, "warmup_steps": 0}
    for corrected in (True, False):
        model, log = node().execute(model=bench.model, **{**options, "use_ratio": corrected, "use_residual": corrected})
        errors.append(float((draw(model) - plain).abs().max()))
    return {"corrected": errors[0], "bare": errors[1], "calls": log.calls}


if __name__ == "__main__":
    pack = load_pack()
    print(json.dumps({name: answers(name, pack) for name in (*FAMILIES, *REFUSED) if name in TOYS}))
