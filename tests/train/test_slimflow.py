"""Annealing reflow and flow-guided distillation: "SlimFlow", arXiv 2407.12718."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.tests.train.plane import Plane, Points, RingFlow, drawn, mmd, normal, paired, pairs_of, train
from rectiflow.tests.train.toy import Table, Toy, config
from rectiflow.train.dataset import LatentData
from rectiflow.train.draws import Draws
from rectiflow.train.loop import StepContext, Trainer
from rectiflow.train.losses import Loss
from rectiflow.train.targets import Point, Target, point_at
from rectiflow.train.two_step import TwoStep

FEW = 8


@pytest.fixture(scope="module")
def ring():
    """Pairs of the exact flow, held-out noises, and where the flow carries these."""
    few, noise = paired(pairs_of(RingFlow(), FEW)), normal(5, 1024)
    return few, noise, drawn(RingFlow(), noise, 200)


def test_without_fresh_noise_it_is_reflow_and_with_it_alone_a_flow_on_the_teachers_samples():
    """Equal to the last bit, step by step."""
    clean, paired_noise, sigma = torch.randn(6, 3), torch.randn(6, 3), torch.rand(6)
    draws = Draws(3, 0)

    def points(kind: str, step: int) -> Point:
        return point_at(Target(kind, anneal_steps=10), clean, paired_noise, sigma, draws, step)

    for plain_kind, step in (("reflow_pairs", 10), ("velocity", 0)):
        annealed, plain = points("annealing_reflow", step), points(plain_kind, step)
        assert torch.equal(annealed.x, plain.x) and torch.equal(annealed.velocity, plain.velocity)


def test_courses_of_beta():
    """The paper's K = 50 000 falls to 0 over 6·K steps."""
    courses = ("linear", "cosine", "exponential")
    linear, cosine, exponential = (Target("annealing_reflow", anneal_steps=300_000, annealing=kind) for kind in courses)
    assert [linear.beta(step) for step in (0, 150_000, 300_000)] == [1.0, 0.5, 0.0]
    assert [cosine.beta(step) for step in (0, 150_000, 300_000)] == pytest.approx([1.0, 0.5, 0.0])
    assert exponential.beta(300_000) == pytest.approx(math.exp(-1))


def test_with_few_pairs_annealing_draws_closer_than_reflow_from_the_start(ring):
    """Equal steps, three seeds, one Euler step against the exact flow's own end. Fresh noise is what keeps a student from learning 8 pairs
    by heart; with a thousand pairs on a plane it only costs steps (bench/results/slimflow.csv)."""
    few, noise, exact = ring
    for seed in range(3):
        found = []
        for anneal in (0, 350):
            student = Plane(64, seed + 1)
            train(student, few, Target("annealing_reflow", anneal_steps=anneal), 600, 5e-3, batch=FEW, seed=seed)
            found.append(mmd(drawn(student, noise, 1), exact))
        assert found[1] < 0.85 * found[0], (seed, found)


def test_paths_straighten_as_the_fresh_noise_goes_and_the_run_tells_it():
    target = Target("annealing_reflow", anneal_steps=300)
    trainer = train(Plane(48), paired(pairs_of(RingFlow(), 512)), target, 450, 3e-3, batch=128, validate_every=150)
    told = trainer.history.straightness
    assert [record.step for record in told] == [0, 150, 300, 450] and [record.beta for record in told] == [1.0, 0.5, 0.0, 0.0]
    relative = [record.relative for record in told[1:]]
    assert relative == sorted(relative, reverse=True) and relative[-1] < relative[0] / 2


def context(student, cond=(None,) * 4, start: int = 0, examples: int = 4) -> StepContext:
    nothing = torch.zeros(len(cond), 2)
    return StepContext(student, Point(nothing, nothing[:, 0], nothing, nothing), nothing, list(cond), 0, Draws(0, 0), start, examples)


@pytest.mark.parametrize("first_step", ["student", "flow"])
def test_the_two_step_target_is_its_formula_and_the_gradient_takes_the_single_step_alone(first_step):
    student, flow = Plane(8, 1), Plane(8, 2)
    target = Target("flow_guided_distill", first_step=first_step)
    given = context(student)
    loss = TwoStep(flow, target, Loss()).loss(given)
    noise, ones = given.normal("two_step noise"), torch.ones(4)
    sigma = 1.0 - (0.2 + 0.6 * given.uniform("two_step time"))
    v = student.velocity(noise, ones)
    first = (v if first_step == "student" else flow.velocity(noise, ones)).detach()
    middle = noise - (1 - sigma)[:, None] * first
    end = (middle - sigma[:, None] * flow.velocity(middle, sigma)).detach()
    wanted = (noise - v - end).square().mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(value, list(student.parameters())) for value in (loss, wanted))):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    assert 0.2 <= float(1 - sigma.max()) and float(1 - sigma.min()) <= 0.8


def test_on_a_straight_flow_the_student_that_is_the_flow_has_no_error():
    """Velocity constant along each line: any two steps end where one does."""

    class Straight:
        def velocity(self, x, sigma, cond):
            return (x - 3.0) / (1.0 + sigma.reshape(-1, 1))  # x_σ = 3 + (1 + σ)/2·(x1 − 3): lines from x1 to x0 = 3 + (x1 − 3)/2

    straight = Straight()
    assert float(TwoStep(straight, Target("flow_guided_distill"), Loss()).loss(context(straight))) < 1e-10


def test_micro_batches_draw_what_the_whole_batch_draws():
    student, loss = Plane(8, 1), TwoStep(Plane(8, 2), Target("flow_guided_distill"), Loss())
    parts = [loss.loss(context(student, (None,), start)).item() for start in range(4)]
    assert sum(parts) / 4 == pytest.approx(loss.loss(context(student)).item(), rel=1e-5)


class Paired(Table):
    def batch(self, rows, draws):
        plain = super().batch(rows, draws)
        return type(plain)(plain.clean, plain.cond, noise=self.latents.flip(0)[rows])


def test_weight_zero_is_one_step_distillation_to_the_last_bit():
    plain, off, on = (
        Trainer(Toy(), Paired(), config(steps=6, target=target), teacher=Toy(seed=3))
        for target in (Target("distill_onestep"), Target("flow_guided_distill", two_step_weight=0.0), Target("flow_guided_distill"))
    )
    for trainer in (plain, off, on):
        trainer.run()
    assert torch.equal(plain.params["first"], off.params["first"]) and not torch.equal(plain.params["first"], on.params["first"])


def test_with_few_pairs_the_two_step_target_brings_one_step_closer(ring):
    """To the exact end of held-out noises, against pairs alone; the flow was reflowed on many pairs and is nearly straight."""
    few, noise, exact = ring
    flow = Plane(48, 9)
    train(flow, paired(pairs_of(RingFlow(), 1024)), Target("reflow_pairs"), 600, 3e-3, batch=256)
    start = {name: value.clone() for name, value in flow.state_dict().items()}
    for seed in range(3):
        errors = {}
        for kind in ("distill_onestep", "flow_guided_distill"):
            student = Plane(48)
            student.load_state_dict(start)
            train(student, few, Target(kind), 150, 1e-3, batch=64, teacher=flow, seed=seed)
            errors[kind] = float((drawn(student, noise, 1) - exact).square().mean())
        assert errors["flow_guided_distill"] < 0.8 * errors["distill_onestep"], (seed, errors)


def test_a_student_of_guided_pairs_needs_no_guidance():
    """Pairs of v = v₀ + w·(v₁ − v₀), w = 2, v₀ of the whole ring, v₁ of one of its parts: the student ends where they do, unguided."""
    whole, part = RingFlow(), RingFlow(only=0)

    def guided(x, sigma, **extra):
        return whole(x, sigma) + 2.0 * (part(x, sigma) - whole(x, sigma))

    noise = normal(5, 1024)
    wanted = drawn(guided, noise, 200)
    student = Plane(48)
    train(student, paired(pairs_of(guided, 1024)), Target("reflow_pairs"), 400, 3e-3, batch=128)
    away = float((drawn(student, noise, 8) - wanted).square().mean())
    assert away < 0.1 * float((drawn(part, noise, 200) - wanted).square().mean())


def test_validation_of_pairs_asks_for_their_own_velocity():
    """The network that knows every pair's line has no error; against noise of no pair it would have."""
    clean, noise = torch.zeros(4, 2), normal(1, 4)

    class Lines:
        def params(self):
            return {"w": torch.nn.Parameter(torch.zeros(1))}

        def velocity(self, x, sigma, cond):
            return x / sigma[:, None]  # x = σ·z, as x0 = 0

    for kind, sigmas in (("reflow_pairs", 8), ("distill_onestep", 1)):
        trainer = Trainer(Lines(), Points(clean, noise), config(target=Target(kind)))
        trainer.validate()
        assert trainer.history.validations[0].bins == pytest.approx((0.0,) * sigmas, abs=1e-10)


def test_flipped_pairs_are_pairs():
    latents, noise = torch.arange(32.0).view(8, 1, 2, 2), -torch.arange(32.0).view(8, 1, 2, 2)
    batch = LatentData(latents, 1, noise, flip=True).batch(torch.arange(8), Draws(0, 0))
    assert torch.equal(batch.noise, -batch.clean)
    mirrored = [torch.equal(row, latent.flip(-1)) for row, latent in zip(batch.clean, latents)]
    assert any(mirrored) and not all(mirrored)
    assert torch.equal(LatentData(latents, 1, noise).batch(torch.arange(8), Draws(0, 0)).clean, latents)


@pytest.mark.parametrize("wrong", [{"t_min": 0.0}, {"t_min": 0.9}, {"t_max": 1.0}, {"two_step_weight": -1.0}, {"first_step": "both"}])
def test_targets_refuse(wrong):
    with pytest.raises(NodeInputError):
        Target("flow_guided_distill", **wrong)


def test_a_flow_is_asked_for():
    with pytest.raises(NodeInputError, match="teacher"):
        Trainer(Toy(), Paired(), config(target=Target("flow_guided_distill")))
