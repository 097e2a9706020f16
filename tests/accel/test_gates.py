"""What gates decide, on features that are known functions of the step and on recorded ones that a short simulation walks beside them."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.accel.cache.calibration import GateCalibration, ReuseCalibration, correlation, fit_polynomial, read_curve
from rectiflow.accel.cache.confidence import ConfidenceGatedTaylor
from rectiflow.accel.cache.first_block import FirstBlockGate
from rectiflow.accel.cache.forecast import Ladder
from rectiflow.accel.cache.input_change import InputChangeGate
from rectiflow.accel.cache.magnitude import MagnitudeRule
from rectiflow.accel.cache.modulated import ModulatedInputGate, polynomial
from rectiflow.accel.cache.policy import Limits, Visit
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.errors import NodeInputError
from rectiflow.tests.accel.toy_stack import ToyStack

T = 20


def line(slope: float, offset: float = 3.0, jump_at: int | None = None):
    """Features of one image that go along a line in the step, and jump once."""
    ramp = torch.linspace(1, 2, 16)[None]
    return lambda s: offset * ramp + slope * s * ramp + (5.0 if jump_at is not None and s >= jump_at else 0.0)


def test_a_stack_that_goes_straight_is_accepted_after_two_full_steps():
    stack = ToyStack(line(0.3), line(-0.2), T)
    stack.sample(ConfidenceGatedTaylor(threshold=1e-4), Limits(2, 0))
    assert stack.computed == [0, 1]
    # float32 divided differences of values near 10, carried 18 steps.
    assert max(float((used - line(-0.2)(s)).abs().max()) for s, used in stack.used.items()) <= 1e-5


def test_after_a_jump_the_gate_rejects_twice_and_then_trusts_again():
    stack = ToyStack(line(0.3, jump_at=9), line(-0.2, jump_at=9), T)
    stack.sample(ConfidenceGatedTaylor(threshold=1e-4), Limits(2, 0))
    assert stack.computed == [0, 1, 9, 10]
    assert max(float((used - line(-0.2, jump_at=9)(s)).abs().max()) for s, used in stack.used.items()) <= 1e-5


def test_the_forecast_is_made_before_the_ladder_moves():
    """An implementation that updates first would see no error ever."""
    still, moving = (ToyStack(line(slope), line(0.1), T).sample(ConfidenceGatedTaylor(threshold=1e-9, first_order=0), Limits(2, 0))
                     for slope in (0.0, 0.3))  # fmt: skip
    assert {visit.statistic for visit in still.visits[2:]} == {0.0}
    assert all(visit.statistic > 1e-3 for visit in moving.visits[2:])


def test_accept_all_gives_the_ladder_evaluated_by_hand():
    last = line(0.2)
    stack = ToyStack(lambda s: torch.full((1, 4), math.sin(s)), lambda s: last(s) ** 2, T)
    stack.sample(ConfidenceGatedTaylor(order=1, threshold=math.inf), Limits(2, 1))
    ladder = Ladder(1, "newton")
    for s in (0, 1):
        ladder.update(float(s), last(s) ** 2)
    assert stack.computed == [0, 1, T - 1] and len(stack.used) == T - 3
    for s, used in stack.used.items():
        torch.testing.assert_close(used, ladder.predict(float(s)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("first, last", [(1, 1), (3, 1), (0, 2)])
def test_a_key_keeps_as_many_tensors_as_both_orders_say_and_none_after_the_run(first, last):
    sizes = []
    stack = ToyStack(lambda s: torch.full((1, 10), math.sin(s)), lambda s: torch.full((1, 10), math.cos(s)), T)
    runs = []

    def peek(run):
        sizes.append(run.store.nbytes)
        runs[:] = [run]

    record = stack.sample(ConfidenceGatedTaylor(order=last, first_order=first, threshold=1e-9), Limits(2, 0), peek=peek)
    assert max(sizes) == record.peak_bytes == ((first + 1) + (last + 1)) * 40
    assert runs[0].store.nbytes == 0 and len(runs[0].store) == 0


def uneven(seed: int) -> ToyStack:
    """50 steps, slow at .04 a step and fast at .35 in steps 20 to 29."""
    draw = torch.Generator().manual_seed(seed)
    p, q = (2 * math.pi * torch.rand(1, 64, generator=draw) for _ in range(2))
    rates = torch.tensor([0.35 if 20 <= s < 30 else 0.04 for s in range(50)])
    phase = torch.cumsum(rates, 0)
    return ToyStack(lambda s: 1 + torch.sin(phase[s] + p), lambda s: torch.sin(1.7 * phase[s] + q), 50)


def mean_error(stack: ToyStack) -> float:
    return sum(float((used - stack.last(s)).abs().mean()) for s, used in stack.used.items()) / stack.steps


@pytest.mark.parametrize("interval, calls, fixed, gated", [(3, 18, 0.094, 0.042), (6, 10, 0.305, 0.169)])
def test_the_gate_beats_a_fixed_interval_at_equal_calls(interval, calls, fixed, gated):
    """The threshold is the smallest that makes no more calls than the interval; every seed must be nearer."""
    errors = []
    for seed in range(16):
        stack = uneven(seed)
        stack.sample(TaylorSeer(interval=interval), Limits(3, 0))
        assert len(stack.computed) == calls
        errors.append([mean_error(stack), math.inf])
        low, high = 0.0, 1.0
        for _ in range(7):
            tried = (low + high) / 2
            stack.sample(ConfidenceGatedTaylor(threshold=tried), Limits(3, 1))
            low, high = (low, tried) if len(stack.computed) <= calls else (tried, high)
            if len(stack.computed) <= calls:
                errors[-1][1] = mean_error(stack)
        assert errors[-1][1] < errors[-1][0]
    means = [sum(column) / 16 for column in zip(*errors)]
    # Other phases were drawn for the figures compared with, and seven halvings leave the threshold within 0.01.
    assert means == pytest.approx([fixed, gated], rel=0.1)


def test_more_steps_lie_below_a_higher_threshold_in_a_calibrated_run():
    thresholds = (0.0, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)
    record = uneven(0).sample(GateCalibration(order=1, thresholds=thresholds, warmup=3), Limits())
    accepted = list(record.findings["accepted"].values())
    assert accepted == sorted(accepted) and (accepted[0], accepted[-1]) == (0, 47)
    assert len(record.findings["errors"]) == 47 and record.findings["correlation"] > 0.9
    assert record.full_visits == 50 and "no gain" not in record.text() and "correlation: 0.9" in record.text()


def recorded(seed: int, channels: int = 32, images: int = 2):
    """A wandering feature: (b, channels) by step, uneven in speed, another for each image."""
    draw = torch.Generator().manual_seed(seed)
    moves = torch.randn(T, images, channels, generator=draw) * (0.02 + 0.2 * torch.rand(T, images, 1, generator=draw))
    walk = torch.randn(1, images, channels, generator=draw) + torch.cumsum(moves, 0)
    return lambda s: walk[s]


def rel(a, b, base):
    return [float((x - y).abs().mean() / z.abs().mean()) for x, y, z in zip(a, b, base)]


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.4])
def test_first_block_decides_as_a_direct_simulation(threshold):
    r = recorded(1)
    stack = ToyStack(r, recorded(2), T, "block_delta")
    stack.sample(FirstBlockGate(threshold=threshold), Limits(1, 1))
    full, previous = [], None
    for s in range(T):
        if s == 0 or s == T - 1 or not max(rel(r(s), previous, previous)) < threshold:
            full.append(s)
            previous = r(s)
    assert stack.computed == full and 2 < len(full) < T


@pytest.mark.parametrize("threshold, curve", [(0.1, ()), (0.3, ()), (0.2, (3.0, 0.5, 0.01)), (0.6, (498.65, -283.78, 55.86, -3.82, 0.264))])
def test_modulated_input_decides_as_a_direct_simulation(threshold, curve):
    m = recorded(3)
    stack = ToyStack(m, recorded(4), T, "block_delta")
    stack.sample(ModulatedInputGate(threshold=threshold, coefficients=curve), Limits(1, 1))
    full, sums = [], [0.0, 0.0]
    for s in range(T):
        if 0 < s < T - 1:
            sums = [total + polynomial(curve, change) for total, change in zip(sums, rel(m(s), m(s - 1), m(s - 1)))]
        if s in (0, T - 1) or not max(sums) < threshold:
            full.append(s)
            sums = [0.0, 0.0]
    assert stack.computed == full and 2 < len(full) < T


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("relative", [False, True])
def test_input_change_decides_as_a_direct_simulation(threshold, relative):
    x, v = recorded(5), recorded(6)
    stack = ToyStack(x, lambda s: v(s) - x(s) if relative else v(s), T, "output_delta" if relative else "output")
    stack.sample(InputChangeGate(threshold=threshold), Limits(1, 1), latent=x)
    full, sums, anchor, rates = [], [0.0, 0.0], None, None
    for s in range(T):
        if rates and s < T - 1:
            moved = [float((a - b).abs().mean() / c.abs().mean()) for a, b, c in zip(x(s), x(anchor), v(anchor))]
            sums = [total + k * change for total, k, change in zip(sums, rates, moved)]
        if not rates or s == T - 1 or not max(sums) < threshold:
            full.append(s)
            if anchor is not None:
                rates = rel(v(s), v(anchor), x(s) - x(anchor))
            anchor, sums = s, [0.0, 0.0]
    assert stack.computed == full and 2 < len(full) < T


@pytest.mark.parametrize("threshold, most", [(0.05, 5), (0.2, 2), (0.5, -1)])
def test_magnitude_decides_as_a_direct_simulation(threshold, most):
    draw = torch.Generator().manual_seed(7)
    ratios = tuple((1 + 0.1 * torch.randn(T, generator=draw)).tolist())
    stack = ToyStack(recorded(8), recorded(9), T, "block_delta")
    stack.sample(MagnitudeRule(threshold=threshold, ratios=ratios), Limits(3, 1, max_consecutive=most))
    full, product, error, count = [], 1.0, 0.0, 0
    for s in range(T):
        product, error, count = product * ratios[s], error + abs(1 - product * ratios[s]), count + 1
        if s < 3 or s == T - 1 or error > threshold or 0 <= most < count:
            full.append(s)
            product, error, count = 1.0, 0.0, 0
    assert stack.computed == full and 4 < len(full) < T


def test_magnitude_ratios_stretch_over_a_run_of_another_length():
    rule = MagnitudeRule(ratios=tuple(1 + i / 100 for i in range(11)))
    assert [rule.ratio(Visit(i, 0.5, float(i), 21, 0)) for i in (0, 1, 10, 20)] == [1.0, 1.0, 1.05, 1.1]
    assert [rule.ratio(Visit(i, 0.5, float(i), 11, 0)) for i in range(11)] == list(rule.ratios)


def test_one_changed_picture_of_a_batch_stops_the_skip_unless_means_decide():
    def feature(s):
        still, changing = torch.ones(7, 8), torch.ones(1, 8) * (1 + 0.5 * s)
        return torch.cat((still, changing))

    computed = {}
    for how in ("max_over_batch", "mean"):
        stack = ToyStack(feature, feature, 8, "block_delta")
        stack.sample(FirstBlockGate(threshold=0.12, reduce=how), Limits(1, 0))
        computed[how] = stack.computed
    assert computed["max_over_batch"] == list(range(8)) and len(computed["mean"]) < 8


def test_calibration_finds_ratios_and_changes_that_are_known():
    stack = ToyStack(lambda s: torch.ones(1, 6, 4) * 1.1**s, lambda s: torch.ones(1, 6, 4) * 0.9**s, T, "block_delta")
    found = stack.sample(ReuseCalibration(), Limits()).findings
    # Powers of float32.
    assert found["ratios"] == pytest.approx([1.0] + [0.9] * (T - 1), rel=1e-5)
    assert [change for pair in found["changes"] for change in pair] == pytest.approx([0.1] * (2 * (T - 1)), rel=1e-4)


def test_polynomials_are_found_again():
    wanted = (393.77, -603.51, 209.1, -23.01, 0.864)
    x = torch.linspace(0.01, 0.4, 40).tolist()
    found = fit_polynomial([(value, polynomial(wanted, value)) for value in x], 4, "test")
    assert found == pytest.approx(wanted, rel=1e-6)  # float64 on well-spread points
    assert polynomial((), 0.3) == 0.3 and correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0) and correlation([1, 1], [1, 2]) == 0.0


@pytest.mark.parametrize("bad, says", [
    (lambda: fit_polynomial([(1, 1)] * 3, 4, "n"), "input 'report' got '3 measured changes'"),
    (lambda: fit_polynomial([], 9, "n"), "degree"),
    (lambda: read_curve("1, two", "n"), "numbers separated by commas"),
    (lambda: read_curve("nan", "n"), "finite"),
    (lambda: read_curve("1 " * 3000, "n"), "at most 2000"),
    (lambda: MagnitudeRule().check("n"), "Reuse Curve"),
    (lambda: MagnitudeRule(ratios=(1.0, 0.0)).check("n"), "positive ratios"),
    (lambda: ConfidenceGatedTaylor(gate="x").check("n"), "gate"),
    (lambda: ConfidenceGatedTaylor(threshold=-1).check("n"), "threshold"),
    (lambda: ConfidenceGatedTaylor(stride=0).check("n"), "subsample"),
    (lambda: GateCalibration().check("n"), "thresholds"),
    (lambda: Limits(max_consecutive=-2).check("n"), "max_consecutive"),
    (lambda: Limits(solver_rule="odd").check("n"), "solver_rule"),
])  # fmt: skip
def test_bad_numbers_are_named(bad, says):
    with pytest.raises(NodeInputError, match=says):
        bad()
