"""The host that runs of this folder's tests take place in."""

from __future__ import annotations

import pytest
from rectiflow.host.embedded.context import use_host
from rectiflow.tests.host.toy import make_host


@pytest.fixture
def host():
    """A host on the CPU with room for everything, so that conditions are joined unless a test takes the room away."""
    host = make_host()
    host.memory.reported_free = 10**15
    with use_host(host):
        yield host
