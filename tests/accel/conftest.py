"""The tiny model, loaded once, the shortest way to put a cache on it, and a host that takes conditions apart."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.store import StoreOptions
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host.embedded import HostSettings, make_host, sampling_function, use_host
from rectiflow.tests.contract.tiny_runs import TinyRuns


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyRuns:
    made = make_host(tmp_path_factory.mktemp("accel"), settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(made):
        return TinyRuns(made)


@pytest.fixture(scope="session")
def precise(tiny) -> TinyRuns:
    """The tiny model computed in float64: rows of another batch size add up in another order, and here that stays below 1e-12.

    The host hands latents over in float32, so what differs after a run is a difference of the method and not of rounding.
    """
    with use_host(tiny.host):
        runs = TinyRuns(tiny.host)
    network = runs.model.get_model_object("diffusion_model").double()
    network.dtype = torch.float64
    return runs


@pytest.fixture
def cached(tiny):
    """cached(target=…, interval=…, order=…): (MODEL, CacheLog), TaylorSeer with a warm-up of two steps."""

    def make(target="last_block", interval=2, order=1, model=None, cap=0, blocks="", **limits):
        log = CacheLog()
        limits = Limits(**{"warmup_steps": 2, "tail_steps": 1, **limits})
        plan = CachePlan(TaylorSeer(order=order, interval=interval), target, limits, StoreOptions(cap=cap), blocks)
        return attach(model or tiny.model, plan, log, "test"), log

    return make


@pytest.fixture
def split(monkeypatch):
    """Conditions take a call each, as when memory is short; split([True, False, …]) says when."""

    def install(pattern):
        joined, turns = sampling_function._choose_batch, iter(pattern)
        monkeypatch.setattr(sampling_function, "_choose_batch", lambda *a: joined(*a)[:1] if next(turns, True) else joined(*a))

    return install
