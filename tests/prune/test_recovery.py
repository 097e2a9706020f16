"""Recovery: the teacher that shares the student's network, masked features, what learns, resuming, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rectiflow.accel.prune.apply import apply_plan, plan_of, stack_under
from rectiflow.accel.prune.compact import compact_model
from rectiflow.accel.prune.identity import model_hash
from rectiflow.accel.prune.select import plan_without
from rectiflow.accel.prune.width import WidthCut, WidthScores, groups_of, kept_units, magnitude, mask_model, width_plan
from rectiflow.errors import NodeInputError
from rectiflow.host import CFGGuider, sampler_object
from rectiflow.nodes.pairs import RectiflowFlowPairGenerator
from rectiflow.nodes.pruning import RectiflowRecoverPruned, host_services, run_folder
from rectiflow.samplers.pairs import FlowPairs
from rectiflow.tests.accel.region_toys import conditioning, toy
from rectiflow.train.features import masked_distance
from rectiflow.train.pool import Calibration, inside, sample_pool
from rectiflow.train.prune_scores import velocity_error
from rectiflow.train.recovery import RecoverSettings, changed_blocks, matched_places, recover

STEPS = 4


@pytest.fixture(scope="module")
def case():
    """A toy Flux with a plan that leaves out two blocks of four, and what it is shown."""
    model = toy("flux")
    stack = stack_under(model, "test")
    plan = plan_without((stack.at("double_blocks.1"), stack.at("single_blocks.0")), stack, model_hash(model), "test")
    shown = Calibration(conditioning(5), conditioning(9), (16, 6, 8), count=4, steps=3)
    return model, apply_plan(model, plan, "test"), shown


@pytest.fixture(scope="module", params=["masked", "narrow", "narrow and shorter"])
def narrow_case(request, case):
    """The toy Flux without a third of its heads and neurons, shown by masks or cut, with every block or without two."""
    model, shorter, shown = case
    model = shorter if "shorter" in request.param else model
    groups = groups_of(model, "test")
    scores = WidthScores("Flux", model_hash(model), "magnitude", magnitude(model, groups))
    plan = width_plan(model, kept_units(groups, scores, WidthCut(0.33, "local", align=1), model), groups, "test")
    if request.param == "masked":
        return case[0], mask_model(model, plan, host_services().before_run, "test"), shown
    return case[0], compact_model(model, plan, "test"), shown


def run(case, tmp_path=None, teacher=None, **changed):
    model, pruned, shown = case
    settings = RecoverSettings(**{"steps": STEPS, "batch": 2, "rank": 4, "lr": 3e-3, "ema": 0.0, **changed})
    return recover(pruned, teacher or model, settings, shown, tmp_path, host_services())


@pytest.mark.parametrize("learns", ["lora", "changed_blocks", "all", "biases"])
def test_a_few_steps_bring_the_student_nearer(case, learns):
    model, pruned, shown = case
    done = run(case, learns=learns, steps=12, data="mixed" if learns == "lora" else "teacher_x0")
    before, after = done.report["before"]["velocity_error"], done.report["after"]["velocity_error"]
    assert after < 0.98 * before
    assert velocity_error(done.model, model, shown, CFGGuider, 16) == pytest.approx(after, rel=1e-4)
    assert velocity_error(pruned, model, shown, CFGGuider, 16) == pytest.approx(before, rel=1e-4), "the pruned model itself is not changed"
    assert plan_of(done.model) is plan_of(pruned)
    assert not [name for name in done.lora if "double_blocks.1." in name or "single_blocks.0." in name]
    assert len(done.losses) == 12 and done.picture.ndim == 4


@pytest.mark.parametrize("learns, lr", [("lora", 3e-3), ("all", 1e-3)])
def test_narrow_models_learn_as_masks_show_them(narrow_case, learns, lr):
    model, narrow, shown = narrow_case
    before = velocity_error(narrow, model, shown, CFGGuider, 16)
    done = run(narrow_case, learns=learns, lr=lr, steps=8)
    assert done.report["before"]["velocity_error"] == pytest.approx(before, rel=1e-4)
    assert done.report["after"]["velocity_error"] < 0.98 * before
    # What was learnt at full width lies on the narrow layers: the model that is handed out is the one that was measured.
    assert velocity_error(done.model, model, shown, CFGGuider, 16) == pytest.approx(done.report["after"]["velocity_error"], rel=1e-4)
    assert velocity_error(narrow, model, shown, CFGGuider, 16) == pytest.approx(before, rel=1e-4), "the narrow model itself is not changed"
    assert plan_of(done.model) is plan_of(narrow) and done.model.model_size() == narrow.model_size()


def test_a_narrow_model_and_a_teacher_of_its_own_weights(narrow_case):
    shared, apart = run(narrow_case), run(narrow_case, teacher=toy("flux"))
    assert shared.losses == pytest.approx(apart.losses, rel=1e-5)


def test_a_narrow_model_stopped_and_resumed_is_the_whole_run(narrow_case, tmp_path):
    whole, left = run(narrow_case, tmp_path / "whole"), iter([None] * 3)
    model, narrow, shown = narrow_case
    settings = RecoverSettings(steps=STEPS, batch=2, rank=4, lr=3e-3, ema=0.0)

    def interrupt():
        if next(left, True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(narrow, model, settings, shown, tmp_path / "part", dataclasses.replace(host_services(), interrupt=interrupt))
    resumed = run(narrow_case, tmp_path / "part")
    assert resumed.losses == whole.losses and all(torch.equal(resumed.lora[name], whole.lora[name]) for name in whole.lora)


def test_a_teacher_of_its_own_weights_teaches_the_same(case):
    """The same model loaded a second time gives the same training as the one that shares the network."""
    shared, apart = run(case), run(case, teacher=toy("flux"))
    assert shared.losses == pytest.approx(apart.losses, rel=1e-5)
    assert shared.report["after"]["velocity_error"] == pytest.approx(apart.report["after"]["velocity_error"], rel=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_pairs_stand_for_the_pool(cfg, case, host):
    """Drawn again from their seeds by the steps and the guidance in their header they are the pictures; then they teach."""
    model, pruned, shown = case
    sampled = RectiflowFlowPairGenerator().execute(
        model=model, positive=shown.positive, negative=shown.negative, cfg=cfg, sampler=sampler_object("euler"), path="pairs", count=4,
        sigmas=torch.linspace(1, 0, 4), latent={"samples": torch.zeros(1, 16, 6, 8)}, seed=3, batch=4,
    )[0]  # fmt: skip
    pool = Calibration.from_pairs(model, shown.positive, shown.negative, sampled, "test")
    found = []
    inside(CFGGuider, model, pool, lambda trainee: found.append(sample_pool(trainee, pool)))
    assert torch.allclose(found[0], sampled.clean, atol=1e-4)  # rounding: the sampler scales by sigma on its way to the velocity
    done = run((model, pruned, pool), steps=12)
    assert done.report["after"]["velocity_error"] < 0.98 * done.report["before"]["velocity_error"]
    with pytest.raises(NodeInputError, match="one prompt"):
        Calibration.from_pairs(model, shown.positive * 2, None, sampled, "test")


def test_pairs_of_another_latent_space_are_refused_before_anything_runs(case, host):
    """Before the folder of the run is made: the name stays free."""
    model, pruned, shown = case
    facts = {"conditioning": "", "cfg": "1.0", "sampler": "euler", "sigmas": "[1.0, 0.0]"}
    other = FlowPairs(torch.zeros(2, 4, 6, 8), torch.arange(2), facts)
    given = {"student": pruned, "teacher": model, "positive": shown.positive, "latent": None, "name": "foreign pairs", "seed": 0}
    with pytest.raises(NodeInputError, match="Recover Pruned: input 'pairs' got '4 channels'; allowed: pairs of 16 channels.*Flow Pair"):
        RectiflowRecoverPruned().execute(pairs=other, **given)
    assert not run_folder("foreign pairs", "test").exists()


def test_recomputing_blocks_changes_nothing(case):
    assert run(case, checkpointing=True).losses == pytest.approx(run(case).losses, rel=1e-5)


def test_stopped_at_every_step_and_resumed_is_the_whole_run(case, tmp_path):
    """Interrupted after each of its steps and run again under the same name: bit-identical to the run that was not."""
    whole = run(case, tmp_path / "whole", ema=0.9)
    services = host_services()
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) % 2 == 0 and len(calls) < 2 * STEPS:
            raise KeyboardInterrupt

    model, pruned, shown = case
    settings = RecoverSettings(steps=STEPS, batch=2, rank=4, lr=3e-3, ema=0.9)
    stopping = dataclasses.replace(services, interrupt=interrupt)
    for done in range(1, STEPS):
        with pytest.raises(KeyboardInterrupt):
            recover(pruned, model, settings, shown, tmp_path / "part", stopping)
        assert (tmp_path / "part" / f"step-{done:06d}.safetensors").is_file(), "what was done is kept"
    resumed = recover(pruned, model, settings, shown, tmp_path / "part", stopping)
    assert resumed.lora.keys() == whole.lora.keys() and resumed.losses == whole.losses
    assert all(torch.equal(resumed.lora[name], whole.lora[name]) for name in whole.lora)


def test_another_plan_under_the_same_name_is_refused(case, tmp_path):
    run(case, tmp_path / "run", steps=1)
    model, _, shown = case
    stack = stack_under(model, "test")
    other = apply_plan(model, plan_without((stack.at("double_blocks.1"),), stack, model_hash(model), "test"), "test")
    with pytest.raises(NodeInputError, match="another name"):
        recover(other, model, RecoverSettings(steps=2), shown, tmp_path / "run", host_services())


def test_students_without_a_plan_and_other_teachers_are_refused(case):
    model, pruned, shown = case
    with pytest.raises(NodeInputError, match="Apply a plan first"):
        recover(model, model, RecoverSettings(), shown, None, host_services())
    with pytest.raises(NodeInputError, match="for this model"):
        recover(pruned, toy("sd3"), RecoverSettings(), shown, None, host_services())


def test_one_huge_activation_does_not_move_the_masked_distance():
    generator = torch.Generator().manual_seed(0)
    wanted, given = torch.randn(2, 64, 32, generator=generator), torch.randn(2, 64, 32, generator=generator)
    hit = wanted.clone()
    hit[0, 3, 4] = 500.0
    assert abs(float(masked_distance(given, hit, 2.0) / masked_distance(given, wanted, 2.0)) - 1.0) < 0.01
    assert abs(float(masked_distance(given, hit, 0.0) / masked_distance(given, wanted, 0.0)) - 1.0) > 0.3
    assert float(masked_distance(wanted, wanted, 2.0)) == 0.0


def test_places_follow_from_the_plan(case):
    _, pruned, _ = case
    stack = stack_under(pruned, "test")
    assert matched_places(plan_of(pruned), stack) == ("double_blocks.1", "single_blocks.0")
    assert changed_blocks(plan_of(pruned), stack) == ("double_blocks.0", "single_blocks.1")
