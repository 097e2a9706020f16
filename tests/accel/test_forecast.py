"""The polynomial, the clock, the schedule and the store, against closed forms; no model."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.accel.cache.clock import StepClock
from rectiflow.accel.cache.forecast import Ladder
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.policy import Limits, Policy, Visit
from rectiflow.accel.cache.store import FeatureStore, Key, StoreOptions, guard_of
from rectiflow.accel.cache.taylor import TaylorSeer


def full_visits(policy: Policy, limits: Limits, steps: int) -> list[int]:
    found, skipped = [], 0
    for i in range(steps):
        visit = Visit(i, 1 - i / steps, float(i), steps, skipped)
        if limits.forbids(visit) or not policy.decide(visit).skip:
            found.append(i)
            skipped = 0
        else:
            skipped += 1
    return found


@pytest.mark.parametrize("warmup, interval, count", [
    (3, 3, 18), (3, 4, 14), (3, 5, 12), (3, 6, 10), (3, 7, 9), (1, 5, 10), (1, 6, 9), (2, 3, 18), (2, 4, 14), (2, 5, 11),
])  # fmt: skip
def test_full_visits_over_50_steps_are_the_papers(warmup, interval, count):
    assert len(full_visits(TaylorSeer(interval=interval), Limits(warmup), 50)) == count


def test_the_schedule_of_flux():
    assert full_visits(TaylorSeer(interval=6), Limits(3), 50) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    assert full_visits(IntervalReuse(interval=1), Limits(), 7) == list(range(7))
    assert full_visits(IntervalReuse(interval=4), Limits(1, 1, 0.2, 0.7), 20) == [0, 1, 2, 3, 7, 11, *range(14, 20)]


def test_newton_is_exact_for_polynomials_up_to_its_order_at_any_spacing():
    places = torch.linspace(0, 1, 51, dtype=torch.float64)
    for order in range(5):
        polynomial = [1.0, -0.7, 0.4, 0.3, -0.2][: order + 1]
        values = sum(c * places**k for k, c in enumerate(polynomial))
        ladder = Ladder(order, "newton")
        worst = 0.0
        for anchors, s in enumerate(full_visits(TaylorSeer(interval=6), Limits(3), 50)):
            ladder.update(float(s), values[s].float().reshape(1))
            if anchors >= order:
                worst = max(worst, *(abs(float(ladder.predict(float(s + x))) - float(values[s + x])) for x in range(6)))
        # float32 anchors of size 1 err by 6e-8; order 4 multiplies that by about (s − s_0)…(s − s_3)/(gaps) < 300 at 5 past the anchor.
        assert worst <= (1e-5 if order < 4 else 5e-5)
        assert len(ladder) == order + 1


def test_the_reference_errs_by_minus_n_x_on_a_parabola_and_not_on_a_line():
    line, parabola = Ladder(2, "reference"), Ladder(2, "reference")
    for s in (0, 3, 6, 9):
        line.update(s, torch.tensor([2.0 + 3.0 * s]))
        parabola.update(s, torch.tensor([float(s) ** 2]))
    for x in (1, 2):
        assert float(parabola.predict(9 + x)) - (9 + x) ** 2 == pytest.approx(-3 * x, abs=1e-5)
        assert float(line.predict(9 + x)) == pytest.approx(2 + 3 * (9 + x), abs=1e-5)


@pytest.mark.parametrize("interval, order, basis, error", [
    (3, 0, "newton", 0.0914), (3, 1, "newton", 0.0309), (3, 2, "newton", 0.0114), (3, 2, "reference", 0.0211),
    (6, 0, "newton", 0.2260), (6, 1, "newton", 0.1486), (6, 2, "newton", 0.1045), (6, 2, "reference", 0.1141),
])  # fmt: skip
def test_errors_on_sines_are_those_of_a_direct_run(interval, order, basis, error):
    """sin(0.15 s + 2πc/64), 50 steps, warm-up 3; the figures were made apart from this code."""
    phase = 2 * math.pi * torch.arange(64) / 64
    policy = TaylorSeer(order, basis, "step", interval)
    full = full_visits(policy, Limits(3), 50)
    ladder, total = Ladder(order, basis), 0.0
    for s in range(50):
        value = torch.sin(0.15 * s + phase)
        if s in full:
            ladder.update(float(s), value)
        else:
            total += float((ladder.predict(float(s)) - value).abs().mean())
    assert total / 50 == pytest.approx(error, abs=1e-3)


def test_a_step_that_is_evaluated_again_keeps_its_differences():
    ladder = Ladder(1, "newton")
    ladder.update(0.0, torch.tensor([1.0]))
    ladder.update(1.0, torch.tensor([3.0]))
    ladder.update(1.0, torch.tensor([4.0]))
    assert ladder.predict(2.0).item() == 6.0
    ladder.update(0.0, torch.tensor([1.0]))  # the path turns round: an older anchor again
    assert len(ladder) == 1 and ladder.predict(5.0).item() == 1.0


def test_forecasts_and_kept_values_are_tensors_of_their_own():
    value = torch.ones(3)
    ladder = Ladder(0, "newton")
    ladder.update(0.0, value)
    value += 1
    ladder.predict(1.0).mul_(7)
    assert torch.equal(ladder.predict(1.0), torch.ones(3))


@pytest.mark.parametrize("sigmas", [[1.0, 0.8, 0.5, 0.1, 0.0], [0.0, 0.2, 0.7, 1.0], [14.6, 3.0, 0.4, 0.0]])
def test_the_clock_reads_falling_and_rising_schedules(sigmas):
    clock = StepClock(sigmas)
    for i, (a, b) in enumerate(zip(sigmas, sigmas[1:])):
        assert clock.at(a) == (float(i), False)
        u, foreign = clock.at(0.75 * a + 0.25 * b)
        assert u == pytest.approx(i + 0.25) and not foreign
    assert clock.at(max(sigmas) + 1).foreign
    assert StepClock([1.0, 0.5, 0.5, 0.0]).at(0.5) == (1.0, False)


def test_the_cap_lowers_the_order_then_turns_the_store_off():
    part = torch.zeros(1, 256)  # 1 KiB
    a, b = Key("a", 0), Key("b", 1)
    store = FeatureStore(2, "newton", StoreOptions(cap=4096))
    for visit in range(4):
        for key in (a, b):
            store.keep(key, guard_of(part), [part], float(visit), visit)
    assert (store.order, store.nbytes, store.peak) == (1, 4096, 4096) and "order lowered to 1" in store.notes[0]
    small = FeatureStore(1, "newton", StoreOptions(cap=1000))
    small.keep(a, guard_of(part), [part], 0.0, 0)
    assert (small.order, small.nbytes, small.peak) == (-1, 0, 0) and "off" in small.notes[-1]


def test_history_of_another_size_or_long_gone_is_dropped():
    store = FeatureStore(1, "newton", StoreOptions())
    part = torch.zeros(1, 8)
    store.keep(Key("a", 0), guard_of(part), [part], 0.0, 0)
    assert store.has(Key("a", 0), guard_of(part))
    assert not store.has(Key("a", 0), guard_of(torch.zeros(1, 9))) and len(store) == 0
    store.keep(Key("a", 0), guard_of(part), [part], 0.0, 0)
    store.keep(Key("b", 0), guard_of(part), [part], 9.0, 9)
    assert not store.has(Key("a", 0), guard_of(part)) and store.has(Key("b", 0), guard_of(part))
