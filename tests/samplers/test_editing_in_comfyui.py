"""RF-Edit inside a real ComfyUI on its own classes: Flux, SD3, HunyuanVideo, Wan, Qwen-Image and LTX-Video at toy sizes."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

# Image tokens and text tokens in the values of one block; Wan and LTX-Video read their text in another attention.
TOKENS = {"Flux": 12 + 5, "SD3": 12 + 5, "HunyuanVideo": 36 + 5, "Wan": 36, "Qwen-Image": 12 + 5, "LTX-Video": 36}


@pytest.fixture(scope="module")
def answers():
    return answers_of("samplers/comfyui_editing.py")


@pytest.mark.parametrize("family", TOKENS)
def test_features_of_every_family(answers, family):
    found = answers[family]
    assert found["family"] == family and found["tokens"] == TOKENS[family]
    assert found["no_steps"] and found["strength_0"], "off is off, to the last bit"
    assert found["put_back"] and found["others_untouched"] and found["shares"] and found["finite"]
    assert found["image_only"] and found["freed"] and found["made_again"]


@pytest.mark.parametrize("family", TOKENS)
def test_the_same_prompt_at_the_same_sigma_changes_nothing_but_the_round_trips_error(answers, family):
    assert answers[family]["identity"] < 1e-5
