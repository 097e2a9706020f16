"""The tiny model on the embedded host, for tests of the trainer on a MODEL."""

from __future__ import annotations

import pytest
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.tests.contract.conftest import comfyui_server, embedded  # noqa: F401  (fixtures)
from rectiflow.tests.contract.tiny_runs import TinyRuns


@pytest.fixture
def tiny(tmp_path):
    host = make_host(tmp_path, settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(host):
        yield TinyRuns(host)
