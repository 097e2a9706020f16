"""The measuring nodes inside a real ComfyUI: they run, count and measure what they count and measure here."""

from __future__ import annotations

import json

import pytest
from rectiflow.host.embedded import run_graph
from rectiflow.tests.contract.test_comfyui import both_hosts_agree

pytestmark = pytest.mark.comfyui


def shown(source: list) -> dict:
    return {"class_type": "PreviewAny", "inputs": {"source": source}}


def saved(image: list, name: str) -> dict:
    return {"class_type": "SaveImage", "inputs": {"images": image, "filename_prefix": name}}


def measuring_graph() -> dict:
    """Four guided steps under a stopwatch, the picture against a real one in every way, and the straightness of two paths."""
    pair = {"image": ["7", 0], "reference": ["8", 0]}
    nodes = {
        "1": ("RectiflowLoadTiny", {}),
        "2": ("CLIPTextEncode", {"text": "noto cat on white", "clip": ["1", 1]}),
        "3": ("CLIPTextEncode", {"text": "", "clip": ["1", 1]}),
        "4": ("RectiflowEmptyLatent", {"vae": ["1", 2], "width": 64, "height": 64, "batch_size": 2}),
        "5": ("RectiflowStopwatch", {"model": ["1", 0]}),
        "6": ("KSampler", {
            "model": ["5", 0], "seed": 3, "steps": 4, "cfg": 3.0, "sampler_name": "heun", "scheduler": "simple", "positive": ["2", 0],
            "negative": ["3", 0], "latent_image": ["4", 0], "denoise": 1.0,
        }),
        "7": ("VAEDecode", {"samples": ["6", 0], "vae": ["1", 2]}),
        "8": ("RectiflowExamplePicture", {"picture": "smiling cat"}),
        "9": ("RectiflowPictureMetrics", {**pair, "window": "gaussian", "region": "mask", "mask": ["8", 1]}),
        "10": ("RectiflowFeatureDistance", {**pair, "sigma": 0.2, "blocks": "double:1-2, single:0-5", "seed": 0}),
        "11": ("RectiflowDifferencePicture", {**pair, "quantity": "structure", "full_scale": 1.0}),
        "12": ("RandomNoise", {"noise_seed": 5}),
        "13": ("CFGGuider", {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "cfg": 1.0}),
        "14": ("BasicScheduler", {"model": ["1", 0], "scheduler": "simple", "steps": 5, "denoise": 1.0}),
        "15": ("RectiflowFlowStraightness", {"noise": ["12", 0], "guider": ["13", 0], "sigmas": ["14", 0], "latent_image": ["4", 0]}),
        "16": ("RectiflowStopwatchReport", {"stopwatch": ["5", 1], "latent": ["6", 0]}),
        "17": ("VAEEncode", {"pixels": ["8", 0], "vae": ["1", 2]}),
        "18": ("RectiflowInversionReport", {
            "window": "uniform", "source_latent": ["17", 0], "latent": ["17", 0], "last_denoised": ["17", 0],
        }),
    }
    graph = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    graph |= {"20": saved(["10", 2], "features"), "21": saved(["11", 0], "structure"), "22": saved(["15", 3], "curve")}
    sources = (["9", 1], ["9", 2], ["9", 3], ["10", 0], ["15", 0], ["15", 1], ["16", 3], ["18", 1], ["18", 4])
    return graph | {f"text{number}": shown(source) for number, source in enumerate(sources)}


def numbers(outputs: dict) -> list[float]:
    return [json.loads(outputs[key]["text"][0]) for key in sorted(outputs) if key.startswith("text")]


def test_both_hosts_measure_the_same(comfyui_server, embedded):
    graph = measuring_graph()
    here, there = numbers(run_graph(graph, embedded).outputs), numbers(comfyui_server.run(graph)["outputs"])
    assert here == pytest.approx(there, rel=1e-3)  # 4 guided steps apart by 1e-4 at most in the latent
    assert here[6] == there[6] == 7  # Heun over 4 steps: 2·4 − 1 evaluations
    assert here[7] == there[7] == 0


def test_both_hosts_draw_the_same(comfyui_server, embedded):
    both_hosts_agree(measuring_graph(), comfyui_server, embedded)
