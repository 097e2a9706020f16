"""UltraFlux's loss against its own equations: the plain limit, the Huber limit, weights at both ends, masks, and a run of the trainer."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.nodes.training import RectiflowTrainLoss
from rectiflow.tests.train.toy import config, train
from rectiflow.train.config import TrainConfig
from rectiflow.train.losses import Loss
from rectiflow.train.targets import Target


def difference(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(loss: Loss, gap: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return loss.over_sigma(sigma) * loss.each(gap, sigma)


def test_a_large_threshold_and_no_power_are_weighted_squares():
    """Asked: 1 within 1e-3 of 0.5·t/(1 − t)·mean ‖ẑ − z‖² at c = 1e6, β = 0; ẑ − z is −t·(v_θ − v)."""
    t = torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.999])
    gap = difference(5, 16, 8, 6)
    found = whole(Loss("huber_wavelet", c_min=1e6, c_max=1e6, beta=0.0), gap, t)
    clean = (t.view(-1, 1, 1, 1) * gap).square().flatten(1).mean(1)
    torch.testing.assert_close(found / (0.5 * t / (1.0 - t) * clean), torch.ones(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(found, t**3 / (2.0 * (1.0 - t)) * gap.square().flatten(1).mean(1), atol=0, rtol=1e-3)


def test_a_band_that_is_far_off_counts_by_its_size():
    """One square whose only band is LH = 2·size: ρ/c → |r| − c, over its four bands."""
    gap = torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]]]]) * 500.0
    found = float(Loss("huber_wavelet", c_min=0.2, c_max=0.2).each(gap, torch.tensor([1.0])))
    assert found == pytest.approx((0.2 * 1000.0 - 0.04) / 4, rel=1e-6)


def test_threshold_and_weight_follow_the_ratio_of_signal_to_noise():
    """γ = 4 is reached at t = 1/3; at t = ½ the ratio is 1, a quarter of it."""
    loss = Loss("huber_wavelet", c_min=0.2, c_max=1.0, snr_gamma=4.0, beta=0.5, alpha=0.5)
    t = torch.tensor([0.0, 0.2, 1 / 3, 0.5, 1.0])
    torch.testing.assert_close(loss.wavelet().threshold(t), torch.tensor([1.0, 1.0, 1.0, 0.6, 0.2]), atol=1e-3, rtol=0)
    torch.testing.assert_close(loss.over_sigma(t), torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0]), atol=1e-6, rtol=1e-5)
    plain = Loss("huber_wavelet", beta=0.0).over_sigma(torch.tensor([0.5, 0.75, 1.0]))
    torch.testing.assert_close(plain, torch.tensor([1.0, 3.0, 1000.0]))  # t = 1 is kept at 1000
    assert torch.equal(Loss("huber_wavelet", alpha=0.0).wavelet().threshold(t), torch.ones(5))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t", [0.0, 1e-3, 0.999, 1.0])
def test_gradients_are_finite_at_both_ends(t, beta):
    gap = (1e3 * difference(2, 16, 4, 4)).requires_grad_(True)
    whole(Loss("huber_wavelet", beta=beta), gap, torch.full((2,), t)).mean().backward()
    assert torch.isfinite(gap.grad).all() and (t == 0.0 or float(gap.grad.abs().max()) > 0.0)


def test_the_gradient_is_that_of_differences():
    loss, t = Loss("huber_wavelet", beta=0.3), torch.tensor([0.2, 0.7], dtype=torch.float64)

    def total(gap):
        return (loss.over_sigma(t) * loss.wavelet().each(gap, t)).sum()

    assert torch.autograd.gradcheck(total, difference(2, 2, 4, 2).double().requires_grad_(True))


def test_a_mask_leaves_its_squares_out():
    gap, t = difference(1, 4, 4, 4), torch.tensor([0.6])
    weight = torch.ones(1, 1, 4, 4)
    weight[..., :2] = 0.0
    loss = Loss("huber_wavelet")
    right = loss.each(gap[..., 2:], t)
    torch.testing.assert_close(loss.each(gap, t, weight), 0.5 * right)
    torch.testing.assert_close(loss.each(gap, t, torch.full((1, 1, 4, 4), 0.25)), 0.25 * loss.each(gap, t))


def test_the_trainer_learns_with_it_and_goes_on_where_it_stopped(tmp_path):
    loss = Loss("huber_wavelet", beta=0.5)
    trainer = train(steps=400, batch=12, validate_every=100, loss=loss)
    means = [record.mean for record in trainer.history.validations if record.weights == "weights"]
    assert means[-1] < 0.8 * means[0]
    one = train(steps=12, loss=loss)
    train(tmp_path, steps=12, steps_this_run=5, loss=loss)
    assert torch.equal(train(tmp_path, steps=12, loss=loss).params["first"], one.params["first"])


def test_settings_come_from_recipes_and_nodes_and_are_checked():
    asked = {"kind": "huber_wavelet", "c_min": 0.1, "c_max": 2.0, "snr_gamma": 3.0, "beta": 0.25, "alpha": 1.0}
    wanted = Loss(**asked)
    assert TrainConfig.from_table({"loss": asked}, "recipe").loss == wanted
    widgets = {"weighting": "none", "c_scale": 0.00054, "delta": 1.0}
    assert RectiflowTrainLoss().execute(**asked, **widgets)[0] == wanted
    assert RectiflowTrainLoss().execute(kind="mse", **widgets)[0] == Loss()  # graphs saved before these inputs
    assert config(loss=wanted).as_dict()["loss"]["beta"] == 0.25
    wrong = (("c_min", 0.0), ("c_min", 1.5), ("c_max", 1e7), ("snr_gamma", 0.0), ("beta", 1.1), ("alpha", -0.1), ("beta", math.nan))
    for name, value in wrong:
        with pytest.raises(NodeInputError, match=name):
            Loss(**{name: value})
    with pytest.raises(NodeInputError, match="sigma 1"):
        TrainConfig(loss=wanted, target=Target("distill_onestep"))
    with pytest.raises(NodeInputError, match="even"):
        wanted.each(torch.zeros(1, 4, 5, 4), torch.tensor([0.5]))
