"""Context Drop inside a real ComfyUI on its own classes: every attention over image tokens drops keys, others are refused by name."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

# Attentions of a forward at the toys' depths, and image tokens with the text's: SD3's first block attends twice.
DROPPING = {"Flux": 4, "Chroma": 4, "SD3": 3, "Lumina 2": 2, "Qwen-Image": 2, "Wan": 2, "HunyuanVideo": 4}


@pytest.fixture(scope="module")
def answers():
    return answers_of("accel/comfyui_context_drop.py")


@pytest.mark.parametrize("family", DROPPING)
def test_a_family_draws_with_pooled_keys(answers, family):
    found = answers[family]
    assert found["same_off"] and found["finite"] and found["moved"] > 1e-6
    assert found["calls"] == [found["steps"] * DROPPING[family], 0]


@pytest.mark.parametrize("family", DROPPING)
def test_keys_are_pooled_before_rotation_where_blocks_are_given_their_table(answers, family):
    found = answers[family]["free"]
    if family in ("SD3", "Lumina 2"):
        assert "'pool'" in found["refused"]
    else:
        assert found["finite"] and found["moved"] > 1e-6 and found["calls"] == answers[family]["calls"]


def test_image_keys_alone_fall_to_the_number_of_squares(answers):
    """Wan attends over 3 frames of 3 × 4 tokens without text: 2 · 2 squares a frame."""
    assert answers["Wan"]["share"] == pytest.approx(4 / 12)


def test_every_other_family_is_refused_by_name(answers):
    others = {name: found for name, found in answers.items() if name not in DROPPING}
    assert others
    for name, found in others.items():
        assert "refused" in found and (found["class"] in found["refused"] or name in found["refused"]), name
