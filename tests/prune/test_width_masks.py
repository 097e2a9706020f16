"""Learned masks: the hard concrete's moments, the gradient of a whole run, memory, planted neurons, resuming, refusals."""

from __future__ import annotations

import dataclasses
import math
import weakref

import pytest
import torch
from rectiflow.accel.prune.ecodiff import DELTA, GAMMA, TAU, ZETA, LearnedMasks, hard_concrete, penalty
from rectiflow.accel.prune.width import WidthCut, WidthScores, groups_of, kept_units, magnitude, mask_model, put_masks_on, width_plan
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.patcher_extension import CallbacksMP
from rectiflow.nodes.pruning import host_services
from rectiflow.tests.accel.region_toys import conditioning, toy
from rectiflow.train.draws import Draws
from rectiflow.train.pool import Calibration, inside
from rectiflow.train.rollout import rollout_gradient, single_step_gradient
from rectiflow.train.width_masks import MaskSettings, _Flow, _Learner, learn_masks, score_width
from torch.utils._python_dispatch import TorchDispatchMode

BEFORE = CallbacksMP.ON_PRE_RUN
SHOWN = Calibration(conditioning(5), conditioning(9), (16, 6, 8), count=2, steps=3)


# The hard concrete


def test_moments_of_the_hard_concrete():
    """δ = 0, λ = 3: mean over 10⁵ draws against ∫ P(m > x) dx = ∫ σ(λ − τ·logit((x − γ)/(ζ − γ))) dx, and P(m = 0), to 1 %."""
    lam = torch.tensor(3.0, dtype=torch.float64)
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = hard_concrete(lam, u, delta=0.0)
    x = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    closed = torch.sigmoid(lam - TAU * torch.logit((x - GAMMA) / (ZETA - GAMMA))).mean()
    assert float(m.mean()) == pytest.approx(float(closed), rel=0.01)
    chance = 1.0 / (1.0 + math.exp(3.0 - TAU * math.log(0.1 / 1.1)))
    assert float(penalty(lam, "l0")) == pytest.approx(1.0 - chance, rel=1e-6)
    rare = hard_concrete(torch.tensor(-1.0), u.float(), delta=0.0)  # at λ = 3 only 670 of the draws are 0, too few for 1 %
    often = 1.0 / (1.0 + math.exp(-1.0 - TAU * math.log(0.1 / 1.1)))
    assert float((rare == 0).float().mean()) == pytest.approx(often, rel=0.01)
    assert float((m == 0).double().mean()) == pytest.approx(chance, rel=0.1)


def test_delta_damps_the_noise_and_masks_begin_open():
    u = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    spread = [float(hard_concrete(torch.tensor(0.0), u, delta).std()) for delta in (0.0, 0.1, 0.5)]
    assert spread == sorted(spread, reverse=True)
    assert float(hard_concrete(torch.tensor(3.0), u, DELTA).mean()) > 0.95
    assert penalty(torch.tensor([3.0, 0.0, -3.0]), "l1_sigmoid").tolist() == pytest.approx([0.9002, 0.7311, 0.4502], abs=1e-4)


def test_the_penalty_is_a_mean_over_units_then_layers_and_added():
    groups = groups_of(toy("flux"), "test")
    learned = LearnedMasks(groups)
    one = float(penalty(torch.tensor(3.0), "l0"))
    assert float(learned.penalty("l0").detach()) == pytest.approx(2.0 * one)
    only = LearnedMasks(tuple(group for group in groups if group.is_heads))
    assert float(only.penalty("l0").detach()) == pytest.approx(one)


# The gradient of a whole run


def with_flow(cfg: float, steps: int, body) -> None:
    """body(flow, learner, masks drawn for its groups) inside a run of a toy."""
    model = toy("flux")
    groups = groups_of(model, "test")
    patcher, masks = put_masks_on(model, groups, BEFORE)
    learner = _Learner(LearnedMasks(groups), masks)

    def run(trainee) -> None:
        draws = Draws(0, 0)
        u = {group.key: draws.uniform(group.name, (group.count,)) for group in groups}
        body(_Flow(trainee, torch.linspace(1.0, 0.0, steps + 1), cfg), learner, learner.learned.drawn(u, DELTA))

    inside(host_services().guider, patcher, SHOWN, run, learner, {})


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_the_gradient_step_by_step_is_that_of_the_whole_graph(cfg):
    """T = 4: relative to the largest number of all gradients 1e-5, float32; ∂λ by the same chain rule from ∂m."""

    def body(flow, learner, values) -> None:
        start = Draws(1, 0).normal("start", (1, 16, 6, 8))
        wanted, step = flow.path(start, [0])[-1], flow.step([0])
        leaves = {key: value.detach().requires_grad_() for key, value in values.items()}
        with learner.holding(leaves):
            loss = rollout_gradient(step, start, 4, wanted, list(leaves.values()))
        stepwise = [leaf.grad for leaf in leaves.values()]
        again = {key: value.detach().requires_grad_() for key, value in values.items()}
        with learner.holding(again):
            x = start
            for index in range(4):
                x = step(x, index)
            whole = (x - wanted).square().mean()
            whole.backward()
        assert loss == pytest.approx(float(whole.detach()), rel=1e-6) and loss > 0
        largest = max(float(leaf.grad.abs().max()) for leaf in again.values())
        errors = [float((mine - leaf.grad).abs().max()) for mine, leaf in zip(stepwise, again.values())]
        assert max(errors) <= 1e-5 * largest
        assert all(mask.value is None for mask in learner.masks.values())

    with_flow(cfg, 4, body)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation made and that still lives; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key)


def test_memory_does_not_grow_with_the_steps():
    """Peak of tensors made during one gradient: 16 steps at most 1.2 × 4 steps; the graph of the whole run grows with them."""
    peaks = {}

    def measured(steps: int, whole: bool) -> int:
        def body(flow, learner, values) -> None:
            start = Draws(1, 0).normal("start", (1, 16, 6, 8))
            leaves = {key: value.detach().requires_grad_() for key, value in values.items()}
            step = flow.step([0])
            with learner.holding(leaves), LiveBytes() as live:
                if whole:
                    x = start
                    for index in range(steps):
                        x = step(x, index)
                    x.square().mean().backward()
                else:
                    rollout_gradient(step, start, steps, torch.zeros_like(start), list(leaves.values()))
            peaks[steps, whole] = live.peak

        with_flow(1.0, steps, body)
        return peaks[steps, whole]

    assert measured(16, False) <= 1.2 * measured(4, False)
    assert measured(16, True) > 3.0 * measured(4, True), "the counter sees what a graph keeps"


def test_the_loss_of_single_steps_is_zero_at_open_masks_and_has_its_gradient():
    """The per-step loss against finite differences of one mask value, 1 % (float32 with a step of 1e-2)."""

    def body(flow, learner, values) -> None:
        path, step = flow.path(Draws(1, 0).normal("start", (1, 16, 6, 8)), [0]), flow.step([0])
        ones = {key: torch.ones_like(value).requires_grad_() for key, value in values.items()}
        with learner.holding(ones):
            assert single_step_gradient(step, path, flow.widths, list(ones.values())) < 1e-9
        key = ("double_blocks.0", "ffn")

        def loss(value: float, leaf: bool = False):
            masks = {name: torch.full_like(one, 0.9) for name, one in ones.items()}
            masks[key][:] = value
            masks[key].requires_grad_(leaf)
            with learner.holding(masks):
                found = single_step_gradient(step, path, flow.widths, [masks[key].requires_grad_()])
            return found, masks[key].grad

        slope = (loss(0.71)[0] - loss(0.69)[0]) / 0.02
        assert float(loss(0.7)[1].sum()) == pytest.approx(slope, rel=1e-2)

    with_flow(1.0, 3, body)


# Learning


def run(model, *, sigmas=None, folder=None, services=None, **changed):
    settings = MaskSettings(**{"iterations": 3, "accumulate": 1, "batch": 1, **changed})
    sigmas = torch.linspace(1.0, 0.0, 4) if sigmas is None else sigmas
    return learn_masks(model, settings, SHOWN, sigmas, folder, services or host_services(), "Width Mask Learn")


@pytest.fixture(scope="module")
def model():
    return toy("flux")


def test_planted_dead_neurons_are_all_found():
    """A fifth of each layer's neurons put out nothing: all of them are among the fifth that goes."""
    model = toy("flux")
    planted = {}
    for group in groups_of(model, "test"):
        if group.is_heads:
            continue
        dead = torch.randperm(group.count, generator=torch.Generator().manual_seed(len(planted)))[: round(0.2 * group.count)]
        planted[group.key] = set(dead.tolist())
        for span in group.columns:
            model.model.diffusion_model.get_submodule(span.layer).weight.data[:, span.start + dead] = 0.0
    done = run(model, iterations=40, targets="ffn", lr_ffn=0.3, beta=0.1)
    groups = tuple(group for group in groups_of(model, "test") if not group.is_heads)
    share = sum(map(len, planted.values())) / sum(group.count for group in groups)  # 26 of 128
    for scope in ("local", "global"):
        kept = kept_units(groups, done.scores, WidthCut(share, scope, 1, 0), model)
        assert not any(planted[group.key] & set(kept[group.key]) for group in groups), scope
    assert done.report["final_latent_error_at"]["0.1"] < 1e-9, "what is left out first does nothing"


def test_learning_leaves_the_model_alone_and_depends_on_the_seed(model):
    from rectiflow.tests.accel.region_toys import noise, sample

    before = sample(model, noise(), steps=1)
    first, again, other = run(model), run(model), run(model, seed=1)
    assert all(torch.equal(first.scores.values[key], again.scores.values[key]) for key in first.scores.values)
    assert any(not torch.equal(first.scores.values[key], other.scores.values[key]) for key in first.scores.values)
    assert torch.equal(sample(model, noise(), steps=1), before)
    assert not any(getattr(module, "weight_function", None) for module in model.model.modules())
    assert len(first.losses) == 3 and first.report["units"] == sum(map(len, first.scores.values.values()))


@pytest.mark.parametrize("objective", ["end_to_end", "per_step"])
def test_stopped_and_resumed_is_the_whole_run(model, tmp_path, objective):
    whole = run(model, folder=tmp_path / "whole", objective=objective, iterations=4)
    services, calls = host_services(), []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, folder=tmp_path / "part", objective=objective, iterations=4, services=dataclasses.replace(services, interrupt=interrupt))
    assert (tmp_path / "part" / "step-000002.safetensors").is_file()
    resumed = run(model, folder=tmp_path / "part", objective=objective, iterations=4)
    assert all(torch.equal(resumed.scores.values[key], value) for key, value in whole.scores.values.items())
    with pytest.raises(NodeInputError, match="another name"):
        run(model, folder=tmp_path / "part", objective="per_step" if objective == "end_to_end" else "end_to_end", iterations=5)


def test_recomputing_blocks_changes_nothing_and_groups_can_be_chosen(model):
    plain, again = run(model, include="double"), run(model, include="double", checkpointing=True)
    assert set(plain.scores.values) == {g.key for g in groups_of(model, "test") if "double" in g.path}
    assert plain.losses == pytest.approx(again.losses, rel=1e-5)
    heads = run(model, targets="heads", exclude="single", beta=0.0, stop_at=0.0)
    assert {kind for _, kind in heads.scores.values} == {"heads"}


def test_it_stops_at_a_share(model):
    done = run(model, iterations=60, lr_ffn=2.0, lr_heads=2.0, beta=10.0, stop_at=0.05)
    assert done.report["steps"] < 60 and done.report["share_below_0"] >= 0.05 and "stopped" in done.report["notes"][-1]


@pytest.mark.parametrize("method", ["magnitude", "taylor", "activation", "random"])
def test_other_numbers_are_of_every_unit(model, method):
    scores = score_width(model, method, SHOWN, 4, host_services(), "test")
    groups = groups_of(model, "test")
    assert {key: len(value) for key, value in scores.values.items()} == {group.key: group.count for group in groups}
    assert all(bool((value >= 0).all() and value.isfinite().all()) for value in scores.values.values())
    if method == "magnitude":
        wanted = magnitude(model, groups)
        assert all(torch.equal(value, wanted[key]) for key, value in scores.values.items())
    else:
        assert all(float(value.std()) > 0 for value in scores.values.values() if len(value) > 2)


def test_taylor_and_activation_of_a_dead_neuron_are_zero():
    model = toy("flux")
    model.model.diffusion_model.get_submodule("double_blocks.0.img_mlp.2").weight.data[:, 7] = 0.0
    for method in ("taylor", "activation"):
        found = score_width(model, method, SHOWN, 4, host_services(), "test").values["double_blocks.0", "ffn"]
        assert float(found[7]) == 0.0 and float(found.sort().values[1]) > 0.0


def test_what_cannot_be_learnt_is_refused(model):
    for sigmas in ([1.0], [], [0.0, 1.0], [1.0, float("nan")], [1.0, 0.5, 0.5], [2.0, 0.0]):
        with pytest.raises(NodeInputError, match="sigmas"):
            run(model, sigmas=torch.tensor(sigmas))
    for changed in ({"include": "["}, {"include": "nothing is named so"}, {"exclude": "."}):
        with pytest.raises(NodeInputError, match="include|exclude|targets"):
            run(model, **changed)
    groups = groups_of(model, "test")
    plan = width_plan(model, {groups[1].key: (0,)}, groups, "test")
    with pytest.raises(NodeInputError, match="full width"):
        run(mask_model(model, plan, BEFORE, "test"))
    broken = toy("flux")
    broken.model.diffusion_model.img_in.weight.data[0, 0] = float("nan")
    with pytest.raises(NodeInputError, match="finite"):
        run(broken)
    assert WidthScores("", "", "", {}).facts == {}
