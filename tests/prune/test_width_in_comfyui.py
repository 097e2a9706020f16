"""Masks and narrower layers inside a real ComfyUI on its own classes, at toy sizes with random weights."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

KINDS = {
    "Flux": ["ffn", "heads", "txt_ffn"], "HunyuanVideo": ["ffn", "heads", "txt_ffn"], "SD3": ["ffn", "heads", "heads2", "txt_ffn"],
    "Qwen-Image": ["ffn", "heads", "txt_ffn"], "Wan": ["ffn"], "LTX-Video": ["ffn"],
}  # fmt: skip


@pytest.fixture(scope="module")
def answers():
    return answers_of("prune/comfyui_width.py")


@pytest.mark.parametrize("family", KINDS)
def test_masks_and_narrow_layers_on_every_family(answers, family):
    """Distances relative to the largest number; float32, sums in another order."""
    found = answers[family]
    assert found["kinds"] == KINDS[family]
    assert found["narrow"] < 1e-5 and found["nothing_left"] < 1e-5 and found["changed"] > 1e-3
    assert found["lora"] < 1e-5 and found["lora_order"], "a LoRA of the whole model fits, before and behind"
    assert found["turns"] == 21, "runs in turn are bit-equal"


@pytest.mark.parametrize("family", KINDS)
def test_a_mask_stays_last_when_weights_are_moved_away(answers, family):
    found = answers[family]["unloaded"]
    assert found["behind"] > 0, "the host does put the LoRA behind"
    assert found["last"] and found["error"] < 1e-5


@pytest.mark.parametrize("family", KINDS)
def test_modulation_in_factors(answers, family):
    """Full rank to rounding; a LoRA is kept to a thousandth of itself, exactly where the host adds it while the model runs."""
    found = answers[family]["low_rank"]
    if family in ("Wan", "LTX-Video", "SD3"):  # of SD3's two blocks here no two layers are alike; deeper ones have groups
        assert "'model'" in found["refused"]
        return
    assert found["full"] < 1e-5 < 1e-3 < found["two"] and found["back"]
    assert max(found["lora"], found["unloaded"]) < 1e-4 < 1e-2 < found["lora_moved"]
