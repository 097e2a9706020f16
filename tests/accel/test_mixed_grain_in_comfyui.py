"""Mixed grains inside a real ComfyUI on its own classes: five families merge, every other is refused by name."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

MERGING = ("Flux", "Chroma", "SD3", "Qwen-Image", "Wan")
WITHOUT = ("Wan VACE", "Wan Camera")  # variants that token_spec may take or leave; either way nothing goes wrong unseen


@pytest.fixture(scope="module")
def answers():
    return answers_of("accel/comfyui_mixed_grain.py")


@pytest.mark.parametrize("family", MERGING)
def test_a_family_draws_with_merged_tokens(answers, family):
    """3 × 4 tokens, Wan's in 3 frames: the left two columns are one whole cell and two tokens at the edge."""
    found = answers[family]
    frames = 3 if family == "Wan" else 1
    assert found["same_off"] and found["finite"] and found["moved"] > 1e-6 and found["said"] and not found["notes"]
    assert found["calls"] == [found["steps"], 0] and found["tokens"] == [12 * frames, 9 * frames]
    assert all(0.5 < merged / whole < 1.0 for merged, whole in found["flops"])


@pytest.mark.parametrize("family", MERGING)
@pytest.mark.parametrize("unmerge", ["delta", "copy"])
def test_equal_tokens_without_places_are_drawn_as_by_the_whole_model(answers, family, unmerge):
    assert answers[family][unmerge] <= 1e-5


def test_every_other_family_is_refused_by_name(answers):
    others = {name: found for name, found in answers.items() if name not in MERGING and name not in WITHOUT}
    assert others
    for name, found in others.items():
        assert "refused" in found and (found["class"] in found["refused"] or name in found["refused"]), name
