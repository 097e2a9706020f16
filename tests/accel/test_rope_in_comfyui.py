"""Scaled rotary positions inside a real ComfyUI on its own classes: every family sampled with the node, or refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).resolve().parents[2]
SCALED = ("Flux", "Chroma", "Lumina 2", "Wan", "Wan VACE", "Wan Camera", "HunyuanVideo", "Qwen-Image", "HiDream")


@pytest.fixture(scope="module")
def answers():
    checkout, python = os.environ["COMFYUI_PATH"], os.environ.get("COMFYUI_PYTHON", sys.executable)
    paths = [os.environ.get("PYTHONPATH", ""), checkout]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [python, str(ROOT / "tests" / "accel" / "comfyui_rope.py"), str(ROOT)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("family", SCALED)
def test_a_family_draws_with_scaled_positions(answers, family):
    found = answers[family]
    assert found["same_inside"] and found["same_off"] and found["finite"]
    assert found["moved"] > 1e-3 and found["moved_wide"] > 1e-4, "the toy's picture depends on its positions"
    # The same angles, from halved places in the host's own table; fp32 over 4 guided steps.
    assert found["error"] <= 1e-4 * max(1.0, found["moved"])


def test_every_other_family_is_refused_by_name(answers):
    others = {name: found for name, found in answers.items() if name not in SCALED}
    assert others
    for name, found in others.items():
        assert found["class"] in found.get("refused", ""), name
        assert "Lumina 2" in found["refused"]
