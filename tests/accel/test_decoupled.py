"""Sharing the condition of a decoupled model, as in DDT, through the cache engine; refused by name where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.recording import RecordOptions, recorder
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.schedule import CacheSchedule
from rectiflow.accel.cache.schedule_search import SearchOptions, search_schedule
from rectiflow.accel.cache.scheduled import ScheduledCache
from rectiflow.accel.cache.search import even_steps
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.errors import NodeInputError
from rectiflow.metrics.fidelity import relative_errors
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES
from rectiflow.tests.accel.decoupled_toy import decoupled_model
from rectiflow.tests.accel.region_toys import noise, sample, toy

STEPS = 20


@pytest.fixture(scope="module")
def made():
    return decoupled_model()


def cached(model, policy, schedule=None):
    log = CacheLog()
    return attach(model, CachePlan(policy, "condition", Limits(), schedule=schedule), log, "test"), log


def recorded(model, seed=50, batch=4):
    policy = recorder(model, "condition", "", RecordOptions())
    sample(cached(model, policy)[0], noise(batch, seed=seed), steps=STEPS)
    return policy.recording


@pytest.mark.parametrize("rate", [1, 2, 3, 5, 7])
def test_the_encoder_runs_once_in_every_rate_of_steps(made, rate):
    model, network = made
    shared, log = cached(model, IntervalReuse(interval=rate))
    network.encoder_runs = 0
    latent = sample(shared, noise(), steps=STEPS)
    assert network.encoder_runs == math.ceil(STEPS / rate) == log.last.full_visits
    plain = sample(model, noise(), steps=STEPS)
    assert torch.equal(latent, plain) is (rate == 1) and torch.isfinite(latent).all()
    assert (log.last.peak_bytes == 0) is (rate == 1)


def test_its_own_condition_put_back_is_bit_identical(made):
    """One x and sigma over and over: the shared condition is the one that would be computed, so the decoder answers the same."""
    model, _ = made
    still = torch.tensor([0.7] * 5)
    shared, log = cached(model, IntervalReuse(interval=4))
    assert torch.equal(sample(shared, noise(), sigmas=still), sample(model, noise(), sigmas=still))
    assert log.last.hit_ratio == 0.75


def test_conditions_are_kept_by_stream_when_guidance_is_joined_or_split(made, monkeypatch):
    from rectiflow.host.embedded import sampling_function

    model, _ = made
    shared, _ = cached(model, IntervalReuse(interval=3))
    joined = sample(shared, noise(2), steps=STEPS)
    choose = sampling_function._choose_batch
    monkeypatch.setattr(sampling_function, "_choose_batch", lambda *given: choose(*given)[:1])
    torch.testing.assert_close(sample(shared, noise(2), steps=STEPS), joined, atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [5, 7, 10])
def test_the_searched_schedule_beats_even_steps_on_eight_other_seeds(made, budget):
    """Metric cosine and order 0, the choice of DDT: mean error of the final latent at equal runs of the encoder."""
    model, network = made
    found = search_schedule(recorded(model), SearchOptions(budget, 0, metric="cosine"), "test").schedule
    start = noise(8, seed=200)
    plain, errors = sample(model, start, steps=STEPS), []
    for schedule in (found, CacheSchedule(found.sigmas, even_steps(STEPS, budget))):
        shared, _ = cached(model, ScheduledCache.of(schedule), schedule)
        network.encoder_runs = 0
        latent = sample(shared, start, steps=STEPS)
        assert network.encoder_runs == budget
        errors.append(float(relative_errors(latent, plain).mean()))
    assert found.family == "Decoupled" and found.target == "condition" and found.cost <= found.even_cost
    assert errors[0] < errors[1]


def test_nodes_record_search_and_share_the_condition(made):
    model, network = made
    recording_model, recording = NODES["RectiflowScheduleRecord"]().execute(model=model, granularity="condition", tokens=64, max_runs=1)
    sample(recording_model, noise(seed=9), steps=8)
    schedule, text, _, _ = NODES["RectiflowScheduleSearch"]().execute(
        recording=recording, after=None, budget=3, compute_ratio=0.5, order=0, metric="cosine", weights="none", max_skips=0,
        first_steps=1, last_steps=0,
    )  # fmt: skip
    assert "Decoupled" in text
    shared, log = NODES["RectiflowScheduleCache"]().execute(model=model, schedule=schedule, granularity="as recorded", order=-1)
    network.encoder_runs = 0
    sample(shared, noise(), steps=8)
    assert network.encoder_runs == 3 and log.last.target == "condition"
    with pytest.raises(NodeInputError, match="a schedule for Decoupled.*one for Flux"):
        flux, _ = NODES["RectiflowScheduleCache"]().execute(model=toy("flux"), schedule=schedule, granularity="last_block", order=-1)
        sample(flux, noise(), steps=8)


@pytest.mark.parametrize("family", ["flux", "sd3", "lumina2"])
def test_families_without_an_encoder_are_refused_and_shown_other_targets(family):
    with pytest.raises(NodeInputError, match="condition, with a model of .*block_delta over the front blocks, last_block or output"):
        cached(toy(family), IntervalReuse())


@pytest.mark.parametrize("target", ["last_block", "block_delta", "modules"])
def test_a_decoupled_model_without_block_patches_is_refused_other_targets(made, target):
    with pytest.raises(NodeInputError, match="input 'granularity'.*(Set granularity to output|else to output)"):
        attach(made[0], CachePlan(IntervalReuse(), target), CacheLog(), "test")
