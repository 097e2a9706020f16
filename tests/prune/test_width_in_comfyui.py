"""Masks and narrower layers inside a real ComfyUI on its own classes, at toy sizes with random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "Flux": ["ffn", "heads", "txt_ffn"], "HunyuanVideo": ["ffn", "heads", "txt_ffn"], "SD3": ["ffn", "heads", "heads2", "txt_ffn"],
    "Qwen-Image": ["ffn", "heads", "txt_ffn"], "Wan": ["ffn"], "LTX-Video": ["ffn"],
}  # fmt: skip


@pytest.fixture(scope="module")
def answers():
    checkout, python = os.environ["COMFYUI_PATH"], os.environ.get("COMFYUI_PYTHON", sys.executable)
    paths = [os.environ.get("PYTHONPATH", ""), checkout]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [python, str(ROOT / "tests" / "prune" / "comfyui_width.py"), str(ROOT)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("family", KINDS)
def test_masks_and_narrow_layers_on_every_family(answers, family):
    """Distances relative to the largest number; float32, sums in another order."""
    found = answers[family]
    assert found["kinds"] == KINDS[family]
    assert found["narrow"] < 1e-5 and found["nothing_left"] < 1e-5 and found["changed"] > 1e-3
    assert found["lora"] < 1e-5 and found["lora_order"], "a LoRA of the whole model fits, before and behind"
    assert found["turns"] == 21, "runs in turn are bit-equal"


@pytest.mark.parametrize("family", KINDS)
def test_a_mask_stays_last_when_weights_are_moved_away(answers, family):
    found = answers[family]["unloaded"]
    assert found["behind"] > 0, "the host does put the LoRA behind"
    assert found["last"] and found["error"] < 1e-5
