"""The pruning nodes inside a real ComfyUI on its own classes: Flux, SD3 and Wan at toy sizes."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

FAMILIES = ("Flux", "SD3", "Wan")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return answers_of("prune/comfyui_prune.py", str(tmp_path_factory.mktemp("output")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skipped_block_is_a_network_without_it(answers, family):
    """Float32 on the CPU: the same sums in the same order, so 1e-6."""
    found = answers[family]["skipped"]
    assert found["difference"] < 1e-6 < 1e-4 < found["changed"]
    assert found["base_unchanged"] and found["smaller"] and found["recovered"]
    assert len(found["losses"]) == 2 and all(loss == loss for loss in found["losses"])


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_is_learned(answers, family):
    found = answers[family]["learned"]
    blocks, out = {"Flux": (6, 2), "SD3": (4, 1), "Wan": (4, 2)}[family]
    assert f"leaves out {out} of {blocks} blocks" in found["report"] and found["finite"] and found["plot"][-1] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_have_students_that_switch(answers, family):
    found = answers[family]["runs"]
    assert found["file"] and found["none"] and found["finite"] and found["base_unchanged"]
    assert all(distance > 1e-5 for distance in found["apart"]) and "all" in found["errors"]
    assert "velocity error of its student" in found["by_velocity"]
    layers = [layer for of_run in found["fitted"].values() for layer in of_run.values()]
    assert layers and all(layer["after"] <= layer["before"] for layer in layers)


@pytest.mark.parametrize("family", ("Flux", "SD3", "HunyuanVideo", "Qwen-Image"))
def test_text_of_a_run_is_linear(answers, family):
    """Where it is linear the model stays what it is, to what the smallest ridge leaves: 8e-5 and less measured."""
    found = answers["text"][family]
    assert found["error"] < 2e-4 < 1e-2 < found["planted"] and found["plain"] > 1e-4, found
    assert found["turns"] == 8 and found["unloaded"] and found["whole"] and found["bytes"] < 0.95
    assert "text of blocks 1-2 is linear" in found["report"] and found["plot"][-1] == 3


def test_a_family_without_text_of_its_own_is_refused(answers):
    assert "Qwen-Image" in answers["text"]["Wan"]["refused"]
