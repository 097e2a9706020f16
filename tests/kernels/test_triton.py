"""The Triton kernels: in the interpreter on any machine, and the same cases on a device where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from rectiflow.tests.kernels.triton_cases import CASES


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What became of each case: kernels are made for the interpreter when they are imported, so all run in one process of their own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "rectiflow.tests.kernels.triton_cases"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_in_the_interpreter(interpreted, case):
    assert not interpreted[case], interpreted[case]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_on_a_device(case):
    CASES[case]("cuda")
