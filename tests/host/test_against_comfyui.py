"""This host beside a real ComfyUI in one process: the same numbers, the same events. Needs COMFYUI_PATH."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).resolve().parents[2]

# Absolute, on values of size 1. Samplers, solved systems and blends sum the same terms in another order; the rest is the same arithmetic.
TOLERANCES = {
    "tables": 0.0, "schedules": 0.0, "samplers": 2e-5, "runs": 1e-5, "events": 0.0, "helpers": 1e-5, "weight_patches": 1e-6, "merging": 0.0,
    "latent_formats": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[str, dict[str, float]]:
    checkout = os.environ.get("COMFYUI_PATH")
    python = os.environ.get("COMFYUI_PYTHON", "python")
    folder = tmp_path_factory.mktemp("packages")
    (folder / "rectiflow").symlink_to(ROOT, target_is_directory=True)
    paths = [os.environ.get("PYTHONPATH", ""), checkout, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests" / "host" / "comfyui_checks.py"
    done = subprocess.run([python, str(script)], env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", TOLERANCES)
def test_equal(outcome, check):
    cases = outcome[check]
    assert cases
    beyond = {case: value for case, value in cases.items() if not value <= TOLERANCES[check]}
    assert not beyond


def test_every_check_is_looked_at(outcome):
    assert set(outcome) == set(TOLERANCES)
