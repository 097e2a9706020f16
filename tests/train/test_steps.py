"""One step: densities, targets, losses, accumulation, additional losses, optimisers, each against what can be said without training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.tests.train.toy import Table, Toy, config, train
from rectiflow.train.curve import curve_picture, density_picture
from rectiflow.train.densities import DENSITIES, Density
from rectiflow.train.draws import Draws, Order, seeded
from rectiflow.train.history import History, StepRecord, ValidationRecord
from rectiflow.train.loop import Trainer
from rectiflow.train.losses import KINDS, Loss
from rectiflow.train.optim import Optim, lr_factor, orthogonal, square_tiles
from rectiflow.train.optim import from_tiles as joined
from rectiflow.train.targets import Target, point_at


def ks(drawn: torch.Tensor, law) -> float:
    """The Kolmogorov-Smirnov distance of draws from a distribution function."""
    drawn = drawn.double().sort().values
    steps = torch.arange(1, len(drawn) + 1, dtype=torch.float64) / len(drawn)
    expected = law(drawn)
    return float(torch.maximum((expected - steps).abs(), (expected - steps + 1 / len(drawn)).abs()).max())


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("kind", DENSITIES)
def test_draws_follow_their_density(kind, stratified):
    """0.002 is three times what 10⁶ independent draws stay below in half of all cases (0.83/√n)."""
    density = Density(kind, mean=0.4, std=1.1, shift=1.7, stratified=stratified)
    drawn = density.sample(1_000_000, seeded("ks", kind))
    assert ks(drawn, density.law().cdf) < 0.002


@pytest.mark.parametrize("kind", DENSITIES)
def test_small_batches_follow_it_too(kind):
    """Stratified draws of 4 are not independent inside a batch, but each position alone has the density."""
    density = Density(kind)
    first = torch.stack([density.sample(4, seeded("batch", number))[0] for number in range(4000)])
    assert ks(first, density.law().cdf) < 1.95 / math.sqrt(4000)  # exceeded by chance once in a thousand


@pytest.mark.parametrize("wrong", [{"kind": "none"}, {"mode_scale": 1.8}, {"std": 0.0}, {"low": 0.5, "high": 0.5}, {"a": 21.0}])
def test_densities_refuse(wrong):
    with pytest.raises(NodeInputError):
        Density(**{"kind": "mode", **wrong})


def test_a_seed_names_its_numbers_and_streams_do_not_meet():
    assert torch.equal(Draws(1, 2).normal("noise", (5,)), Draws(1, 2).normal("noise", (5,)))
    others = [Draws(1, 3).normal("noise", (5,)), Draws(2, 2).normal("noise", (5,)), Draws(1, 2).normal("sigma", (5,))]
    assert all(not torch.equal(Draws(1, 2).normal("noise", (5,)), other) for other in others)
    assert not torch.equal(Draws(1, 12).uniform("x", (3,)), Draws(11, 2).uniform("x", (3,)))


def test_every_example_once_an_epoch_and_one_size_a_step():
    order = Order([list(range(12))], 0, 4)
    assert sorted(torch.cat([order.rows(step) for step in range(3)]).tolist()) == list(range(12))
    assert not torch.equal(order.rows(0), order.rows(3))
    mixed = Order([[0, 1, 2, 3], [4, 5, 6]], 0, 2)
    epoch = [set(mixed.rows(step).tolist()) for step in range(4)]
    assert set().union(*epoch) == set(range(7)) and all(rows <= {0, 1, 2, 3} or rows <= {4, 5, 6} for rows in epoch)


def test_the_velocity_target_is_noise_minus_data():
    clean = torch.randn(4, 2, 3)
    sigma = torch.tensor([0.0, 0.25, 0.5, 1.0])
    point = point_at(Target(), clean, None, sigma, Draws(0, 0), 0)
    noise = point.velocity + clean
    assert torch.allclose(noise, Draws(0, 0).normal("noise", (4, 2, 3)), atol=1e-6)
    assert torch.allclose(point.x, clean + sigma.view(-1, 1, 1) * point.velocity, atol=1e-6)


def test_annealing_ends_in_reflow_and_begins_with_a_flow():
    clean, paired, sigma = torch.zeros(1000, 1000), torch.randn(1000, 1000), torch.full((1000,), 0.5)
    target = Target("annealing_reflow", anneal_steps=10)
    assert [target.beta(step) for step in (0, 5, 10, 20)] == [1.0, 0.5, 0.0, 0.0]
    assert torch.equal(point_at(target, clean, paired, sigma, Draws(0, 0), 10).velocity, paired)
    for step in (0, 3, 7):
        noise = point_at(target, clean, paired, sigma, Draws(0, 0), step).velocity
        assert abs(float(noise.mean())) < 1e-2 and abs(float(noise.var()) - 1.0) < 1e-2  # over 10⁶ numbers
    fresh = point_at(target, clean, paired, sigma, Draws(0, 0), 0).velocity
    assert torch.equal(fresh, Draws(0, 0).normal("noise", (1000, 1000)))


def test_one_step_distillation_stands_at_pure_noise():
    paired = torch.randn(3, 5)
    point = point_at(Target("distill_onestep"), torch.zeros(3, 5), paired, torch.rand(3), Draws(0, 0), 0)
    assert torch.equal(point.x, paired) and point.sigma.eq(1.0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_zero_at_the_answer_and_pull_towards_it(kind):
    """Every kind grows with each number of the difference; that of bands is tried on a square of equal numbers, which has one band."""
    loss, sigma = Loss(kind), torch.tensor([0.3, 0.8])
    assert loss.each(torch.zeros(2, 3, 4, 4), sigma).eq(0.0).all()
    difference = torch.tensor([0.5, -2.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone().requires_grad_(True)
    loss.each(difference, sigma[:1]).sum().backward()
    assert torch.equal(difference.grad.sign(), difference.detach().sign())


def test_losses_in_closed_form():
    difference, sigma = torch.tensor([[3.0, 4.0]]), torch.tensor([0.5])
    assert float(Loss("mse").each(difference, sigma)) == 12.5
    c = 0.00054 * 2
    assert float(Loss("pseudo_huber").each(difference, sigma)) == pytest.approx((math.sqrt(25 + c * c) - c) / 2, rel=1e-6)
    assert float(Loss("huber").each(difference, sigma)) == pytest.approx((2.5 + 3.5) / 2)
    assert float(Loss("mse").each(difference, sigma, torch.tensor([[1.0, 0.0]]))) == 4.5


@pytest.mark.parametrize("weighting", ["none", "sigma2", "inverse", "min_snr"])
def test_weights_over_sigma_are_finite_at_both_ends(weighting):
    weights = Loss(weighting=weighting).over_sigma(torch.tensor([0.0, 0.2, 0.5, 1.0]))
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    if weighting == "min_snr":  # snr(0.5) = 1 and snr(0.2) = 16
        assert weights[2] == pytest.approx(0.25) and float(weights[1]) == pytest.approx(5 / 16 * 0.04)


def test_four_micro_batches_of_one_are_one_batch_of_four():
    one, four = train(steps=8), train(steps=8, batch=1, accumulate=4)
    for name, value in one.params.items():
        assert torch.allclose(value, four.params[name], rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Pull:
    """A loss on the first weight."""

    name: str
    weight: float
    factor: float = 1.0
    start: int = 0
    stop: int = 1 << 60
    every: int = 1

    def loss(self, context):
        return self.factor * context.trainee.first.square().sum()


def with_aux(*auxiliaries) -> Trainer:
    trainer = Trainer(Toy(), Table(), config(steps=6), auxiliaries=auxiliaries)
    trainer.run()
    return trainer


def test_weight_zero_is_off_to_the_last_bit_and_order_does_not_matter():
    plain = with_aux()
    assert torch.equal(plain.params["first"], with_aux(Pull("a", 0.0), Pull("b", 0.0)).params["first"])
    one, other = Pull("a", 0.1), Pull("b", 0.3, factor=-0.5)
    pulled = with_aux(one, other).params["first"]
    assert torch.equal(pulled, with_aux(other, one).params["first"]) and not torch.equal(pulled, plain.params["first"])
    assert torch.equal(plain.params["first"], with_aux(Pull("a", 0.1, start=6)).params["first"])


def test_validation_moves_nothing():
    assert torch.equal(train(validate_every=0).params["first"], train(validate_every=3).params["first"])


def test_training_learns_the_table():
    trainer = train(steps=400, batch=12, validate_every=100)
    means = [record.mean for record in trainer.history.validations if record.weights == "weights"]
    assert means[-1] < 0.75 * means[0]


def test_orthogonal_lifts_every_direction():
    """The published coefficients end between 0.68 and 1.14; bf16 adds about 2 %."""
    matrices = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices).float())
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (32, 32), (48, 32)])
def test_tiles_come_back(shape):
    matrix = torch.randn(shape)
    tiles = square_tiles(matrix)
    assert torch.equal(joined(tiles, matrix), matrix)
    assert shape == (48, 32) or tiles.shape[1:] == (32, 32)
    if shape == (96, 32):
        assert torch.equal(tiles[1], matrix[32:64])


def test_courses_of_the_rate():
    assert [lr_factor(Optim(schedule="constant", warmup=4), step, 100) for step in (0, 1, 3, 99)] == [0.25, 0.5, 1.0, 1.0]
    ending = Optim(schedule="decay_at_end", warmup=0, decay_steps=10, floor=0.0)
    assert [lr_factor(ending, step, 100) for step in (0, 89, 90, 95, 99)] == [1.0, 1.0, 1.0, 0.5, 0.1]
    cosine = Optim(schedule="cosine", warmup=0, floor=0.1)
    assert lr_factor(cosine, 0, 100) == 1.0 and lr_factor(cosine, 50, 100) == pytest.approx(0.55)


def test_curves_of_anything_are_pictures():
    empty = History()
    constant = History(steps=[StepRecord(step, 0.5, 1.0, 1.0) for step in range(1, 5)])
    wild = History(steps=[StepRecord(step, value, 1.0, 1.0) for step, value in enumerate((1e-6, float("nan"), 1e6, float("inf")), 1)])
    wild.validations.append(ValidationRecord(4, "ema", 0.1, (0.1, 0.2), (0.25, 0.75)))
    pictures = [curve_picture(history) for history in (empty, constant, wild)] + [density_picture(Density(kind)) for kind in DENSITIES]
    for picture in pictures:
        assert picture.ndim == 4 and picture.shape[-1] == 3 and 0.0 <= picture.min() and picture.max() <= 1.0
