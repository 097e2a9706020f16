"""Skipped MLPs inside a real ComfyUI on its own classes: six families skip as the masked dense network does, others are refused by name."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui

MLPS = {"Flux": 4, "Chroma": 4, "SD3": 2, "Lumina 2": 2, "Qwen-Image": 2, "Wan": 2}


@pytest.fixture(scope="module")
def answers():
    return answers_of("accel/comfyui_token_skip.py")


@pytest.mark.parametrize("family", MLPS)
@pytest.mark.parametrize("reuse", ["residual_only", "cached_mlp_output"])
def test_a_family_draws_with_skipped_mlps(answers, family, reuse):
    """velocity_change needs two steps before it can choose."""
    found, tokens = answers[family][reuse], 36 if family == "Wan" else 12
    assert answers[family]["same_off"] and found["finite"] and found["said"] and not found["notes"] and found["moved"] > 1e-6
    assert found["calls"] == [answers[family]["steps"] - 2, 2] and found["tokens"] == [tokens, tokens / 2] and found["mlps"] == MLPS[family]


@pytest.mark.parametrize("family", MLPS)
def test_gather_and_scatter_equal_the_masked_dense_network(answers, family):
    """Over a whole run of four steps."""
    assert answers[family]["ran"] and answers[family]["error"] <= 1e-5


def test_every_other_family_is_refused_by_name(answers):
    others = {name: found for name, found in answers.items() if name not in MLPS and name not in ("Wan VACE", "Wan Camera")}
    assert others
    for name, found in others.items():
        assert "refused" in found and (found["class"] in found["refused"] or name in found["refused"]), name
