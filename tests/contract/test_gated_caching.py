"""Gated caches inside a real ComfyUI: the same latents as here, and the same decisions in the report."""

from __future__ import annotations

import json

import pytest
from rectiflow.host.embedded import run_graph
from rectiflow.tests.contract.test_caching import EMPTY
from rectiflow.tests.contract.test_comfyui import both_hosts_agree, decoded, ksampler, shown, stock

pytestmark = pytest.mark.comfyui

LIMITS = {"warmup_steps": 2, "tail_steps": 1, "start_percent": 0.0, "end_percent": 1.0}


def gate(**changed) -> tuple[str, dict]:
    widgets = {
        "threshold": 0.15, "last_order": 1, "first_order": 1, "max_consecutive": -1, "gate": "hidden", "gate_reduce": "max_over_batch",
        "err_mode": "instant", "basis": "newton", "subsample": 1,
    }  # fmt: skip
    return "RectiflowConfidenceGatedTaylor", {"model": ["load", 0], **widgets, **LIMITS, **changed}


def reuse(rule: str, threshold: float, curve="") -> tuple[str, dict]:
    widgets = {"rule": rule, "threshold": threshold, "max_consecutive": 3, "curve": curve, "forecast_order": 0}
    return "RectiflowReuseCache", {"model": ["load", 0], **widgets, **LIMITS}


CACHES = {
    "confidence": gate(),
    "residual": gate(gate="residual", threshold=0.3, subsample=2),
    "first_block": reuse("first_block", 0.6),
    "modulated_input": reuse("modulated_input", 0.6),
    "input_change": reuse("input_change", 0.5),
    "magnitude": reuse("magnitude", 0.1, "1.04 1.04"),
}


@pytest.mark.parametrize("what", CACHES)
def test_gates_decide_and_give_the_same_on_both_hosts(what, comfyui_server, embedded):
    graph = stock(
        cache=CACHES[what], empty=EMPTY, sample=ksampler(["empty", 0], model=["cache", 0], steps=8), decode=decoded(["sample", 0]),
        save=shown(["decode", 0]), report=("RectiflowCacheReport", {"report": ["cache", 1], "after": ["sample", 0]}),
        show=("PreviewAny", {"source": ["report", 1]}),
    )  # fmt: skip
    found = [outputs["show"]["text"][0] for outputs in (run_graph(graph, embedded).outputs, comfyui_server.run(graph)["outputs"])]
    here, there = (json.loads(text) for text in found)
    assert here["finished"] and 0 < here["hit_ratio"] == there["hit_ratio"] < 1
    assert [visit["decision"] for visit in here["visits"]] == [visit["decision"] for visit in there["visits"]]
    both_hosts_agree({name: node for name, node in graph.items() if name not in ("report", "show")}, comfyui_server, embedded)


def test_a_calibration_feeds_a_cache_in_one_graph_on_both_hosts(comfyui_server, embedded):
    graph = stock(
        calibrate=("RectiflowReuseCalibrate", {"model": ["load", 0]}), empty=EMPTY,
        first=ksampler(["empty", 0], model=["calibrate", 0], steps=8),
        curve=("RectiflowReuseCurve", {"report": ["calibrate", 1], "after": ["first", 0], "degree": 1}),
        cache=reuse("magnitude", 0.15, ["curve", 0]),
        sample=ksampler(["empty", 0], model=["cache", 0], steps=8), decode=decoded(["sample", 0]), save=shown(["decode", 0]),
    )  # fmt: skip
    both_hosts_agree(graph, comfyui_server, embedded)


def test_a_probe_measures_the_same_on_both_hosts(comfyui_server, embedded):
    graph = stock(
        probe=("RectiflowBlockRangeProbe", {"model": ["load", 0], "sizes": "0.34 0.67"}), empty=EMPTY,
        sample=ksampler(["empty", 0], model=["probe", 0], steps=6), decode=decoded(["sample", 0]), save=shown(["decode", 0]),
        report=("RectiflowCacheReport", {"report": ["probe", 1], "after": ["sample", 0]}), show=("PreviewAny", {"source": ["report", 1]}),
        chart=("RectiflowBlockRangeChart", {"report": ["probe", 1], "after": ["sample", 0]}),
        see=("PreviewImage", {"images": ["chart", 0]}),
    )  # fmt: skip
    found = [outputs["show"]["text"][0] for outputs in (run_graph(graph, embedded).outputs, comfyui_server.run(graph)["outputs"])]
    here, there = (json.loads(text)["findings"]["changes"] for text in found)
    assert [one["blocks"] for one in here] == [one["blocks"] for one in there] and len(here) == 6
    for ours, theirs in zip(here, there):
        # The hosts' attention adds up in another order: 1e-5 of a velocity, more of a difference of two.
        assert ours["change"][1:] == pytest.approx(theirs["change"][1:], rel=1e-3)
