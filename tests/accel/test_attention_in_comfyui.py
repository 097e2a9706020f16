"""Attention nodes inside a real ComfyUI on its own classes: each family under groups equals the same groups written as a mask of pairs."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

STEPS = 4
ATTENTIONS = {"Flux": 4, "Chroma": 4, "SD3": 3, "Lumina 2": 2, "Qwen-Image": 2, "Wan": 2, "HunyuanVideo": 4}
EQUAL = 2e-5  # fp32 sums in another order, through every layer and four steps of pictures of size 1 to 10


@pytest.fixture(scope="module")
def answers():
    return answers_of("accel/comfyui_attention.py")


@pytest.mark.parametrize("family", ATTENTIONS)
def test_groups_equal_their_mask(answers, family):
    found = answers[family]
    assert found["finite"] and found["error"] < EQUAL < 0.1 < found["moved"]
    assert found["sparse"] == ATTENTIONS[family] * STEPS and found["dense"] == 0


@pytest.mark.parametrize("family", ATTENTIONS)
def test_groups_that_see_all_are_bit_identical(answers, family):
    assert answers[family]["same_off"]


@pytest.mark.parametrize("family", ATTENTIONS)
def test_rettention_that_measures_every_step_is_bit_identical(answers, family):
    assert answers[family]["measured_only_is_exact"]


@pytest.mark.parametrize("pattern", ["grat_block", "band_1d", "frame_band"])
@pytest.mark.parametrize("family", ATTENTIONS)
def test_rettention_gives_dense_attention_where_nothing_changed(answers, family, pattern):
    """x stays, sigma moves by 1e-5: the step after the measured one is the plain model's, which without the correction it is not."""
    found = answers[family]["rettention"][pattern]
    assert found["corrected"] < 0.02 * found["bare"] and found["bare"] > 0.01
    assert found["calls"][0] >= ATTENTIONS[family] and found["calls"][2] == 0


@pytest.mark.parametrize("family", ["LTX-Video", "Mochi", "AuraFlow"])
def test_other_families_are_refused_by_name(answers, family):
    assert family in answers[family]["refused"] and "Flux" in answers[family]["refused"]
