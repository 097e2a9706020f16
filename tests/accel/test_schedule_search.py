"""Record a run, search its schedule, replay it: on features with known errors, and on the tiny model through the engine and its nodes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.recording import RecordedRun, Recording, RecordOptions, recorder
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.schedule import CacheSchedule, manual_schedule
from rectiflow.accel.cache.schedule_search import SearchOptions, search_schedule
from rectiflow.accel.cache.scheduled import ScheduledCache
from rectiflow.accel.cache.search import even_steps
from rectiflow.accel.cache.store import Key
from rectiflow.accel.cache.targets import Call
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.accel.cache.visits import CachePlan, Run
from rectiflow.errors import NodeInputError
from rectiflow.metrics.fidelity import relative_errors
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES
from rectiflow.tests.accel.toy_stack import ToyStack

PROMPT = "noto cat on blue"
STEPS = 8
SEARCH = {"compute_ratio": 0.5, "order": 1, "metric": "rel_l2", "weights": "none", "max_skips": 0, "first_steps": 1, "last_steps": 1}


def recording_of(*conditions: torch.Tensor, sigmas=None) -> Recording:
    """A recording of one run from traces (T, rows, tokens, channels)."""
    found = Recording("output", "", "", RecordOptions())
    steps = len(conditions[0])
    run = RecordedRun(tuple(sigmas or (1 - i / steps for i in range(steps + 1))))
    run.traces = {Key(number, number): dict(enumerate(trace)) for number, trace in enumerate(conditions)}
    found.runs.append(run)
    return found


def curve(rate: torch.Tensor) -> torch.Tensor:
    """(T, 1, 1, 64) sines whose phase moves at `rate` (T,)."""
    return torch.sin(rate.cumsum(0)[:, None] + torch.arange(64) * (2 * math.pi / 64))[:, None, None]


@pytest.fixture(scope="module")
def bend():
    rate = torch.full((16,), 0.08)
    rate[6:9] = 0.6
    return recording_of(curve(rate))


@pytest.mark.parametrize("budget, order, computed", [(4, 1, (0, 6, 8, 9)), (6, 1, (0, 1, 6, 7, 8, 9)), (4, 0, (0, 6, 8, 12))])
def test_the_worked_example_through_a_recording(bend, budget, order, computed):
    """Sines of one norm: errors relative to it order plans as absolute ones do."""
    found = search_schedule(bend, SearchOptions(budget, order, metric="rel_l1", last=0), "test")
    assert found.schedule.computed == computed and found.schedule.cost < found.schedule.even_cost
    assert sum(found.errors) == pytest.approx(found.schedule.cost, rel=1e-5)
    assert [found.errors[step] for step in computed] == [0.0] * budget
    assert found.costs[-1] == found.even[-1] == 0.0


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("metric", ["rel_l2", "rel_l1", "cosine"])
def test_bounds_hold_and_costs_are_no_higher_than_even(bend, order, metric):
    free = search_schedule(bend, SearchOptions(7, order, metric=metric, last=0), "test")
    assert free.schedule.cost <= free.schedule.even_cost + 1e-9
    bound = search_schedule(bend, SearchOptions(9, order, metric=metric, longest=2, first=2, last=2), "test").schedule
    assert {0, 1, 14, 15} <= set(bound.computed) and len(bound.computed) == 9
    assert max(b - a for a, b in zip(bound.computed, (*bound.computed[1:], 16))) <= 3


def test_a_parabola_costs_nothing_at_order_two():
    steps = torch.arange(12, dtype=torch.float32)
    trace = (1 + steps + 0.3 * steps**2)[:, None, None, None] * torch.ones(12, 1, 4, 3)
    costs = [search_schedule(recording_of(trace), SearchOptions(4, order, last=0), "test").schedule.cost for order in range(3)]
    assert costs[0] > costs[1] > 0.1 and costs[2] < 1e-4


def test_a_fitted_forecast_costs_no_more_than_repetition_or_a_line(bend):
    """One picture and condition: least squares is the least of this very error, for every number of computed steps."""
    plain = [search_schedule(bend, SearchOptions(4, order), "test").costs for order in (0, 1)]
    fitted = search_schedule(bend, SearchOptions(4, 1, fitted=True), "test")
    assert all(cost <= min(others) + 1e-9 for cost, *others in zip(fitted.costs, *plain))
    assert fitted.schedule.cost < 0.9 * min(costs[3] for costs in plain)
    assert all(0 <= reach <= 2 for reach in fitted.schedule.reach) and len(fitted.schedule.reach) == 16
    assert search_schedule(bend, SearchOptions(4, 0, fitted=True), "test").schedule.reach == ()


def test_a_path_that_slows_down_is_forecast_as_far_as_it_goes():
    """0, 1, then 1.5 for good: half of the line one step on, a quarter two steps on. The engine goes exactly so far."""
    values = torch.tensor([0.0, 1.0, 1.5, 1.5])
    recording = recording_of(values[:, None, None, None].expand(4, 1, 1, 8).contiguous())
    found = search_schedule(recording, SearchOptions(2, 1, first=2, fitted=True), "test").schedule
    assert found.computed == (0, 1) and found.reach == (1.0, 1.0, 0.5, 0.25) and found.cost == pytest.approx(0.0, abs=1e-6)
    stack = ToyStack(lambda s: torch.zeros(1, 1), lambda s: values[s][None, None], 4)
    plan = CachePlan(ScheduledCache.of(found), "last_block", schedule=found)
    run = Run(plan, stack, found.sigmas, torch.device("cpu"))
    for sigma in found.sigmas[:-1]:
        run.handle(Call(torch.zeros(1, 1), sigma, {}, lambda options: None), [Key("prompt", 0)], ())
    assert stack.computed == [0, 1]
    assert {step: float(value) for step, value in stack.used.items()} == pytest.approx({2: 1.5, 3: 1.5})


def test_one_schedule_serves_the_worse_of_two_conditions():
    """One condition bends early, the other late; the error of a step is that of the worse one."""
    early, late = torch.full((12,), 0.05), torch.full((12,), 0.05)
    early[2:4] = late[8:10] = 0.7
    options = SearchOptions(5, 0, last=0)
    alone = [search_schedule(recording_of(curve(rate)), options, "test").schedule for rate in (early, late)]
    both = search_schedule(recording_of(curve(early), curve(late)), options, "test").schedule
    assert both.cost > max(schedule.cost for schedule in alone)
    assert any(step in (2, 3) for step in both.computed) and any(step in (8, 9) for step in both.computed)


def test_weights_by_the_length_of_steps_move_the_steps():
    sigmas = [1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.6, 0.4, 0.2, 0.0]
    trace = curve(torch.full((9,), 0.3))
    plain, weighted = (
        search_schedule(recording_of(trace, sigmas=sigmas), SearchOptions(4, 0, weights=weights, last=0), "test").schedule
        for weights in ("none", "dsigma")
    )
    assert sum(step >= 5 for step in weighted.computed) > sum(step >= 5 for step in plain.computed)


def recorded(tiny, prompts, seeds, target="last_block", steps=STEPS, options=None, **kind):
    policy = recorder(tiny.model, target, "", options or RecordOptions())
    model = attach(tiny.model, CachePlan(policy, target), CacheLog(), "test")
    return policy.recording, tiny.sample(prompts, tiny.noise(seeds), steps=steps, model=model, **kind)


@pytest.mark.parametrize("target", ["last_block", "output", "block_delta"])
def test_recording_changes_no_picture_and_keeps_what_it_says(tiny, target):
    recording, latent = recorded(tiny, [PROMPT, "noto fox on green"], [1, 2], target, options=RecordOptions(tokens=16))
    assert torch.equal(latent, tiny.sample([PROMPT, "noto fox on green"], tiny.noise([1, 2]), steps=STEPS))
    (run,) = recording.whole_runs("test")
    channels = {"output": 16}.get(target, tiny.model.model.diffusion_model.hidden_size)
    assert [tuple(trace.shape) for trace in run.complete().values()] == [(STEPS, 2, 16, channels)] * 2
    numbers = 2 * STEPS * 2 * 16 * channels  # conditions, steps, rows, tokens, channels
    guided = STEPS * 2 * 16 * 16  # the guided velocity at each step
    assert recording.nbytes == 4 * (numbers + guided)


def test_only_whole_runs_count_and_only_so_many_are_kept(tiny):
    recording, _ = recorded(tiny, PROMPT, [1], options=RecordOptions(tokens=16, runs=2))
    with pytest.raises(NodeInputError, match="a recording without runs"):
        Recording("output", "", "", RecordOptions()).whole_runs("test")
    for _ in range(3):
        recording.open([1.0, 0.5, 0.0])
    with pytest.raises(NodeInputError, match="2 runs, none of them whole"):
        recording.whole_runs("test")


def test_heun_and_inner_evaluations_are_recorded_once_a_step(tiny):
    recording, _ = recorded(tiny, PROMPT, [1], sampler="heun", steps=5)
    (run,) = recording.whole_runs("test")
    assert all(len(trace) == 5 for trace in run.complete().values())


def test_every_step_computed_is_bit_identical_and_costs_nothing(tiny):
    recording, plain = recorded(tiny, PROMPT, [1])
    found = search_schedule(recording, SearchOptions(STEPS), "test").schedule
    assert found.computed == tuple(range(STEPS)) and found.cost == 0.0
    log = CacheLog()
    model = attach(tiny.model, CachePlan(ScheduledCache.of(found), schedule=found), log, "test")
    assert torch.equal(tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model), plain) and log.last.peak_bytes == 0


def replay(tiny, schedule, prompts, seeds, target="last_block", **kind):
    log = CacheLog()
    model = attach(tiny.model, CachePlan(ScheduledCache.of(schedule), target, schedule=schedule), log, "test")
    return tiny.sample(prompts, tiny.noise(seeds), model=model, **kind), log.last


def test_searched_schedules_beat_even_steps_on_other_prompts(tiny):
    """Found on two prompts, used on three others: mean error of the final latent at equal calls.

    At half of the steps. Below it order 1 is no better than even steps on these weights: docs/schedule_search.md.
    """
    steps, budget = 12, 6
    recording, _ = recorded(tiny, ["noto watermelon on blue", "twemoji rocket on black"], [11, 12], steps=steps)
    prompts = ["noto cat on blue", "noto fox on green", "twemoji apple on blue"]
    plain = tiny.sample(prompts, tiny.noise(range(3)), steps=steps)
    for order in (0, 1):
        found = search_schedule(recording, SearchOptions(budget, order), "test").schedule
        errors = []
        for schedule in (found, CacheSchedule(found.sigmas, even_steps(steps, budget), order)):
            latent, record = replay(tiny, schedule, prompts, range(3), steps=steps)
            assert record.calls_made == budget
            errors.append(float(relative_errors(latent, plain).mean()))
        assert errors[0] < errors[1]


def test_runs_of_another_length_and_other_solvers_follow_the_schedule(tiny):
    schedule = manual_schedule("0,3,6,9", torch.linspace(1, 0, 13).tolist(), "test")
    _, record = replay(tiny, schedule, PROMPT, [1], sigmas=torch.linspace(1, 0, 13))
    assert [visit.decision == "full" for visit in record.visits] == [step % 3 == 0 for step in range(12)] and not record.notes
    _, record = replay(tiny, schedule, PROMPT, [1], sigmas=torch.linspace(1, 0, 25))
    assert [visit.index for visit in record.visits if visit.decision == "full"] == [0, 6, 12, 18]
    assert "made for 12 steps on other sigmas; this run has 24" in record.text()
    _, record = replay(tiny, schedule, PROMPT, [1], sigmas=torch.linspace(1, 0, 13), sampler="heun")
    assert record.finished and all(visit.decision == "full" for visit in record.visits if visit.u in (0, 3, 6, 9))
    _, record = replay(tiny, schedule, PROMPT, [1], sigmas=torch.linspace(0.5, 0, 7))  # the second half alone
    assert [visit.index for visit in record.visits if visit.decision == "full"] == [0, 3]


def test_other_caches_take_a_schedule_in_place_of_their_interval(tiny):
    schedule = manual_schedule("0,1,5", torch.linspace(1, 0, 9).tolist(), "test")
    log = CacheLog()
    plan = CachePlan(TaylorSeer(order=1, interval=6), "last_block", Limits(0, 1), schedule=schedule)
    tiny.sample(PROMPT, tiny.noise([1]), sigmas=torch.linspace(1, 0, 9), model=attach(tiny.model, plan, log, "test"))
    assert [visit.index for visit in log.last.visits if visit.decision == "full"] == [0, 1, 5, 7]


SIGMAS = torch.linspace(1, 0, 9)


def test_the_taylor_node_takes_a_schedule_as_text_even_at_interval_one(tiny):
    schedule = manual_schedule("0,1,5", SIGMAS.tolist(), "test").json()
    settings = {"warmup_steps": 0, "tail_steps": 1, "start_percent": 0.0, "end_percent": 1.0, "order": 1, "basis": "newton", "axis": "step"}
    node = NODES["RectiflowTaylorForecastCache"]()
    model, log = node.execute(model=tiny.model, interval=1, granularity="last_block", schedule=schedule, **settings)
    tiny.sample(PROMPT, tiny.noise([1]), sigmas=SIGMAS, model=model)
    assert [visit.index for visit in log.last.visits if visit.decision == "full"] == [0, 1, 5, 7]
    with pytest.raises(NodeInputError, match="Taylor Forecast Cache: input 'schedule' got 'every 4'"):
        node.execute(model=tiny.model, interval=1, granularity="last_block", schedule="every 4", **settings)


def test_the_delta_node_leaves_its_ranges_out_by_a_schedule(tiny):
    """Five late steps of eight: the range changes behind step 2, and the schedule alone says which steps are whole."""
    from rectiflow.tests.accel.test_delta_dit import SETTINGS

    schedule = manual_schedule("0,4", SIGMAS.tolist(), "test").json()
    given = {**SETTINGS, "boundary_steps": 5, "warmup_steps": 1, "schedule": schedule}
    model, log = NODES["RectiflowDeltaBlockCache"]().execute(model=tiny.model, **given)
    latent = tiny.sample(PROMPT, tiny.noise([1]), sigmas=SIGMAS, model=model)
    assert [visit.index for visit in log.last.visits if visit.decision == "full"] == [0, 4] and torch.isfinite(latent).all()


def test_a_schedule_of_another_family_or_range_is_refused_when_sampling(tiny):
    sigmas = torch.linspace(1, 0, 9)
    alien = CacheSchedule(tuple(sigmas.tolist()), (0, 4), family="Wan")
    with pytest.raises(NodeInputError, match="a schedule for Wan.*one for Flux"):
        replay(tiny, alien, PROMPT, [1], sigmas=sigmas)
    part = CacheSchedule(tuple((sigmas / 2).tolist()), (0, 4))
    with pytest.raises(NodeInputError, match="within the schedule's 0.5 → 0"):
        replay(tiny, part, PROMPT, [1], sigmas=sigmas)
    with pytest.raises(NodeInputError, match="within the schedule's 1 → 0"):
        replay(tiny, CacheSchedule(tuple(sigmas.tolist()), (0, 4)), PROMPT, [1], sigmas=sigmas.flip(0))
    assert torch.isfinite(tiny.sample(PROMPT, tiny.noise([1]), sigmas=sigmas)).all()  # nothing of it is left on the model


def test_the_nodes_record_search_and_replay(tiny):
    model, recording = NODES["RectiflowScheduleRecord"]().execute(model=tiny.model, granularity="last_block", tokens=64, max_runs=4)
    search = NODES["RectiflowScheduleSearch"]()
    with pytest.raises(NodeInputError, match="Schedule Search: input 'recording' got 'a recording without runs'"):
        search.execute(recording=recording, after=None, budget=0, **SEARCH)
    for seed in (1, 2):
        tiny.sample(PROMPT, tiny.noise([seed]), steps=STEPS, model=model)
    schedule, text, steps, costs = search.execute(recording=recording, after=None, budget=0, **SEARCH)
    assert "4 of 8 steps computed: 0, " in text and "from 2 pictures" in text and "Flux" in text
    assert json.loads(schedule)["mask"].count("1") == 4 and len(schedule) < 2000
    assert steps.shape == costs.shape == (1, 480, 880, 3) and 0 <= float(steps.min()) < float(steps.max()) <= 1
    cached, log = NODES["RectiflowScheduleCache"]().execute(model=tiny.model, schedule=schedule, granularity="as recorded", order=-1)
    tiny.sample("noto fox on green", tiny.noise([3]), steps=STEPS, model=cached)
    assert log.last.calls_made == 4 and log.last.target == "last_block"
    assert "schedule 4 of 8 steps, Flux, forecast of order 1" in log.last.text()
    cached, log = NODES["RectiflowScheduleCache"]().execute(model=tiny.model, schedule=schedule, granularity="output", order=0)
    tiny.sample(PROMPT, tiny.noise([3]), steps=STEPS, model=cached)
    assert log.last.target == "output" and log.last.order == 0 and log.last.calls_made == 4
    (by_hand,) = NODES["RectiflowManualSchedule"]().execute(sigmas=torch.linspace(1, 0, 9), text="every 3")
    cached, log = NODES["RectiflowScheduleCache"]().execute(model=tiny.model, schedule=by_hand, granularity="as recorded", order=-1)
    tiny.sample(PROMPT, tiny.noise([3]), sigmas=torch.linspace(1, 0, 9), model=cached)
    assert log.last.calls_made == 3


@pytest.mark.parametrize("inputs, says", [
    ({"budget": 13}, "input 'budget' got 13"), ({"budget": 1}, "input 'budget' got 1;"), ({"metric": "words"}, "metric"),
    ({"budget": 3, "max_skips": 1}, "Raise budget or max_skips"), ({"compute_ratio": math.nan}, "compute_ratio"),
    ({"first_steps": 9, "last_steps": 9}, "input 'first_steps' got '9 first and 9 last of 12 steps'"),
])  # fmt: skip
def test_searches_that_cannot_be_are_named(inputs, says):
    recording = recording_of(curve(torch.full((12,), 0.1)))
    with pytest.raises(NodeInputError, match=says):
        NODES["RectiflowScheduleSearch"]().execute(**{"recording": recording, "after": None, "budget": 6, **SEARCH, **inputs})


def test_a_text_that_is_no_schedule_is_refused_by_the_node(tiny):
    with pytest.raises(NodeInputError, match="Schedule Cache: input 'schedule' got 'a_schedule.json'"):
        NODES["RectiflowScheduleCache"]().execute(model=tiny.model, schedule="a_schedule.json", granularity="as recorded", order=-1)


def test_errors_by_cosine_are_symmetric_and_zero_on_the_diagonal():
    from rectiflow.accel.cache.schedule_search import error_of

    trace = torch.randn(8, 5, 7, generator=torch.Generator().manual_seed(1))
    table = torch.stack([error_of(trace[i].expand_as(trace), trace, "cosine") for i in range(8)])
    assert torch.allclose(table, table.T, atol=1e-6) and float(table.diagonal().abs().max()) < 1e-6
