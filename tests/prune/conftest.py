"""The tiny model, loaded once, and what it is shown."""

from __future__ import annotations

import dataclasses

import pytest
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.nodes.pruning import host_services
from rectiflow.tests.contract.tiny_runs import TinyRuns
from rectiflow.train.pool import Calibration


def interrupted_at(*numbers: int):
    """(Services of the host whose interrupt raises at its calls of these numbers, a list as long as it was called)."""
    calls: list[int] = []

    def interrupt():
        calls.append(1)
        if len(calls) in numbers:
            raise KeyboardInterrupt

    return dataclasses.replace(host_services(), interrupt=interrupt), calls


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    made = make_host(tmp_path_factory.mktemp("prune"), settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(made):
        yield TinyRuns(made)


@pytest.fixture(scope="session")
def shown(tiny) -> Calibration:
    prompts = [entry for text in ("twemoji rocket on black", "noto cat on white") for entry in tiny.conditioning(text)]
    return Calibration(prompts, tiny.conditioning(""), (16, 8, 8), count=2, steps=4)
