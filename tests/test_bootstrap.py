"""./rectiflow as a process: when it installs, when it does not, and that nothing interrupted counts as done.

A stand-in for pip writes down how it was called, and another one is what gets started; the virtual environment is real.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = """
import pathlib, sys, time

def main(here):
    with open(here / "pip.log", "a") as log:
        print(*sys.argv[1:], file=log)
    print("Collecting something\\n  Downloading something-1.0-py3-none-any.whl (5.0 MB)", flush=True)
    if (here / "hang").exists():
        time.sleep(60)
    if (here / "fail").exists():
        sys.exit("ERROR: No matching distribution found for something")

if __name__ == "__main__":
    main(pathlib.Path.cwd())
"""
PROGRAM = """
import os, sys

print("started", *sys.argv[1:], "in", os.getcwd())
sys.exit(7)
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are found through the POSIX layout of .venv")


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with the script and pins, and beside it the stand-ins for pip and for the package that is started."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("rectiflow", "constraints.txt", "requirements.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    program = tmp_path / "elsewhere" / "rectiflow"
    program.mkdir(parents=True)
    (program.parent / "pip.py").write_text(PIP)
    (program / "__init__.py").touch()
    (program / "__main__.py").write_text(PROGRAM)
    return folder


def environment(clone: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(clone.parent / "elsewhere")}


def start(clone: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(clone / "rectiflow"), *arguments]
    return subprocess.run(command, env=environment(clone), cwd=cwd or clone.parent, capture_output=True, text=True, timeout=120)


def make_venv(clone: Path) -> None:
    """What the script does with pip in it, which takes seconds; the stand-in is found without."""
    venv.create(clone / ".venv", with_pip=False, symlinks=True)


def pip_calls(clone: Path) -> list[str]:
    log = clone / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_from_nothing_to_started_and_from_then_on_at_once(clone, tmp_path):
    broken = clone / ".venv" / "bin" / "python"  # as an upgrade of the system's Python leaves it
    broken.parent.mkdir(parents=True)
    broken.symlink_to(clone / "python-that-was-removed")
    first = start(clone, "run", "a graph.json", cwd=tmp_path)
    assert first.returncode == 7, first.stderr
    assert first.stdout == f"started run a graph.json in {tmp_path}\n"
    assert "making .venv" in first.stderr and "downloading something 1.0 (5.0 MB)" in first.stderr and "ready" in first.stderr
    calls = pip_calls(clone)
    assert "-r constraints.txt" in calls[0] and "--editable ." in calls[1] and len(calls) == 2

    second = start(clone, "nodes")
    assert (second.returncode, second.stderr, len(pip_calls(clone))) == (7, "", 2)

    with open(clone / "constraints.txt", "a") as pins:
        pins.write("another==1.0\n")
    third = start(clone, "nodes")
    assert third.returncode == 7 and "changed" in third.stderr and "making .venv" not in third.stderr
    assert len(pip_calls(clone)) == 4

    moved = clone.rename(tmp_path / "moved")
    fourth = start(moved, "nodes")
    assert fourth.returncode == 7 and len(pip_calls(moved)) == 6, "an editable install knows where its folder is"


def test_a_failed_install_says_why_and_is_done_again(clone):
    make_venv(clone)
    (clone / "fail").touch()
    failed = start(clone, "run")
    assert failed.returncode == 1 and "started" not in failed.stdout
    assert "No matching distribution" in failed.stderr and "rectiflow-install.log" in failed.stderr
    assert "Traceback" not in failed.stderr
    (clone / "fail").unlink()
    assert start(clone, "run").returncode == 7


def test_an_interrupted_install_is_done_again(clone):
    make_venv(clone)
    (clone / "hang").touch()
    process = subprocess.Popen(
        [sys.executable, str(clone / "rectiflow")], env=environment(clone), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not pip_calls(clone) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    (clone / "hang").unlink()
    assert start(clone).returncode == 7


def script() -> object:
    """The bootstrap as a module, to ask for what this machine's Python does not let happen."""
    loader = SourceFileLoader("rectiflow_bootstrap", str(ROOT / "rectiflow"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_an_old_python_is_told_so(monkeypatch, tmp_path):
    bootstrap = script()
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(bootstrap, "PYTHON", str(tmp_path / "python"))
    with pytest.raises(SystemExit, match=r"Python 3\.10 or newer is needed, this is 3\.9"):
        bootstrap.install("anything")


def test_a_python_without_venv_is_told_what_to_install(monkeypatch, tmp_path):
    bootstrap = script()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    monkeypatch.setattr(bootstrap, "VENV", str(tmp_path / ".venv"))
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        bootstrap.make_venv()
    assert not (tmp_path / ".venv").exists()
