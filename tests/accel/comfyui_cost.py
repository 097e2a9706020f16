"""Runs inside ComfyUI's Python: predicted FLOPs of ComfyUI's own classes beside torch's counter; prints one JSON object.

Started by test_cost_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import importlib
import json

import torch
from comfyui_families import TOYS, Bench, load_pack
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

FAMILIES = ("Flux", "Chroma", "SD3", "Lumina 2", "Qwen-Image", "Wan")


def answers(name: str) -> dict:
    bench = Bench(name)
    cost = importlib.import_module("pack_under_test.accel.cost")
    predictor = cost.Predictor.of(bench.model, TOYS[name].latent, [TOYS[name].length] * 2, "test")
    image = predictor.tokens(TOYS[name].latent)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        bench.draw(torch.tensor([0.9, 0.5]))
    return {"predicted": predictor.flops(image, image), "counted": counter.get_total_flops(), "unknown": predictor.cost.unknown}


if __name__ == "__main__":
    load_pack()
    print(json.dumps({name: answers(name) for name in FAMILIES}))
