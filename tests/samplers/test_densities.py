"""Time densities: draws against their closed form, the functions against one another, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.samplers.densities import MODE_SCALE_MAX, TimestepDensity, beta_quantile

CASES = [
    TimestepDensity("uniform"), TimestepDensity("uniform", shift=3.0), TimestepDensity("logit_normal"),
    TimestepDensity("logit_normal", mean=-1.2, std=1.2), TimestepDensity("logit_normal", mean=0.5, std=0.6, shift=3.0),
    TimestepDensity("mode", mode_scale=-1.0), TimestepDensity("mode", mode_scale=0.0), TimestepDensity("mode"),
    TimestepDensity("mode", mode_scale=1.75), TimestepDensity("cosmap"), TimestepDensity("u_shaped"), TimestepDensity("u_shaped", a=0.0),
    TimestepDensity("u_shaped", a=12.0, shift=0.5),
]


@pytest.mark.parametrize("density", CASES, ids=str)
def test_draws_follow_the_distribution(density):
    """Kolmogorov-Smirnov over 1e6 draws: below 0.002, which a right sampler exceeds once in 1500 seeds."""
    t = density.sample(1_000_000, torch.Generator().manual_seed(0)).sort().values
    assert 0 < t[0] and t[-1] < 1
    expected = density.cdf(t)
    ranks = torch.arange(1_000_001, dtype=torch.float64) / 1_000_000
    assert max((expected - ranks[:-1]).abs().max(), (expected - ranks[1:]).abs().max()) < 0.002


@pytest.mark.parametrize("density", CASES, ids=str)
def test_quantile_distribution_and_density_agree(density):
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    t = density.quantile(p)
    assert (t[1:] > t[:-1]).all()
    # 1e-8: where the mode map is flat (its ends at scale −1, its middle at 1.75) its inverse keeps half the digits of a double.
    assert (density.cdf(t) - p).abs().max() < 1e-8
    step = 1e-6
    slope = (density.cdf(t + step * t * (1 - t)) - density.cdf(t - step * t * (1 - t))) / (2 * step * t * (1 - t))
    # 1e-3: the peak of the mode density at scale 1.75 is narrow enough for the difference to see its curvature.
    assert torch.allclose(density.pdf(t), slope, rtol=1e-3)
    assert density.quantile(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)


def test_published_forms():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    a = 4.0
    published = a * (torch.exp(a * t) + torch.exp(a * (1 - t))) / (2 * (math.exp(a) - 1))
    assert torch.allclose(TimestepDensity("u_shaped", a=a).pdf(t), published, rtol=1e-12)
    assert float(TimestepDensity("u_shaped").sample(1_000_000, torch.Generator().manual_seed(1)).mean()) == pytest.approx(0.5, abs=1e-3)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.allclose(TimestepDensity("cosmap").quantile(u), 1 - 1 / (torch.tan(math.pi * u / 2) + 1), rtol=1e-12)
    fine = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert float(torch.trapezoid(TimestepDensity("cosmap").pdf(fine), fine)) == pytest.approx(1, abs=1e-9)
    # EDM's log-SNR ~ N(−2·P_mean, (2·P_std)²), as the header claims.
    draws = torch.logit(TimestepDensity("logit_normal", mean=-1.2, std=1.2).sample(200_000, torch.Generator().manual_seed(2)))
    assert float((-2 * draws).mean()) == pytest.approx(2.4, abs=0.02) and float((-2 * draws).std()) == pytest.approx(2.4, abs=0.02)


@pytest.mark.parametrize(("options", "named"), [
    ({"kind": "mode", "mode_scale": 1.8}, "mode_scale"), ({"kind": "mode", "mode_scale": -1.1}, "mode_scale"), ({"kind": "cosine"}, "kind"),
    ({"std": 0.0}, "std"), ({"std": float("nan")}, "std"), ({"mean": float("inf")}, "mean"), ({"a": 30.0}, "a"), ({"shift": 0.0}, "shift"),
    ({"mode_scale": float("nan")}, "mode_scale"),
])
def test_parameters_outside_their_range_are_refused(options, named):
    with pytest.raises(NodeInputError, match=f"'{named}'"):
        TimestepDensity(**options)
    assert 1.75 < MODE_SCALE_MAX < 1.8


def test_beta_quantile_where_it_is_known():
    p = torch.linspace(0, 1, 201, dtype=torch.float64)
    assert (beta_quantile(p, 1, 1) - p).abs().max() < 1e-12
    assert (beta_quantile(p, 2.5, 1) - p ** (1 / 2.5)).abs().max() < 1e-12
    assert (beta_quantile(p, 0.5, 0.5) - torch.sin(math.pi * p / 2) ** 2).abs().max() < 1e-12
    x = beta_quantile(p, 2, 2)
    assert (3 * x**2 - 2 * x**3 - p).abs().max() < 1e-12
    assert (beta_quantile(p, 0.6, 0.6) + beta_quantile(p, 0.6, 0.6).flip(0) - 1).abs().max() < 1e-12
    # From scipy.stats.beta.ppf, three values of the schedule's own parameters.
    assert beta_quantile(torch.tensor([0.1, 0.25, 0.9], dtype=torch.float64), 0.6, 0.6).tolist() == pytest.approx(
        [0.03958440558878085, 0.17568037865269498, 0.9604155944112192], abs=1e-12,
    )
    with pytest.raises(NodeInputError, match="above 0"):
        beta_quantile(p, 0, 1)
