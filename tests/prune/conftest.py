"""The tiny model, loaded once, and what it is shown."""

from __future__ import annotations

import pytest
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.tests.contract.tiny_runs import TinyRuns
from rectiflow.train.pool import Calibration


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    made = make_host(tmp_path_factory.mktemp("prune"), settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(made):
        yield TinyRuns(made)


@pytest.fixture(scope="session")
def shown(tiny) -> Calibration:
    prompts = [entry for text in ("twemoji rocket on black", "noto cat on white") for entry in tiny.conditioning(text)]
    return Calibration(prompts, tiny.conditioning(""), (16, 8, 8), count=2, steps=4)
