"""Conversions: every pair inverts, guidance commutes with all of them, the singular points say so."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.samplers.conversions import (
    PREDICTIONS,
    convert,
    flow_to_ve,
    flow_to_vp,
    log_snr,
    sigma_from_log_snr,
    to_noise,
    to_score,
    to_velocity,
    to_x0,
    ve_to_flow,
    vp_to_flow,
)

SIGMAS = torch.tensor([1e-3, 0.01, 0.3, 0.5, 0.9, 1 - 1e-3])
DATA, NOISE = torch.randn(2, len(SIGMAS), 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = SIGMAS.double().reshape(-1, 1, 1, 1)
STATE = (1 - ROWS) * DATA + ROWS * NOISE
TRUTH = {"velocity": NOISE - DATA, "x0": DATA, "noise": NOISE, "score": -NOISE / ROWS}


def relative(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("source", "target"), list(permutations(PREDICTIONS, 2)))
def test_every_pair_gives_the_known_value_and_inverts(source, target):
    assert relative(convert(STATE, TRUTH[source], SIGMAS, source, target), TRUTH[target]) < 1e-9
    for row, sigma in enumerate(SIGMAS.double().tolist()):
        x, value = STATE[row : row + 1].float(), TRUTH[source][row : row + 1].float()
        there = convert(x, value, sigma, source, target)
        error = relative(convert(x, there, sigma, target, source), value)
        # What is between kept in float64: the published 1e-6, from end to end.
        exact = convert(x.double(), value.double(), sigma, source, target)
        assert relative(convert(x.double(), exact, sigma, target, source).float(), value) < 1e-6
        # Kept in float32: no arithmetic brings back more than the exact inverse of the rounded value, and ours is as good.
        possible = relative(convert(x.double(), exact.float().double(), sigma, target, source), value)
        assert error < 3 * possible + 3e-7
        if (target != "x0" or sigma >= 0.1) and (source in ("noise", "score") or target in ("velocity", "x0") or sigma <= 0.9):
            assert error < 1e-6  # all pairs between 0.1 and 0.9; at the ends those that do not pass through an x0 or a noise equal to x


def test_float32_cannot_hold_a_velocity_inside_the_data_estimate():
    """At sigma 1e-3 two velocities that differ by 1e-5 have one and the same x0 in float32: no function of it tells them apart."""
    x, v = torch.tensor([2.0]), torch.tensor([1.0])
    near = v + 1e-5
    assert not torch.equal(v, near) and torch.equal(to_x0(x, v, 1e-3, "velocity"), to_x0(x, near, 1e-3, "velocity"))


@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("source", PREDICTIONS)
def test_guidance_is_the_same_operation_on_every_prediction(source, target):
    cond, uncond = TRUTH[source], TRUTH[source] * 0.7 + 0.1
    guided = convert(STATE, uncond + 3 * (cond - uncond), SIGMAS, source, target)
    c, u = convert(STATE, cond, SIGMAS, source, target), convert(STATE, uncond, SIGMAS, source, target)
    assert relative(guided, u + 3 * (c - u)) < 1e-9


def test_ddim_is_euler_on_this_path():
    """x + (s' − s)·v = (1 − s')·x0 + s'·noise = (s'/s)·x + (1 − s'/s)·x0."""
    s, s_next = 0.8, 0.3
    x, v = STATE[:1], TRUTH["velocity"][:1]
    euler = x + (s_next - s) * v
    assert relative((1 - s_next) * to_x0(x, v, s, "velocity") + s_next * to_noise(x, v, s, "velocity"), euler) < 1e-12
    assert relative(s_next / s * x + (1 - s_next / s) * to_x0(x, v, s, "velocity"), euler) < 1e-12


def test_ends_of_the_path_are_ordinary_where_they_can_be():
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(to_x0(x, v, 0.0, "velocity"), x)
    assert torch.equal(to_noise(x, v, 1.0, "velocity"), x)
    assert torch.equal(to_noise(x, v, 1.0, "score"), -v)
    assert torch.isfinite(to_velocity(x, v, 1.0, "x0")).all() and torch.isfinite(to_velocity(x, v, 0.0, "noise")).all()


@pytest.mark.parametrize(("function", "sigma", "source"), [
    (to_velocity, 0.0, "x0"), (to_velocity, 1.0, "noise"), (to_velocity, 1.0, "score"), (to_score, 0.0, "velocity"), (to_noise, 0.0, "x0"),
])
def test_singular_points_are_named(function, sigma, source):
    with pytest.raises(NodeInputError, match="sigma"):
        function(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0.5, sigma]), source)


def test_unknown_kinds_are_named():
    with pytest.raises(NodeInputError, match="epsilon"):
        convert(torch.ones(1), torch.ones(1), 0.5, "epsilon", "x0")
    with pytest.raises(NodeInputError, match="epsilon"):
        convert(torch.ones(1), torch.ones(1), 0.5, "x0", "epsilon")


@pytest.mark.parametrize("sigma", [SIGMAS, 0.37])
def test_paths_invert_and_keep_data_and_noise(sigma):
    rows = ROWS if isinstance(sigma, torch.Tensor) else sigma
    state = (1 - rows) * DATA + rows * NOISE
    x_ve, sigma_ve = flow_to_ve(state, sigma)
    assert relative(x_ve, DATA + sigma_ve.reshape(-1, *[1] * (3 * sigma_ve.ndim)) * NOISE) < 1e-12
    x_vp, a, b = flow_to_vp(state, sigma)
    assert torch.allclose(a**2 + b**2, torch.ones_like(a))
    for x, s in (ve_to_flow(x_ve, sigma_ve), vp_to_flow(x_vp, a, b)):
        assert relative(x, state) < 1e-12
        assert torch.allclose(s, torch.as_tensor(sigma).double())
    with pytest.raises(NodeInputError, match="infinity"):
        flow_to_ve(state, 1.0)


def test_log_snr_inverts_from_end_to_end():
    assert log_snr(0) == math.inf and log_snr(1) == -math.inf and log_snr(0.5) == 0
    sigmas = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(sigma_from_log_snr(log_snr(sigmas)), sigmas, atol=1e-15)
    for sigma in (1e-12, 0.2, 0.999):
        assert sigma_from_log_snr(log_snr(sigma)) == pytest.approx(sigma, rel=1e-12)
    assert sigma_from_log_snr(-800.0) == 1.0 and sigma_from_log_snr(800.0) == 0.0
