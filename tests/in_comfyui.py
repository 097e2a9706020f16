"""Starts a script of the tests under ComfyUI's own Python, inside its checkout, and reads the JSON that it prints last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def answers_of(script: str, *arguments: str) -> Any:
    """What tests/`script` found; it is given the pack's folder, then `arguments`. COMFYUI_PATH names the checkout."""
    checkout, python = os.environ["COMFYUI_PATH"], os.environ.get("COMFYUI_PYTHON", sys.executable)
    paths = [os.environ.get("PYTHONPATH", ""), checkout]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [python, str(ROOT / "tests" / script), str(ROOT), *arguments]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
