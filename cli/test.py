"""`rectiflow test`: the test suite, on the embedded host or inside a real ComfyUI; every other argument goes to pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .failures import CommandError

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
MOST_PROCESSES = 4  # each holds the tiny model and a torch of its own, 2 GB
HELP = """usage: rectiflow test [--host comfyui] [PYTEST ARGUMENTS]

Runs every test, on up to four processes at once, or those that the pytest arguments name (paths are relative to the project's folder):
  rectiflow test tests/samplers -k euler

--host comfyui   only the tests that run inside a real ComfyUI. COMFYUI_PATH names its checkout, COMFYUI_PYTHON the
                 Python with its requirements (default: the one that runs the tests).
"""


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    if not (ROOT / "tests").is_dir():
        raise CommandError("the tests are not part of an installed package; clone the project and start ./rectiflow test there.")
    command = [sys.executable, "-m", "pytest", *(arguments or ["--numprocesses", str(min(os.cpu_count() or 1, MOST_PROCESSES))])]
    os.chdir(ROOT)
    if os.name == "nt":
        return subprocess.call(command)
    os.execv(sys.executable, command)  # pytest takes this process's place, so that Ctrl-C and the exit status are its own
