"""The two hosts that the contract is held on."""

from __future__ import annotations

import pytest
from rectiflow.host.embedded import Host, HostSettings, make_host, use_host
from rectiflow.tests.conftest import comfyui_path
from rectiflow.tests.contract.comfyui_server import ComfyUIServer
from rectiflow.tests.contract.tiny_runs import TinyRuns


@pytest.fixture(scope="session")
def embedded(tmp_path_factory) -> Host:
    """An embedded host on the CPU in fp32, with folders of its own."""
    return make_host(tmp_path_factory.mktemp("embedded"), settings=HostSettings(device="cpu", dtype="fp32"))


@pytest.fixture(scope="session")
def tiny(embedded) -> TinyRuns:
    with use_host(embedded):
        return TinyRuns(embedded)


@pytest.fixture(scope="session")
def comfyui_server(tmp_path_factory):
    """A real ComfyUI that serves; only for tests marked `comfyui`."""
    import os
    import sys

    checkout = comfyui_path()
    if checkout is None:
        pytest.skip("COMFYUI_PATH does not name a ComfyUI checkout")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    with ComfyUIServer(checkout, python, tmp_path_factory.mktemp("comfyui")) as server:
        yield server
