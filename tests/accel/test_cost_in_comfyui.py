"""Predicted FLOPs inside a real ComfyUI: on its own classes, what torch's counter counts."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def answers():
    return answers_of("accel/comfyui_cost.py")


@pytest.mark.parametrize("family", ["Flux", "Chroma", "SD3", "Lumina 2", "Qwen-Image", "Wan"])
def test_flops_are_those_that_torch_counts(answers, family):
    found = answers[family]
    assert not found["unknown"]
    assert found["predicted"] == pytest.approx(found["counted"], rel=0.02)
