"""RAS inside a real ComfyUI: the same latents and tokens as here, and on its own transformers the check of computed tokens."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from rectiflow.host.embedded import run_graph
from rectiflow.tests.contract.test_comfyui import both_hosts_agree, decoded, ksampler, shown, stock

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).resolve().parent.parent.parent
EMPTY = ("RectiflowEmptyLatent", {"vae": ["load", 2], "width": 64, "height": 72, "batch_size": 2})


def regions(**changed) -> tuple[str, dict]:
    widgets = {
        "sample_ratio": 0.4, "start_step": 2, "end_step": 1000, "reset_steps": "5", "metric": "std", "focus": "low_std", "starvation": 0.5,
        "kv_cache": "full", "high_ratio": 1.0, "ratio_slope": 0, "ratio_period": 0, "inactive_order": 1, "cell": 1, "kv_dtype": "same",
        "kv_device": "model", "max_mib": 256, "overlay": True,
    }  # fmt: skip
    return "RectiflowRegionAdaptiveSampling", {"model": ["load", 0], **widgets, **changed}


GRAPHS = {
    "Euler, batch of two": stock(
        ras=regions(), empty=EMPTY, sample=ksampler(["empty", 0], model=["ras", 0], steps=8), decode=decoded(["sample", 0]),
        save=shown(["decode", 0]),
    ),
    "Heun, image to image, no keys kept": stock(
        ras=regions(kv_cache="none", inactive_order=0, start_step=1), encode=("VAEEncode", {"pixels": ["picture", 0], "vae": ["load", 2]}),
        sample=ksampler(["encode", 0], model=["ras", 0], steps=6, sampler_name="heun", denoise=0.7), decode=decoded(["sample", 0]),
        save=shown(["decode", 0]),
    ),
    "mixed grains, batch of two": stock(
        density=("RectiflowInformationDensityMap", {
            "region": 16, "sigma": 0.01, "bins": 0, "source": "luma", "image": ["picture", 0],
        }),
        grains=("RectiflowGrainMap", {
            "density": ["density", 0], "mode": "share", "fine_share": 0.5, "threshold": 0.5, "region": 16, "smooth": 0,
        }),
        mixed=("RectiflowMixedGrainTokens", {
            "model": ["load", 0], "grain_map": ["grains", 0], "block_start": 1, "block_end": 7, "start_percent": 0.2, "end_percent": 0.9,
            "merge": "mean", "unmerge": "delta", "position": "centre", "weight_attention": True, "grain": 2,
        }),
        empty=("RectiflowEmptyLatent", {"vae": ["load", 2], "width": 64, "height": 64, "batch_size": 2}),
        sample=ksampler(["empty", 0], model=["mixed", 0], steps=8), decode=decoded(["sample", 0]), save=shown(["decode", 0]),
    ),
    "skipped MLPs, batch of two": stock(
        skip=("RectiflowTokenSkipMLP", {
            "model": ["load", 0], "ratio": 0.5, "router": "latent_variance", "reuse": "cached_mlp_output", "blocks": "double:1-, single",
            "start_percent": 0.2, "end_percent": 0.9, "max_mib": 64,
        }),
        empty=EMPTY, sample=ksampler(["empty", 0], model=["skip", 0], steps=8), decode=decoded(["sample", 0]), save=shown(["decode", 0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", GRAPHS)
def test_regions_give_the_same_latent_on_both_hosts(what, comfyui_server, embedded):
    both_hosts_agree(GRAPHS[what], comfyui_server, embedded)


def test_reports_of_both_hosts_list_the_same_tokens(comfyui_server, embedded):
    graph = stock(
        ras=regions(), empty=EMPTY, sample=ksampler(["empty", 0], model=["ras", 0], steps=8),
        report=("RectiflowRegionReport", {"state": ["ras", 1], "after": ["sample", 0]}),
        show=("PreviewAny", {"source": ["report", 1]}),
    )  # fmt: skip
    found = [outputs["show"]["text"][0] for outputs in (run_graph(graph, embedded).outputs, comfyui_server.run(graph)["outputs"])]
    here, there = (json.loads(text) for text in found)
    keep = ("step", "phase", "tokens", "reason")
    visits = [[tuple(visit[name] for name in keep) for visit in report["visits"]] for report in (here, there)]
    assert visits[0] == visits[1] and len(visits[0]) == 8 and here["tokens"] == 72 and here["kv_bytes"] == there["kv_bytes"] > 0


def test_its_own_transformers_give_dense_values_on_computed_tokens(tmp_path):
    """ComfyUI's Flux, MMDiT, NextDiT, Chroma, Qwen-Image and Wan with random weights, in its own Python."""
    script = Path(__file__).with_name("region_in_comfyui.py")
    (tmp_path / "rectiflow").symlink_to(ROOT, target_is_directory=True)
    paths = [os.environ.get("PYTHONPATH", ""), os.environ["COMFYUI_PATH"], str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    python = os.environ.get("COMFYUI_PYTHON", "python")
    done = subprocess.run([python, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert {"flux", "sd3", "lumina2", "chroma", "qwen_image", "wan"} <= set(errors)
    assert all(error <= 1e-4 for error in errors.values()), errors
