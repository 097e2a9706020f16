"""The adaptive solver: its tolerance is met, its cap binds, its callback counts along the schedule."""

from __future__ import annotations

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.samplers.adaptive import sample_adaptive
from rectiflow.tests.samplers.flows import GaussianFlow, MixtureFlow, rk4_reference, rmse

DOWN = torch.linspace(1, 0, 11, dtype=torch.float64)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("grid", [DOWN, DOWN.flip(0)], ids=["sampling", "inversion"])
def test_error_follows_the_tolerance(tolerance, grid):
    flow = MixtureFlow()
    x = flow.noise(64) if grid[0] == 1 else flow.data(64)
    exact = rk4_reference(flow, x, float(grid[0]), float(grid[-1]), 1000)
    flow.calls = 0
    # A local tolerance is not a global one: the flow stretches errors, near the borders of the mixture by two orders.
    assert rmse(sample_adaptive(flow, x, grid, rtol=tolerance, atol=tolerance, max_nfe=4000), exact) < 100 * tolerance
    assert flow.calls < 4000


def test_tighter_is_dearer():
    calls = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        flow = GaussianFlow()
        sample_adaptive(flow, torch.ones(1, 4, dtype=torch.float64), DOWN, rtol=tolerance, atol=tolerance, max_nfe=10000)
        calls.append(flow.calls)
    assert calls[0] < calls[1] < calls[2]


@pytest.mark.parametrize("cap", [4, 10, 25, 61])
def test_the_cap_binds_and_the_end_is_reached(cap, caplog):
    flow = MixtureFlow()
    x = flow.noise(16)
    asked = []

    def model(state, sigma):
        asked.append(float(sigma[0]))
        return flow(state, sigma)

    out = sample_adaptive(model, x, DOWN, rtol=1e-9, atol=1e-9, max_nfe=cap)
    assert len(asked) <= cap and torch.isfinite(out).all()
    assert min(asked) < 1e-6  # the last evaluation reads the velocity of sigma 0
    assert "cap" in caplog.text


def test_callback_walks_the_schedule_and_may_interrupt():
    seen = []
    sample_adaptive(GaussianFlow(), torch.ones(1, 4), DOWN.float(), callback=lambda state: seen.append(state["i"]), rtol=1e-3, atol=1e-3)
    assert seen[0] == 0 and seen == sorted(seen) and max(seen) <= 9

    def interrupt(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_adaptive(GaussianFlow(), torch.ones(1, 4), DOWN.float(), callback=interrupt)


def test_bad_options_and_empty_schedules():
    for options in ({"rtol": 0.0}, {"atol": float("nan")}, {"max_nfe": 3}):
        with pytest.raises(NodeInputError):
            sample_adaptive(GaussianFlow(), torch.ones(1, 2), DOWN, **options)
    x = torch.ones(1, 2)
    assert torch.equal(sample_adaptive(GaussianFlow(), x, torch.ones(1)), x)
    assert torch.equal(sample_adaptive(GaussianFlow(), x, torch.tensor([0.5, 0.5])), x)
