"""One slider: presets and what they may hold, schedules stretched over other runs, what is chosen for which model, and what it says."""

from __future__ import annotations

import json
import random

import pytest
import torch
from rectiflow.accel.cache.accelerate import companions
from rectiflow.accel.cache.policy import RunFacts
from rectiflow.accel.cache.preset import FOLDER, preset_for, read_preset, shipped_presets
from rectiflow.accel.cache.spread import SpreadSchedule, budget_of, spread
from rectiflow.errors import NodeInputError
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES

PROMPT = "noto cat on blue"


def accelerate(**inputs):
    return NODES["RectiflowAccelerate"]().execute(**inputs)


def computed(log) -> list[int]:
    return [visit.index for visit in log.last.visits if visit.decision == "full"]


def test_a_schedule_spread_over_its_own_run_is_itself():
    for shares in ((0, 1, 2, 5, 9, 13), (0, 7), tuple(range(14))):
        assert spread([step / 14 for step in shares], 14, len(shares)) == shares


def test_spreading_gives_the_number_asked_rising_from_0():
    draw = random.Random(0)
    for _ in range(300):
        made_for = draw.randint(2, 60)
        shares = [0.0, *(step / made_for for step in sorted(draw.sample(range(1, made_for), draw.randint(0, made_for - 1))))]
        steps = draw.randint(1, 80)
        budget = draw.randint(1, steps)
        found = spread(shares, steps, budget)
        assert len(found) == budget and found[0] == 0 and found[-1] < steps
        assert all(a < b for a, b in zip(found, found[1:]))


def test_spreading_keeps_where_steps_are_dense():
    """Three quarters of the computed steps lie in the first half, in any run."""
    shares = [0, 1 / 12, 2 / 12, 3 / 12, 4 / 12, 5 / 12, 6 / 12, 9 / 12]
    for steps, budget in ((24, 16), (48, 16), (96, 24)):
        early = sum(step < steps / 2 for step in spread(shares, steps, budget))
        assert early == budget * 3 // 4


def test_the_budget_is_the_run_over_the_speed():
    assert [budget_of(speed, 28) for speed in (1.0, 1.5, 2.0, 4.0, 400.0)] == [28, 19, 14, 7, 1]
    assert budget_of(2.0, 5) == 3 and budget_of(1.0, 1) == 1


def test_rising_sigmas_take_even_steps_and_say_so():
    schedule = SpreadSchedule((0.0, 0.1, 0.2), 2.0, 10)
    rising = RunFacts(tuple(i / 8 for i in range(9)), "output", None, "test")
    assert schedule.steps_for(rising) == frozenset((0, 2, 4, 6)) and "rise" in schedule.note(rising)
    falling = RunFacts(rising.sigmas[::-1], "output", None, "test")
    assert len(schedule.steps_for(falling)) == 4 and "10 steps" in schedule.note(falling)
    assert SpreadSchedule((0.0,), 2.0, 8).note(falling) == ""


def test_a_fitted_reach_is_spread_with_its_steps():
    schedule = SpreadSchedule((0.0, 0.25), 2.0, 4, (1.0, 1.0, 0.5, 0.25))
    falling = tuple(1 - i / 8 for i in range(9))
    assert schedule.reach_for(RunFacts(falling[::2], "output", None, "test"))[2:] == (0.5, 0.25)
    assert schedule.reach_for(RunFacts(falling, "output", None, "test"))[4:] == (0.5, 0.5, 0.25, 0.25)
    assert schedule.reach_for(RunFacts(falling[::-1], "output", None, "test")) == ()
    assert SpreadSchedule((0.0, 0.25), 2.0, 4).reach_for(RunFacts(falling, "output", None, "test")) == ()


def test_presets_ship_for_flux_and_for_all_others():
    presets = shipped_presets()
    assert {"", "Flux"} <= presets.keys() and not presets[""].measured_on and presets["Flux"].measured_on
    assert preset_for("Wan") is not None and preset_for("Wan").family == ""
    for target in ("last_block", "output"):
        ratios = [point.ratio for point in presets["Flux"].points if point.target == target]
        assert ratios == sorted(ratios) and ratios[0] < 1.5 and ratios[-1] == 4.0
        decibels = [presets["Flux"].best(speed, (target,)).psnr for speed in (1.4, 2.0, 4.0)]
        assert decibels[0] > decibels[1] > decibels[2], "the slider goes from quality to speed"
    for speed in (1.1, 1.5, 2.0, 4.0):
        assert presets[""].best(speed, ("output",)).ratio <= max(speed, 1.4), "never faster than asked where nothing was measured"


GOOD = {
    "rectiflow_preset": 1, "family": "X", "measured_on": "m", "steps": 4, "points": [
        {
            "ratio": 2.0, "psnr": 30.0, "psnr_worst": 20.0, "policy": "schedule", "target": "output", "settings": {"order": 1},
            "shares": [0, 0.5],
        },
    ],
}  # fmt: skip
WRONG = [
    ({"rectiflow_preset": 2}, "rectiflow_preset"), ({"family": 3}, "family"), ({"points": []}, "no points"), ({"steps": 0}, "steps"),
    ({"measured_on": None}, "measured_on"),
]  # fmt: skip
WRONG_POINTS = [
    ({"policy": "magic"}, "policy"), ({"target": "input"}, "target"), ({"ratio": 0.5}, "ratio"), ({"ratio": True}, "ratio"),
    ({"psnr": "high"}, "psnr"), ({"settings": {}}, "settings"), ({"settings": {"order": 9}}, "order"), ({"shares": []}, "shares"),
    ({"shares": [0, 0.5, 0.5]}, "shares"), ({"shares": [0.1, 0.5]}, "shares"), ({"shares": [0, 1.0]}, "shares"),
    ({"reach": [0.5]}, "reach"), ({"reach": [5.0] * 4}, "reach"),
]  # fmt: skip


def test_a_good_preset_is_read():
    assert read_preset(json.dumps(GOOD), "good").points[0].shares == (0, 0.5)
    assert {path.name for path in FOLDER.glob("*.json")} >= {"any.json", "flux.json"}


@pytest.mark.parametrize("changed, says", WRONG)
def test_a_preset_that_is_none_is_refused(changed, says):
    with pytest.raises(ValueError, match=f"bad.json.*{says}"):
        read_preset(json.dumps({**GOOD, **changed}), "bad.json")


@pytest.mark.parametrize("changed, says", WRONG_POINTS)
def test_a_point_that_is_none_is_refused(changed, says):
    with pytest.raises(ValueError, match=f"bad.json, point 0.*{says}"):
        read_preset(json.dumps({**GOOD, "points": [{**GOOD["points"][0], **changed}]}), "bad.json")


def test_speed_1_is_bit_identical_and_more_computes_as_many_steps_as_it_says(tiny):
    noise = tiny.noise([1])
    plain = tiny.sample(PROMPT, noise, steps=16)
    errors = []
    for speed, steps in ((1.0, 16), (1.6, 10), (2.0, 8), (4.0, 4)):
        model, log, text = accelerate(model=tiny.model, speed=speed)
        drawn = tiny.sample(PROMPT, noise, steps=16, model=model)
        assert len(computed(log)) == steps and f"speed {speed:g}" in text
        errors.append(float((drawn - plain).norm() / plain.norm()))
    assert errors[0] == 0.0 and "off" in accelerate(model=tiny.model, speed=1.0)[2]
    assert 0 < min(errors[1:3]) and max(errors[1:3]) < errors[3] < 0.6


def test_it_says_what_was_measured_and_on_what(tiny):
    _, _, text = accelerate(model=tiny.model, speed=2.0)
    assert "Rectiflow Tiny" in text and "dB" in text and "granularity" in text


def test_a_model_without_block_patches_gets_the_cautious_output_forecast(tiny, monkeypatch):
    monkeypatch.setattr("rectiflow.accel.cache.accelerate.arch_spec", lambda network: None)
    model, log, text = accelerate(model=tiny.model, speed=3.0)
    tiny.sample(PROMPT, tiny.noise([1]), steps=28, model=model)
    assert log.last.target == "output" and "not measured" in text and "3× was asked" in text
    assert 28 / len(computed(log)) == pytest.approx(2.2, abs=0.2)


def test_what_else_is_on_the_model_is_told_and_kept(tiny):
    node = NODES["RectiflowRegionAdaptiveSampling"]
    defaults = {declared.name: declared.options.get("default") for declared in node.INPUTS if "default" in declared.options}
    region = node().execute(model=tiny.model, **defaults)[0]
    _, _, text = accelerate(model=region, speed=2.0)
    assert "granularity output" in text and "region-adaptive sampling" in text.splitlines()[-1]
    calls = []
    watched = tiny.model.clone()
    watched.add_wrapper_with_key("apply_model", "someone_elses", lambda executor, *a, **k: calls.append(1) or executor(*a, **k))
    watched.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)
    model, log, text = accelerate(model=watched, speed=2.0)
    assert "someone_elses" in text and "patches of 1 block" in text and companions(tiny.model) == companions(tiny.model.clone())
    tiny.sample(PROMPT, tiny.noise([1]), steps=8, model=model)
    assert len(calls) >= len(computed(log)) == 4, "the other wrapper still runs, at least in every computed step"


def test_a_recording_of_ones_own_model_takes_the_place_of_the_preset(tiny):
    noise = tiny.noise([1])
    recorded, recording = NODES["RectiflowScheduleRecord"]().execute(model=tiny.model, granularity="output", tokens=64, max_runs=8)
    plain = tiny.sample(PROMPT, noise, steps=12, model=recorded)
    model, log, text = accelerate(model=tiny.model, speed=2.0, recording=recording, after={"samples": plain})
    near = tiny.sample(PROMPT, noise, steps=12, model=model)
    assert log.last.target == "output" and len(computed(log)) == 6 and "recorded" in text
    assert float((near - plain).norm() / plain.norm()) < 0.3
    schedule = NODES["RectiflowManualSchedule"]().execute(sigmas=torch.linspace(1, 0, 13), text="every 3 after 2")[0]
    model, log, text = accelerate(model=tiny.model, speed=2.0, schedule=schedule)
    tiny.sample(PROMPT, noise, steps=12, model=model, sigmas=torch.linspace(1, 0, 13))
    assert len(computed(log)) == schedule.split('"mask": "')[1].split('"')[0].count("1") and "not asked" in text


def test_what_cannot_be_is_refused_by_name(tiny):
    recording = NODES["RectiflowScheduleRecord"]().execute(model=tiny.model, granularity="output", tokens=64, max_runs=8)[1]
    for inputs, says in (
        ({"speed": 0.5}, "speed"), ({"speed": 9.0}, "speed"), ({"speed": float("nan")}, "speed"),
        ({"speed": 2.0, "recording": recording}, "without runs"), ({"speed": 2.0, "schedule": "{"}, "schedule"),
        ({"speed": 2.0, "recording": recording, "schedule": "{}"}, "one of the two"),
        ({"speed": 2.0, "model": accelerate(model=tiny.model, speed=2.0)[0]}, "a model with a cache"),
    ):  # fmt: skip
        with pytest.raises(NodeInputError, match=says):
            accelerate(**{"model": tiny.model, **inputs})
