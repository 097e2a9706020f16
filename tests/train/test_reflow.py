"""Reflow on a plane with the project's own trainer, pairs and straightness: "Flow Straight and Fast", arXiv 2209.03003."""

from __future__ import annotations

from rectiflow.tests.train.plane import Plane, Points, bend, drawn, eight_gaussians, normal, paired, pairs_of, sliced_wasserstein, train
from rectiflow.train.targets import Target


def judged(model: Plane) -> tuple[float, float, float]:
    """S, and the distance to the data after one Euler step and after a hundred."""
    noise, truth = normal(5), eight_gaussians(len(normal(5)), 6)
    one, many = (sliced_wasserstein(drawn(model, noise, steps), truth) for steps in (1, 100))
    return bend(model, noise), one, many


def test_reflow_straightens_a_flow_and_keeps_what_it_draws():
    """S and the error of one step fall at least threefold; a hundred steps err at most 20 % more, as the paper's page asks."""
    model = Plane()
    train(model, Points(eight_gaussians(16384, 1)), Target("velocity"), 500, 4e-3, batch=256)
    bent = judged(model)
    train(model, paired(pairs_of(model)), Target("reflow_pairs"), 400, 3e-3, batch=256)
    straight = judged(model)
    assert straight[0] < bent[0] / 3 and straight[1] < bent[1] / 3
    assert straight[2] < 1.2 * bent[2]
