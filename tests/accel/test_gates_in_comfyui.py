"""Gated caches inside a real ComfyUI on its own classes: Flux, SD3, HunyuanVideo, Wan, Qwen-Image and LTX-Video at toy sizes."""

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
    command = [python, str(ROOT / "tests" / "accel" / "comfyui_gates.py"), str(ROOT)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("family", ["Flux", "SD3", "HunyuanVideo", "Wan", "Qwen-Image", "LTX-Video"])
def test_gates_on_every_family(answers, family):
    found = answers[family]
    assert found["modulated"] < 1e-5  # float32, another order of the same sums
    assert all(found["off"]) and all(found["finite"])
    assert found["visits"] == {"confidence": "F..F", "first_block": "F..F", "modulated_input": "F..F", "input_change": "FF.F"}
