"""The masks and predictions palettes inside a real ComfyUI, on its own Wan 2.2 class: times a frame, given frames, both paths."""

from __future__ import annotations

import pytest
from rectiflow.tests.in_comfyui import answers_of

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def answers():
    return answers_of("samplers/comfyui_masks.py")


@pytest.mark.parametrize("known", ["auto", "clean_t0"])
def test_given_frames_have_time_zero(answers, known):
    assert answers[known]["times"] == [[0, 0, 1000, 1000, 1000], [0, 0, 500, 500, 500], [0, 0, 500, 500, 500]]


@pytest.mark.parametrize("known", ["noised", "clean_shared"])
def test_one_time_for_all_frames_where_asked(answers, known):
    assert answers[known]["times"] == [[1000], [500], [500]]


def test_given_frames_stay_and_runs_are_finite(answers):
    assert all(answers[known]["kept"] for known in ("auto", "clean_t0", "noised", "clean_shared")) and answers["repaint"]


def test_euler_is_the_same_on_both_paths(answers):
    assert answers["views_differ_by"] < 1e-4  # float32 at levels up to 99
