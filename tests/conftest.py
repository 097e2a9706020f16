"""What every test may use: an embedded host in a folder of its own, and the switch that runs a test inside real ComfyUI."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The models of the tests are so small that waking a thread costs more than it computes; several test runs also share one machine.
for variable, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0")):
    os.environ.setdefault(variable, value)

# `python -m pytest` puts the root on the path, where its folders would answer to names such as `nodes`; tests import `rectiflow.…`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


class _RootIsNoTestPackage:
    """Collect the root as a plain folder: pytest would import its `__init__.py` a second time, under the folder's name."""

    @pytest.hookimpl
    def pytest_collect_directory(self, path: Path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_addoption(parser):
    parser.addoption(
        "--host", choices=("embedded", "comfyui"), default="embedded",
        help="comfyui: run only the tests that need a real ComfyUI, and fail where COMFYUI_PATH names none",
    )
    parser.addoption("--update-snapshot", action="store_true", help="see tests/test_snapshot.py")


def comfyui_path() -> Path | None:
    """The ComfyUI checkout that COMFYUI_PATH names, or None."""
    named = os.environ.get("COMFYUI_PATH", "")
    return Path(named) if named and (Path(named) / "comfy" / "model_patcher.py").is_file() else None


def _on_comfyui(item) -> bool:
    return item.get_closest_marker("comfyui") is not None


def pytest_configure(config):
    config.pluginmanager.register(_RootIsNoTestPackage())
    if config.getoption("--host") == "comfyui" and comfyui_path() is None:
        given = os.environ.get("COMFYUI_PATH")
        found = f"{given} holds no comfy/model_patcher.py" if given else "it is not set"
        raise pytest.UsageError(f"--host comfyui needs COMFYUI_PATH to name a ComfyUI checkout; {found}.")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--host") == "comfyui":
        others = [item for item in items if not _on_comfyui(item)]
        items[:] = [item for item in items if _on_comfyui(item)]
        config.hook.pytest_deselected(items=others)
    elif comfyui_path() is None:
        skip = pytest.mark.skip(reason="COMFYUI_PATH does not name a ComfyUI checkout")
        for item in items:
            if _on_comfyui(item):
                item.add_marker(skip)


@pytest.fixture
def comfyui_python() -> str:
    """The Python that has ComfyUI's requirements: COMFYUI_PYTHON, or the one that runs the tests."""
    return os.environ.get("COMFYUI_PYTHON", sys.executable)


@pytest.fixture
def comfyui() -> Path:
    """Root of the real ComfyUI checkout; only for tests marked `comfyui`."""
    path = comfyui_path()
    if path is None:
        pytest.skip("COMFYUI_PATH does not name a ComfyUI checkout")
    return path


@pytest.fixture
def host(tmp_path):
    """An embedded host on the CPU whose folders are the test's own; it is the current one during the test."""
    from rectiflow.host.embedded import HostSettings, make_host, use_host

    made = make_host(tmp_path, settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(made):
        yield made
