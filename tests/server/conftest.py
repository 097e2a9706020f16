"""One server for all tests that do not need their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from process import ServerProcess  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server with the testing pack; tests leave its queue empty."""
    with ServerProcess(tmp_path_factory.mktemp("server")) as running:
        yield running
