"""Several sizes in one sequence inside a real ComfyUI: on its own Flux as alone, every other class refused by name of the input."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def answers():
    return answers_of("accel/comfyui_packing.py")


def test_a_packed_run_is_the_separate_runs(answers):
    assert len(answers["Flux"]["errors"]) == 3 and max(answers["Flux"]["errors"]) < 1e-5


def test_every_other_family_is_refused(answers):
    others = {name: found for name, found in answers.items() if name != "Flux"}
    assert len(others) > 10
    for name, found in others.items():
        assert "Pack Latents" in found["refused"], name
