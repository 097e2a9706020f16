"""Schedules as text: what is written is read again, and nothing else is read; runs of other lengths; by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from rectiflow.accel.cache.policy import RunFacts
from rectiflow.accel.cache.schedule import CacheSchedule, computed_steps, manual_schedule, read_schedule, steps_of_text
from rectiflow.errors import NodeInputError

SIGMAS = tuple(1 - i / 8 for i in range(9))
GOOD = CacheSchedule(SIGMAS, (0, 3, 6), 1, "newton", "step", "last_block", "", "Flux", "rel_l2", 0.25, 0.5)


def test_a_schedule_is_what_its_text_says():
    assert read_schedule(GOOD.json(), "test") == GOOD and GOOD.mask == "10010010"
    fitted = replace(GOOD, reach=(1.0, 0.5, 0.25, 1.0, 0.5, 0.5, 1.0, 1.5))
    assert read_schedule(fitted.json(), "test") == fitted
    bare = json.dumps({"rectiflow_schedule": 1, "mask": "10", "sigmas": [1, 0.5, 0]})
    assert read_schedule(bare, "test") == CacheSchedule((1.0, 0.5, 0.0), (0,))


BAD = {
    "another version": {"rectiflow_schedule": 2}, "a version that is true": {"rectiflow_schedule": True}, "no mask": {"mask": None},
    "a mask of another length": {"mask": "1001"}, "a mask that leaves out the first step": {"mask": "01010101"},
    "a mask of other digits": {"mask": "10020010"}, "a mask as a list": {"mask": [1, 0, 0, 1, 0, 0, 1, 0]},
    "sigmas up and down": {"sigmas": [1, 0.5, 0.7, 0.3, 0.3, 0.2, 0.1, 0.05, 0]}, "sigmas below 0": {"sigmas": [1, -0.5]},
    "no sigmas": {"sigmas": []}, "sigmas in words": {"sigmas": ["1"] * 9}, "huge sigmas": {"sigmas": [10**400] + [0] * 8},
    "too many sigmas": {"sigmas": [0.5] * 5000}, "order 9": {"order": 9}, "order true": {"order": True}, "order 1.5": {"order": 1.5},
    "another basis": {"basis": "fourier"}, "another axis": {"axis": "time"}, "a family of numbers": {"family": 7},
    "a long family": {"family": "x" * 10_000}, "a cost in words": {"cost": "low"}, "a reach of another length": {"reach": [1.0]},
    "a reach that is far": {"reach": [9.0] * 8}, "a reach in words": {"reach": "1"}, "a reach below 0": {"reach": [-1] * 8},
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD.values(), ids=BAD.keys())
def test_parts_that_are_wrong_are_named(wrong):
    with pytest.raises(NodeInputError, match="test: input 'schedule'.*Link the schedule of Schedule Search"):
        read_schedule(json.dumps({**json.loads(GOOD.json()), **wrong}), "test")


NO_SCHEDULES = [
    "", "{", "null", "[]", "12", '"schedule"', "{}", '{"rectiflow_schedule": 1}', "[" * 100_000, '{"a":' * 50_000, "\x00", "NaN",
    GOOD.json().replace("0.25", "NaN"), GOOD.json().replace("0.25", "Infinity"), GOOD.json().replace("0.25", "1e999"), "x" * 1_000_000,
    GOOD.json()[:-1], GOOD.json() + "}", "9" * 100_000, None, 7, b"{}",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_SCHEDULES, ids=range(len(NO_SCHEDULES)))
def test_text_that_is_no_schedule_is_refused(text):
    with pytest.raises(NodeInputError, match="input 'schedule'"):
        read_schedule(text, "test")


def test_damaged_text_is_refused_or_read_as_a_schedule():
    """Bytes changed, cut and doubled at random: a schedule that can be used, or one clear error."""
    draw = random.Random(3)
    for _ in range(1500):
        text = list(GOOD.json())
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(text))
            text[place : place + draw.randint(0, 2)] = draw.choice(["", "}", '"', "9", "-", "e", "\ud800", "[", ",", "null", "1" * 300])
        try:
            found = read_schedule("".join(text), "test")
        except NodeInputError:
            continue
        assert found.computed[0] == 0 and len(found.mask) == found.steps and read_schedule(found.json(), "test") == found


def test_a_run_of_another_length_takes_the_nearest_sigmas():
    assert computed_steps(GOOD, SIGMAS, "test") == {0, 3, 6}
    fine = [1 - i / 16 for i in range(17)]
    assert computed_steps(GOOD, fine, "test") == {0, 6, 12}
    coarse = [1, 0.6, 0.3, 0]
    assert computed_steps(GOOD, coarse, "test") == {0, 1, 2}
    late = [0.5, 0.375, 0.25, 0.125, 0]  # image to image: the steps before are not this run's
    assert computed_steps(GOOD, late, "test") == {2}
    assert computed_steps(GOOD, [], "test") == computed_steps(GOOD, [1.0], "test") == frozenset()


@pytest.mark.parametrize("sigmas", [[14.6, 5, 1, 0], list(reversed(SIGMAS)), [1.01, 0.5, 0], [0, 0.5, 1]], ids=str)
def test_a_run_that_the_schedule_does_not_cover_is_refused(sigmas):
    with pytest.raises(NodeInputError, match="within the schedule's 1 → 0"):
        computed_steps(GOOD, sigmas, "test")
    part = replace(GOOD, sigmas=SIGMAS[:5], computed=(0, 2))
    with pytest.raises(NodeInputError, match="within the schedule's 1 → 0.5"):
        computed_steps(part, SIGMAS, "test")


@pytest.mark.parametrize("text, steps, computed", [
    ("0, 3, 6", 8, (0, 3, 6)), ("3,6", 8, (0, 3, 6)), ("1,1,0,1", 4, (0, 1, 3)), ("1,0,1", 8, None), ("every 4", 10, (0, 4, 8)),
    ("every 6 after 3", 50, (0, 1, 2, 8, 14, 20, 26, 32, 38, 44)), ("every 1", 4, (0, 1, 2, 3)), (" 2 ", 3, (0, 2)), ("0,1", 2, (0, 1)),
    ("every 0", 8, None), ("8", 8, None), ("-1", 8, None), ("", 8, None), ("1;2", 8, None), ("9" * 40, 8, None), ("0,1,1", 3, (0, 1, 2)),
])  # fmt: skip
def test_schedules_by_hand(text, steps, computed):
    if computed is None:
        with pytest.raises(NodeInputError, match="input 'text'"):
            steps_of_text(text, steps, "test")
    else:
        assert steps_of_text(text, steps, "test") == computed


def test_a_schedule_by_hand_serves_any_family_and_needs_a_schedule_of_sigmas():
    made = manual_schedule("every 3", SIGMAS, "test")
    assert (made.family, made.target, made.computed) == ("", "", (0, 3, 6)) and read_schedule(made.json(), "test") == made
    for sigmas in ([1.0], [], [1, 0.2, 0.5], [1, float("nan"), 0], [1] * 3000):
        with pytest.raises(NodeInputError, match="input 'sigmas'"):
            manual_schedule("every 3", sigmas, "test")


def test_a_run_takes_the_reach_of_the_nearest_forecast_step():
    reach = (1.0, 0.5, 0.25, 1.0, 0.6, 0.7, 1.0, 1.5)
    fitted = replace(GOOD, reach=reach)
    own = RunFacts(SIGMAS, "last_block", None, "test")
    assert fitted.reach_for(own) == (0.5, 0.5, 0.25, 0.25, 0.6, 0.7, 0.7, 1.5), "computed steps, which ask for none, have a neighbour's"
    assert GOOD.reach_for(own) == ()
    longer = RunFacts(tuple(1 - i / 16 for i in range(17)), "last_block", None, "test")
    assert len(fitted.reach_for(longer)) == 16 and fitted.reach_for(longer)[4] == 0.25
