"""One server for all tests that do not need their own."""

from __future__ import annotations

import pytest
from rectiflow.tests.server.process import ServerProcess


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server with the testing pack; tests leave its queue empty."""
    with ServerProcess(tmp_path_factory.mktemp("server")) as running:
        yield running
