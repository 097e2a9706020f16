"""Students of runs: how they begin, that nothing flows between them, files, switching at run time, resuming, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rectiflow.accel.prune.apply import apply_plan, bytes_of, plan_of, stack_under
from rectiflow.accel.prune.gates import StandIn, gate_blocks, own
from rectiflow.accel.prune.identity import model_hash, original_module
from rectiflow.accel.prune.plan import PrunePlan, Run
from rectiflow.accel.prune.students import INITS, STUDENTS_FILE, active_plan, apply_runs, new_student, read_students
from rectiflow.errors import NodeInputError
from rectiflow.host import CFGGuider
from rectiflow.host.embedded import sd
from rectiflow.nodes.pruning import host_services
from rectiflow.tests.accel.region_toys import conditioning, noise, sample, toy
from rectiflow.tests.models import small_models
from rectiflow.tests.prune.conftest import interrupted_at
from rectiflow.train.distill_runs import (
    DISTANCES,
    RunGate,
    RunSettings,
    RunTeacher,
    distill_runs,
    norm_ratio,
    run_distance,
)  # fmt: skip
from rectiflow.train.pool import Calibration, inside
from rectiflow.train.prune_scores import velocity_error
from rectiflow.train.recovery import RecoverSettings, recover

SHOWN = Calibration(conditioning(5), conditioning(9), (16, 4, 4), count=4, steps=2)
SIZE = (4, 4)


@pytest.fixture(scope="module")
def model():
    return sd.load_diffusion_model_state_dict(small_models.flux(depth=3, depth_single_blocks=4).state_dict())


@pytest.fixture(scope="module")
def plan(model):
    """Two runs of single blocks and one of double blocks: 4 of 7 blocks out."""
    stack = stack_under(model, "test")
    runs = (Run("double_blocks", 0, 1), Run("single_blocks", 0, 1), Run("single_blocks", 2, 3))
    return PrunePlan(stack.family, model_hash(model), stack.counts, {}, runs, method="runs")


def distil(model, plan, folder=None, services=None, **changed):
    settings = RunSettings(**{"steps": 4, "batch": 2, "lr": 1e-3, "init": "middle", "ema": 0.0, "save_every": 0, **changed})
    return distill_runs(model, plan, settings, SHOWN, folder, services or host_services())


@pytest.fixture(scope="module")
def distilled(model, plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "made"
    return distil(model, plan, folder, steps=10), folder / STUDENTS_FILE


def draw(model, steps=2):
    return sample(model, noise(size=SIZE), steps=steps, cfg=1.0)


@pytest.mark.parametrize("init, sources", [("first", [0]), ("middle", [1]), ("last", [3]), ("average", [0, 1, 2, 3])])
def test_students_begin_as_the_page_says(model, init, sources):
    student = new_student(model, Run("single_blocks", 0, 3), init)
    for name, value in student.named_parameters():
        blocks = [original_module(model, f"single_blocks.{index}").get_parameter(name) for index in sources]
        assert torch.allclose(value, torch.stack(list(blocks)).mean(0), atol=1e-7) and all(value is not block for block in blocks)
    assert init in INITS


def test_a_student_is_a_copy_of_the_loaded_weights_while_patches_lie_on_them(model):
    """A LoRA that is merged and a gate that hangs on the network at this moment do not get into the copy."""
    clean = {name: value.clone() for name, value in new_student(model, Run("single_blocks", 0, 2)).named_parameters()}
    patched = gate_blocks(model, stack_under(model, "test").blocks, lambda block, state, run: state)
    key = "diffusion_model.single_blocks.1.linear1.weight"
    patched.add_patches({key: ("diff", (torch.ones_like(model.model.get_parameter(key)),))})
    patched.patch_model()
    try:
        student = new_student(patched, Run("single_blocks", 0, 2))
    finally:
        patched.unpatch_model()
    assert all(torch.equal(value, clean[name]) for name, value in student.named_parameters())
    assert "forward" not in student.__dict__


def test_distances_in_closed_form():
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    for kind in DISTANCES:
        assert float(run_distance(wanted, wanted, kind)) == pytest.approx(0.0, abs=1e-6)
    turned = torch.tensor([[[3.0, 4.0], [2.0, 0.0]]])  # the second token by a right angle: |(1, 0) − (0, 1)|² = 2, L1 = 2
    assert float(run_distance(turned, wanted, "dir_mse")) == pytest.approx(1.0)
    assert float(run_distance(turned, wanted, "dir_l1")) == pytest.approx(1.0)
    assert float(run_distance(turned, wanted, "mse")) == pytest.approx(8.0 / 29.0)
    assert float(norm_ratio(1.05 * wanted, wanted)) == pytest.approx(1.05)
    assert float(run_distance(1.05 * wanted, wanted, "dir_mse")) == pytest.approx(0.0, abs=1e-6)  # inside [0.9, 1.1]
    assert float(run_distance(2.0 * wanted, wanted, "dir_mse")) == pytest.approx(torch.tensor(2.0).log().square().item())


def test_students_come_nearer_and_the_report_says_by_how_much(model, plan, distilled):
    done, _ = distilled
    start = distil(model, plan, steps=1, lr=0.0)
    assert done.report["velocity_error"]["all"] < 0.9 * start.report["velocity_error"]["all"]
    assert set(done.report["velocity_error"]) == {*(run.path for run in plan.runs), "all"}
    apart = sum(done.report["velocity_error"][run.path] for run in plan.runs) ** 0.5
    assert done.report["root_of_squares_of_single"] == pytest.approx(apart)
    assert done.report["accumulates"] == (done.report["velocity_error"]["all"] ** 0.5 > 1.5 * apart)
    assert all(0.5 < ratio < 2.0 for ratio in done.report["norm_ratio"].values())


def test_nothing_flows_from_one_student_to_the_next(model, plan):
    """In the alternating stage every student reads the teacher's state, bit for bit, and its output has a gradient in itself alone."""
    stack = stack_under(model, "test")
    students = {run.path: new_student(model, run, "last").requires_grad_(True) for run in plan.runs}
    gate, states = RunGate(plan.runs, students), {}

    def watched(block, state, run):
        if gate.mode == "off":
            states[block.path] = own(state)
        return gate(block, state, run) if any(block in of for of in plan.runs) else run()

    def body(trainee):
        x, sigma = small_models.random(2, 16, *SIZE), torch.tensor([0.3, 0.8])
        answers = [RunTeacher(trainee, gate, lambda on=on: on).velocity(x, sigma, [0, 0]) for on in (False, True)]
        assert torch.equal(*answers), "the teacher's own answer does not change"
        for run in plan.runs:
            for path, student in students.items():
                gradients = torch.autograd.grad(
                    sum(tokens.sum() for tokens in gate.given[run.path]), list(student.parameters()), allow_unused=True, retain_graph=True
                )  # fmt: skip
                assert any(gradient is not None for gradient in gradients) == (path == run.path)
        wanted = states["double_blocks.2"]  # behind the run of double blocks
        assert all(torch.equal(*pair) for pair in zip(gate.wanted["double_blocks.0"], wanted))

    inside(CFGGuider, gate_blocks(model, stack.blocks, watched), SHOWN, body)


def test_the_last_stage_learns_from_the_model_with_all_students(model, plan):
    """At equal steps it ends nearer than the alternating stage alone, for the toy's students disturb each other."""
    one, two = (distil(model, plan, own_share=share, steps=12).report["velocity_error"]["all"] for share in (0.0, 0.7))
    assert two < one


def test_files_give_the_same_model_and_any_subset(model, distilled):
    """Every subset of the runs loads from one file; none of them is the base model bit for bit."""
    done, file = distilled
    base = draw(model)
    for chosen, count in (("all", 3), ("0", 1), ("2, 0", 2), ("none", 0)):
        part = active_plan(done.plan, chosen, "test")
        students = read_students(file, part, model, "test")
        applied = apply_runs(model, part, students, "test")
        assert len(students) == len(part.runs) == count
        direct = apply_runs(model, part, {path: done.students[path] for path in part.students}, "test")
        assert torch.equal(draw(applied), draw(direct))
        assert torch.equal(draw(applied), base) == (count == 0)


def test_switching_a_run_changes_nothing_before_its_first_block(model, distilled):
    done, _ = distilled
    stack = stack_under(model, "test")

    def inputs(chosen):
        seen = {}

        def look(block, state, run):
            seen.setdefault(block.path, own(state))
            return run()

        part = active_plan(done.plan, chosen, "test")
        draw(gate_blocks(apply_runs(model, part, {path: done.students[path] for path in part.students}, "test"), stack.blocks, look), 1)
        return seen

    whole, switched = inputs("none"), inputs("1")  # the run single 0-1
    same = [path for path in whole if all(torch.equal(*pair) for pair in zip(whole[path], switched[path]))]
    assert same[:4] == ["double_blocks.0", "double_blocks.1", "double_blocks.2", "single_blocks.0"]
    assert "single_blocks.2" not in same


def test_memory_holds_students_and_not_what_they_stand_for(model, plan, distilled):
    """Of the network on the device and of the size that the host plans with; a range of sigma keeps both."""
    done, _ = distilled
    gone = sum(bytes_of(original_module(model, f"{run.holder}.{i}")) for run in plan.runs for i in (run.first, run.last))
    students = sum(bytes_of(student) for student in done.students.values())
    whole = model.model_size()
    for sigmas, size in ((None, whole - gone + students), ((1.0, 0.5), whole + students)):
        applied = apply_runs(model, done.plan, done.students, "test", sigmas)
        assert applied.model_size() == size
        applied.patch_model()
        try:
            assert bytes_of(applied.model) == size
        finally:
            applied.unpatch_model()
    assert bytes_of(model.model) == whole


def test_a_range_of_sigma_switches_inside_a_run(model, distilled):
    """Where the range holds no sigma of the run it is the base model, where it holds all the replaced one, else neither; nothing stays."""
    done, _ = distilled
    base, replaced = draw(model, 4), draw(apply_runs(model, done.plan, done.students, "test"), 4)

    def ranged(high, low):
        return draw(apply_runs(model, done.plan, done.students, "test", (high, low)), 4)

    assert torch.equal(ranged(0.1, 0.0), base)  # the sigmas asked are 1, 0.75, 0.5, 0.25
    assert torch.equal(ranged(1.0, 0.0), replaced)
    middle = ranged(0.6, 0.0)
    assert not torch.equal(middle, base) and not torch.equal(middle, replaced)
    assert torch.equal(draw(model, 4), base) and not any(isinstance(module, StandIn) for module in model.model.modules())


def test_loras_stay_off_students_and_on_the_rest(model, distilled):
    done, _ = distilled
    applied = apply_runs(model, done.plan, done.students, "test")
    plain = draw(applied)
    for name, same in (("single_blocks.0.linear1", True), ("single_blocks.1.linear1", True), ("double_blocks.2.img_mlp.0", False)):
        key = f"diffusion_model.{name}.weight"
        model.detach()
        patched = applied.clone()
        assert patched.add_patches({key: ("diff", (torch.full_like(model.model.get_parameter(key), 0.05),))})
        assert torch.equal(draw(patched), plain) == same


@pytest.mark.parametrize("learns", ["lora", "changed_blocks"])
def test_a_model_with_students_recovers(model, distilled, learns, tmp_path):
    """Students learn along, as copies: what was given keeps its own, the file and the MODEL that comes out have the new ones. A teacher
    that shares the network and one that is loaded apart teach the same."""
    done, _ = distilled
    applied = apply_runs(model, done.plan, done.students, "test")
    apart = sd.load_diffusion_model_state_dict(small_models.flux(depth=3, depth_single_blocks=4).state_dict())
    settings, before = RecoverSettings(steps=6, batch=2, rank=2, lr=2e-3, ema=0.0, learns=learns), draw(applied)
    found = [recover(applied, teacher, settings, SHOWN, tmp_path / name, host_services()) for name, teacher in (("a", model), ("b", apart))]
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-4)
    assert not [name for name in found[0].lora if "single_blocks" in name or "double_blocks.0" in name]
    assert torch.equal(draw(applied), before) and torch.equal(draw(apart), draw(model)), "nothing is left behind"
    after = found[0].report["after"]["velocity_error"]
    assert after < 0.98 * found[0].report["before"]["velocity_error"]
    assert velocity_error(found[0].model, model, SHOWN, CFGGuider, 16) == pytest.approx(after, rel=1e-3)
    read = read_students(tmp_path / "a" / STUDENTS_FILE, done.plan, model, "test")
    for path, student in read.items():
        new, old = (found[0].model.object_patches[f"diffusion_model.{path}"], done.students[path])
        pairs = list(zip(student.parameters(), new.parameters(), old.parameters()))
        assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(b, c) for _, b, c in pairs)


def test_recovery_of_scheduled_runs_is_refused(model, distilled):
    done, _ = distilled
    scheduled = apply_runs(model, done.plan, done.students, "test", (1.0, 0.5))
    with pytest.raises(NodeInputError, match="at every sigma"):
        recover(scheduled, model, RecoverSettings(), SHOWN, None, host_services())


def test_stopped_and_resumed_is_the_whole_run(model, plan, tmp_path):
    """Interrupted in the alternating stage and in the last one: bit-identical students."""
    whole = distil(model, plan, tmp_path / "whole", own_share=0.5)
    services, _ = interrupted_at(2, 5)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            distil(model, plan, tmp_path / "part", services, own_share=0.5)
    assert (tmp_path / "part" / "step-000003.safetensors").is_file(), "what was learnt is kept"
    resumed = distil(model, plan, tmp_path / "part", services, own_share=0.5)
    assert resumed.losses == whole.losses
    assert (tmp_path / "part" / STUDENTS_FILE).read_bytes() == (tmp_path / "whole" / STUDENTS_FILE).read_bytes()


def test_other_families_have_students():
    for family, run in (("sd3", Run("joint_blocks", 0, 2)), ("lumina2", Run("layers", 1, 3))):
        made = toy(family)
        stack = stack_under(made, "test")
        done = distil(made, PrunePlan(stack.family, model_hash(made), stack.counts, {}, (run,)), steps=2)
        assert torch.isfinite(draw(apply_runs(made, done.plan, done.students, "test"))).all()


def test_what_does_not_fit_is_refused(model, plan, distilled, tmp_path):
    done, file = distilled
    for chosen in ("3", "-1", "0; 1", "some", "0,,1", ""):
        with pytest.raises(NodeInputError, match="active_runs"):
            active_plan(plan, chosen, "test")
    with pytest.raises(NodeInputError, match="Find Redundant Runs"):
        distil(model, dataclasses.replace(plan, runs=()))
    with pytest.raises(NodeInputError, match="for this model"):
        distil(toy("flux"), plan)
    with pytest.raises(NodeInputError, match="init"):
        distil(model, plan, init="best")
    with pytest.raises(NodeInputError, match="whole model"):
        distil(apply_plan(model, dataclasses.replace(plan, runs=plan.runs[:1]), "test"), plan)
    with pytest.raises(NodeInputError, match="without one"):
        apply_runs(apply_runs(model, done.plan, done.students, "test"), done.plan, done.students, "test")
    assert plan_of(model) is None


def test_students_of_damaged_or_foreign_files_are_refused(model, distilled, tmp_path):
    done, file = distilled
    content = file.read_bytes()
    other = dataclasses.replace(done.plan, runs=(Run("single_blocks", 0, 3),), students={"single_blocks.0": "made/students.safetensors"})
    cases = [(b"", done.plan), (content[:200], done.plan), (content[:-9], done.plan), (b"\xff" * 64, done.plan), (content, other)]
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    for change in ("not JSON", json.dumps([]), json.dumps({"model": "0" * 16, "init": "middle", "runs": []})):
        text = json.dumps({**head, "__metadata__": {"rectiflow_runs": change}}).encode()
        cases.append((len(text).to_bytes(8, "little") + text + content[8 + size :], done.plan))
    for number, (damaged, wanted) in enumerate(cases):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(damaged)
        with pytest.raises(NodeInputError, match="Distill"):
            read_students(path, wanted, model, "Apply Runs")
    with pytest.raises(NodeInputError, match="cannot be read"):
        read_students(tmp_path / "missing.safetensors", done.plan, model, "Apply Runs")
