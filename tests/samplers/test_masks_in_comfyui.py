"""The masks and predictions palettes inside a real ComfyUI, on its own Wan 2.2 class: times a frame, given frames, both paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def answers():
    checkout, python = os.environ["COMFYUI_PATH"], os.environ.get("COMFYUI_PYTHON", sys.executable)
    paths = [os.environ.get("PYTHONPATH", ""), checkout]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [python, str(ROOT / "tests" / "samplers" / "comfyui_masks.py"), str(ROOT)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


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
