"""Caches inside a real ComfyUI: the same latents as here, and the same decisions in the report."""

from __future__ import annotations

import json

import pytest
from rectiflow.host.embedded import run_graph
from rectiflow.tests.contract.test_comfyui import both_hosts_agree, decoded, ksampler, shown, stock

pytestmark = pytest.mark.comfyui

LIMITS = {"tail_steps": 1, "start_percent": 0.0, "end_percent": 1.0}


def taylor(**changed) -> tuple[str, dict]:
    widgets = {"interval": 3, "order": 1, "warmup_steps": 2, "granularity": "last_block", "basis": "newton", "axis": "step", **LIMITS}
    return "RectiflowTaylorForecastCache", {"model": ["load", 0], **widgets, **changed}


EMPTY = ("RectiflowEmptyLatent", {"vae": ["load", 2], "width": 64, "height": 64, "batch_size": 2})
GRAPHS = {
    "forecast tokens with Heun": stock(
        cache=taylor(), empty=EMPTY, sample=ksampler(["empty", 0], model=["cache", 0], steps=6, sampler_name="heun"),
        decode=decoded(["sample", 0]), save=shown(["decode", 0]),
    ),
    "a range of blocks, image to image": stock(
        cache=taylor(granularity="block_delta", blocks="double:1-, single"),
        encode=("VAEEncode", {"pixels": ["picture", 0], "vae": ["load", 2]}),
        sample=ksampler(["encode", 0], model=["cache", 0], steps=8, denoise=0.7), decode=decoded(["sample", 0]), save=shown(["decode", 0]),
    ),
    "repeated velocity, then the cache taken off": stock(
        cache=("RectiflowIntervalCache", {"model": ["load", 0], "interval": 2, "warmup_steps": 1, "granularity": "output", **LIMITS}),
        off=("RectiflowCacheOff", {"model": ["cache", 0]}), empty=EMPTY,
        sample=ksampler(["empty", 0], model=["cache", 0], steps=6),
        again=ksampler(["sample", 0], model=["off", 0], steps=3, denoise=0.5), decode=decoded(["again", 0]), save=shown(["decode", 0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", GRAPHS)
def test_caches_give_the_same_latent_on_both_hosts(what, comfyui_server, embedded):
    both_hosts_agree(GRAPHS[what], comfyui_server, embedded)


def test_reports_of_both_hosts_list_the_same_visits(comfyui_server, embedded):
    graph = stock(
        cache=taylor(), empty=EMPTY, sample=ksampler(["empty", 0], model=["cache", 0], steps=8),
        report=("RectiflowCacheReport", {"report": ["cache", 1], "after": ["sample", 0]}),
        show=("PreviewAny", {"source": ["report", 1]}),
    )  # fmt: skip
    found = [outputs["show"]["text"][0] for outputs in (run_graph(graph, embedded).outputs, comfyui_server.run(graph)["outputs"])]
    here, there = (json.loads(text) for text in found)
    assert here["finished"] and there["finished"] and here["hit_ratio"] == there["hit_ratio"] == 0.5
    steps = [[(visit["decision"], visit["reason"], visit["u"]) for visit in report["visits"]] for report in (here, there)]
    assert steps[0] == steps[1] and len(steps[0]) == 8
