"""Plans as JSON and on MODELs of three families: the same answer as a network without the blocks, nothing left behind."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from rectiflow.accel.prune.apply import SkipBlock, apply_plan, bytes_of, plan_of, stack_under, without_plan
from rectiflow.accel.prune.gates import gate_blocks, own
from rectiflow.accel.prune.identity import NETWORK, model_hash, original_module
from rectiflow.accel.prune.plan import PrunePlan, Run, plan_from_json
from rectiflow.accel.prune.select import how_many, least_important, pattern, plan_without, protected
from rectiflow.errors import NodeInputError
from rectiflow.tests.accel.region_toys import FAMILIES, noise, sample, toy, with_ras

REMOVED = {
    "flux": ("double_blocks.1", "single_blocks.0"), "sd3": ("joint_blocks.1", "joint_blocks.2"), "lumina2": ("layers.1", "layers.3"),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """(family, MODEL, its stack, a plan that leaves out two blocks)."""
    model = toy(request.param)
    stack = stack_under(model, "test")
    gone = tuple(stack.at(path) for path in REMOVED[request.param])
    return request.param, model, stack, plan_without(gone, stack, model_hash(model), "test")


def built_without(family, plan):
    """Another network of the family that has only the kept blocks, in order."""
    shorter = toy(family)
    network = shorter.model.diffusion_model
    for holder, kept in plan.kept.items():
        blocks = getattr(network, holder)
        setattr(network, holder, torch.nn.ModuleList(blocks[index] for index in kept))
    return shorter


def test_skipping_equals_a_network_built_without_the_blocks(case):
    family, model, _, plan = case
    skipped = sample(apply_plan(model, plan, "test"), noise(), steps=3)
    assert torch.allclose(skipped, sample(built_without(family, plan), noise(), steps=3), atol=1e-6)
    assert not torch.allclose(skipped, sample(model, noise(), steps=3), atol=1e-3)


def test_regions_complete_the_keys_of_the_blocks_that_are_left(case):
    """Region-adaptive sampling on a pruned model is that on a network built without the blocks, and computes as many tokens in part."""
    family, model, _, plan = case
    on_plan, log = with_ras(apply_plan(model, plan, "test"))
    on_shorter, other = with_ras(built_without(family, plan))
    assert torch.allclose(sample(on_plan, noise()), sample(on_shorter, noise()), atol=1e-5)
    phases = [visit.phase for visit in log.last.visits]
    assert phases == [visit.phase for visit in other.last.visits] and "active" in phases
    assert any("blocks were left out" in note for note in log.last.notes)


def test_a_run_with_and_without_the_plan_in_turn_leaves_nothing(case):
    _, model, _, plan = case
    pruned = apply_plan(model, plan, "test")
    whole, short = sample(model, noise(), steps=2), sample(pruned, noise(), steps=2)
    for _ in range(10):
        assert torch.equal(sample(model, noise(), steps=2), whole)
        assert torch.equal(sample(pruned, noise(), steps=2), short)
    model.detach()
    assert not any(isinstance(module, SkipBlock) for module in model.model.modules())
    assert model_hash(model) == plan.model


def test_the_hash_is_of_the_loaded_weights_while_a_plan_lies_on_the_network(case):
    _, model, _, plan = case
    pruned = apply_plan(model, plan, "test")
    pruned.patch_model()
    try:
        assert model_hash(model) == model_hash(pruned) == plan.model
    finally:
        pruned.unpatch_model()


def test_size_identity_and_copies(case):
    _, model, stack, plan = case
    pruned = apply_plan(model, plan, "test")
    removed = sum(bytes_of(original_module(model, block.path)) for block in plan.removed(stack))
    assert pruned.model_size() == pruned.clone().model_size() == model.model_size() - removed
    assert pruned.patches_uuid != model.patches_uuid
    skip = pruned.object_patches[NETWORK + plan.removed(stack)[0].path]
    assert copy.deepcopy(skip) is skip and plan_of(pruned.clone()) is plan and plan_of(model) is None
    assert without_plan(pruned, plan, "test").model_size() == model.model_size()


def test_a_lora_stays_with_its_blocks(case):
    """Patches of kept blocks act, patches of removed ones do nothing, in either order of the nodes."""
    _, model, stack, plan = case
    gone = plan.removed(stack)[0].path
    kept = next(block.path for block in stack.blocks if block not in plan.removed(stack))
    model.detach()
    matrices = [name for name, value in model.model.named_parameters() if value.ndim == 2]
    names = {path: next(name for name in matrices if f".{path}." in name) for path in (gone, kept)}

    def lora(to, path):
        model.detach()  # a host takes patches for weights that lie on the network at that moment
        patched = to.clone()
        weight = dict(model.model.named_parameters())[names[path]]
        assert patched.add_patches({names[path]: ("diff", (torch.full(weight.shape, 0.05),))})
        return patched

    pruned = apply_plan(model, plan, "test")
    plain = sample(pruned, noise(), steps=2)
    assert torch.equal(sample(apply_plan(lora(model, gone), plan, "test"), noise(), steps=2), plain)
    before = sample(apply_plan(lora(model, kept), plan, "test"), noise(), steps=2)
    behind = sample(lora(pruned, kept), noise(), steps=2)
    assert torch.equal(before, behind) and not torch.allclose(before, plain, atol=1e-4)


def test_gates_that_only_look_change_no_bit(case):
    _, model, stack, _ = case
    seen = []

    def look(block, state, run):
        seen.append(block.path)
        return own(run())

    gated = gate_blocks(model, stack.blocks, look)
    assert torch.equal(sample(gated, noise(), steps=1, cfg=1.0), sample(model, noise(), steps=1, cfg=1.0))
    assert seen == [block.path for block in stack.blocks]


def test_plans_go_through_json(case):
    _, _, stack, plan = case
    assert plan_from_json(plan.to_json(), "test") == plan
    rich = PrunePlan(
        plan.family, plan.model, plan.counts, {}, (Run(stack.blocks[0].holder, 0, 1),), {stack.blocks[0].path: "file"},
        {stack.blocks[0].path: {"heads": (0,), "ffn": (1, 4)}}, "runs", {stack.blocks[0].path: 0.5}, {"steps": 3},
    )  # fmt: skip
    assert plan_from_json(rich.to_json(), "test") == rich
    assert [block.index for block in rich.removed(stack)] == [1]


def test_another_model_and_a_second_plan_are_refused(case):
    family, model, _, plan = case
    other = toy("sd3" if family == "flux" else "flux")
    with pytest.raises(NodeInputError, match="for this model"):
        apply_plan(other, plan, "test")
    changed = toy(family)
    next(changed.model.diffusion_model.parameters()).data[0] += 1.0
    with pytest.raises(NodeInputError, match="for this model"):
        apply_plan(changed, plan, "test")
    with pytest.raises(NodeInputError, match="without one"):
        apply_plan(apply_plan(model, plan, "test"), plan, "test")


def test_the_last_block_of_sd3_stays():
    model = toy("sd3")
    stack = stack_under(model, "test")
    with pytest.raises(NodeInputError, match="hands no text on"):
        apply_plan(model, plan_without(stack.blocks[-1:], stack, model_hash(model), "test"), "test")
    assert stack.blocks[-1].path in protected("", stack, "test")


BASE = {"version": 1, "family": "Flux", "model": "0" * 16, "counts": {"double_blocks": 3, "single_blocks": 4}, "kept": {}}
BROKEN = [
    "", "[]", "null", "{", "7", '"text"', "[" * 100_000, json.dumps({**BASE, "version": 2}), json.dumps({**BASE, "version": True}) + "x",
    *(json.dumps({**BASE, **change}) for change in (
        {"kept": {"double_blocks": [3]}}, {"kept": {"double_blocks": [-1]}}, {"kept": {"double_blocks": [1, 0]}}, {"kept": {"other": [0]}},
        {"kept": {"double_blocks": [0.0]}}, {"kept": {"double_blocks": [True]}}, {"kept": {"double_blocks": [], "single_blocks": []}},
        {"kept": []}, {"counts": {"double_blocks": 0}}, {"counts": {"double_blocks": 1 << 40}}, {"counts": None},
        {"runs": [{"holder": "double_blocks", "first": 1, "last": 1}]}, {"runs": [{"holder": "double_blocks", "first": 0, "last": 3}]},
        {"runs": [{"holder": "single_blocks", "first": 0, "last": 2}, {"holder": "single_blocks", "first": 2, "last": 3}]},
        {"runs": [{"holder": "double_blocks", "first": 0, "last": 1}], "kept": {"double_blocks": [1, 2]}},
        {"students": {"double_blocks.0": "x"}}, {"width": {"double_blocks.0": {"heads": [1 << 30]}}}, {"width": {"double_blocks.9": {}}},
        {"width": {"double_blocks.0": {"biases": [0]}}}, {"scores": {"double_blocks.0": "high"}},
        {"scores": {"double_blocks.0": float("nan")}},
    )),
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_plan_is_refused_with_a_remedy(text):
    with pytest.raises(NodeInputError, match="Make the plan with a pruning node"):
        plan_from_json(text, "Apply Prune Plan")


def test_patterns_and_scores_choose_what_they_say():
    stack = stack_under(toy("flux"), "test")  # double 0-1, single 0-1
    names = [block.name for block in stack.blocks]
    keep = protected("0, single:-1", stack, "test")
    assert keep == {"double_blocks.0", "single_blocks.1"}
    scores = {block.path: score for block, score in zip(stack.blocks, (0.0, 3.0, 2.0, 1.0))}
    assert [block.name for block in least_important(scores, stack, 2, frozenset())] == ["double:0", "single:1"]
    assert [block.name for block in least_important(scores, stack, 2, keep)] == ["single:0", "double:1"]
    assert [block.name for block in pattern("even", stack, 2, frozenset())] == [names[1], names[3]]
    assert set(pattern("random", stack, 2, keep, 3)) == {stack.blocks[1], stack.blocks[2]}
    assert [block.name for block in pattern("ends", stack, 1, frozenset())] == [names[2]]
    assert how_many(0.5, stack, frozenset(), "test") == 2
    for share in (0.0, 0.1, 0.9):
        with pytest.raises(NodeInputError):
            how_many(share, stack, keep, "test")
    for text in ("9", "double:2", "single:-3", "first"):
        with pytest.raises(NodeInputError, match="protect"):
            protected(text, stack, "test")
