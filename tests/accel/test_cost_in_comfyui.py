"""Predicted FLOPs inside a real ComfyUI: on its own classes, what torch's counter counts."""

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
    command = [python, str(ROOT / "tests" / "accel" / "comfyui_cost.py"), str(ROOT)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("family", ["Flux", "Chroma", "SD3", "Lumina 2", "Qwen-Image", "Wan"])
def test_flops_are_those_that_torch_counts(answers, family):
    found = answers[family]
    assert not found["unknown"]
    assert found["predicted"] == pytest.approx(found["counted"], rel=0.02)
