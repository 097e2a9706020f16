"""Scaled rotary positions inside a real ComfyUI on its own classes: every family sampled with the node, or refused by name."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

SCALED = ("Flux", "Chroma", "Lumina 2", "Wan", "Wan VACE", "Wan Camera", "HunyuanVideo", "Qwen-Image", "HiDream")


@pytest.fixture(scope="module")
def answers():
    return answers_of("accel/comfyui_rope.py")


@pytest.mark.parametrize("family", SCALED)
def test_a_family_draws_with_scaled_positions(answers, family):
    found = answers[family]
    assert found["same_inside"] and found["same_off"] and found["finite"]
    assert found["moved"] > 1e-3 and found["moved_wide"] > 1e-4, "the toy's picture depends on its positions"
    # The same angles, from halved places in the host's own table; fp32 over 4 guided steps.
    assert found["error"] <= 1e-4 * max(1.0, found["moved"])


@pytest.mark.parametrize("family", SCALED)
def test_sharper_attention_of_the_picture_alone(answers, family):
    """Beside text it is neither the plain run nor that of all tokens; Wan has no text there, and the variants are not read so closely."""
    found = answers[family]["picture"]
    if isinstance(found, str):
        assert family in ("Wan VACE", "Wan Camera", "HiDream") and "'apply_to'" in found
    elif family == "Wan":
        assert found[0] > 1e-3 and found[1] < 1e-5
    else:
        assert found[0] > 1e-3 and found[1] > 1e-3


def test_every_other_family_is_refused_by_name(answers):
    others = {name: found for name, found in answers.items() if name not in SCALED}
    assert others
    for name, found in others.items():
        assert found["class"] in found.get("refused", ""), name
        assert "Lumina 2" in found["refused"]
