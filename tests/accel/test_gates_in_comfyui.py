"""Gated caches inside a real ComfyUI on its own classes: Flux, SD3, HunyuanVideo, Wan, Qwen-Image and LTX-Video at toy sizes."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def answers():
    return answers_of("accel/comfyui_gates.py")


@pytest.mark.parametrize("family", ["Flux", "SD3", "HunyuanVideo", "Wan", "Qwen-Image", "LTX-Video"])
def test_gates_on_every_family(answers, family):
    found = answers[family]
    assert found["modulated"] < 1e-5  # float32, another order of the same sums
    assert all(found["off"]) and all(found["finite"])
    assert found["visits"] == {"confidence": "F..F", "first_block": "F..F", "modulated_input": "F..F", "input_change": "FF.F"}
