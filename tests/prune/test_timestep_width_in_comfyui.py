"""Width by timestep inside a real ComfyUI on its own classes: slices equal masks in six families, others are refused by name."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

KINDS = {
    "Flux": ["ffn", "heads", "txt_ffn"], "Chroma": ["ffn", "heads", "txt_ffn"], "SD3": ["ffn", "heads", "heads2", "txt_ffn"],
    "Qwen-Image": ["ffn", "heads", "txt_ffn"], "Lumina 2": ["ffn", "heads"], "Wan": ["ffn"],
}  # fmt: skip


@pytest.fixture(scope="module")
def answers():
    return answers_of("prune/comfyui_timestep_width.py")


@pytest.mark.parametrize("family", KINDS)
def test_slices_equal_masks(answers, family):
    found = answers[family]
    assert found["kinds"] == KINDS[family] and found["same_off"] and found["restored"] and found["said"]
    assert 0.9 - 1e-6 <= found["flops"] <= 0.92
    for case in ("table", "half"):
        assert found[case]["error"] <= 1e-5 and found[case]["moved"] > 1e-5, case


def test_every_other_family_is_refused_by_name(answers):
    others = {name: found for name, found in answers.items() if name not in KINDS and name not in ("Wan VACE", "Wan Camera")}
    assert others
    for name, found in others.items():
        assert "refused" in found and (found["class"] in found["refused"] or name in found["refused"]), name
