"""Students whose last projections are solved: closed forms, families, what is held out, and the tiny model."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.prune import fitted_students
from rectiflow.accel.prune.apply import stack_under
from rectiflow.accel.prune.fitted_students import LastLayers, last_layers
from rectiflow.accel.prune.gates import gate_blocks, own
from rectiflow.accel.prune.identity import model_hash
from rectiflow.accel.prune.plan import PrunePlan, Run
from rectiflow.accel.prune.students import new_student
from rectiflow.host import CFGGuider
from rectiflow.nodes.pruning import host_services
from rectiflow.tests.accel.region_toys import conditioning, toy
from rectiflow.tests.prune.conftest import interrupted_at
from rectiflow.train.distill_runs import RunSettings, distill_runs
from rectiflow.train.pool import CALL, Calibration, inside, parted

RUNS = {
    "flux": Run("single_blocks", 0, 1), "flux doubles": Run("double_blocks", 0, 1), "sd3": Run("joint_blocks", 0, 2),
    "lumina2": Run("layers", 1, 3),
}  # fmt: skip


def toy_of(case: str):
    return toy(case.split()[0])


def collected(model, run: Run, disturb: float, targets=lambda state: state, calls: int = 4):
    """(LastLayers, student): the student is block run.first with disturbed last layers, the target what that block itself makes."""
    stack = stack_under(model, "test")
    with torch.inference_mode(False):
        student = new_student(model, run, "first").float()
        names = last_layers(model, stack)[run.path]
        with torch.no_grad():
            for name in names:
                weight = student.get_submodule(name).weight
                weight += disturb * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        found, judging = LastLayers(student, names, 64), [False]

    def gate(block, state, run_block):
        if block.path != run.path:
            return run_block()
        found.take(state, lambda given: run_block(given, student))
        after = run_block()
        found.wanted(targets(own(after)), held=judging[0])
        return after

    shown = Calibration(conditioning(5), None, (16, 6, 8), count=4, steps=2)

    def body(trainee):
        for call in range(calls):
            judging[0] = call == calls - 1
            generator = torch.Generator().manual_seed(call)
            with torch.no_grad():
                trainee.velocity(torch.randn((2, *shown.size), generator=generator), torch.tensor([0.3, 0.8]), [0, 0])

    inside(CFGGuider, gate_blocks(model, stack.blocks, gate), shown, body)
    return found, student


def test_the_descent_ends_at_the_ridge_solution():
    """Every output channel has its own weights of the tokens: against the normal equations solved one channel at a time."""
    generator = torch.Generator().manual_seed(1)
    z = torch.cat((torch.randn(40, 4, generator=generator), torch.ones(40, 1)), dim=1).double()
    gate, missing, start = (torch.randn(shape, generator=generator).double() for shape in ((40, 3), (40, 3), (3, 5)))
    ridge = 0.3
    *_, found = fitted_students._descent(z, gate, missing, start, ridge)
    shrink = ridge * (gate.square().T @ z.square()).mean()
    for channel in range(3):
        rows = gate[:, channel, None] * z
        left = rows.T @ rows + shrink * torch.eye(5, dtype=torch.float64)
        right = rows.T @ missing[:, channel] + shrink * start[channel]
        assert torch.allclose(found[channel], torch.linalg.solve(left, right), atol=1e-9)


@pytest.mark.parametrize("case", ["flux", "flux doubles", "sd3"])
def test_disturbed_last_layers_are_found_again(case):
    """Nothing but the last layers differs, and the targets can be reached. Untouched layers stay bit for bit."""
    found, student = collected(toy_of(case), RUNS[case], disturb=0.5)
    others = {name: value.clone() for name, value in student.named_parameters() if not any(last in name for last in found.layers)}
    layers = found.solve()
    assert not found.unfit and set(layers) == set(found.layers) and len(layers) == (2 if case in ("flux doubles", "sd3") else 1)
    assert all(layer.after < 0.2 * layer.before and layer.before > 0 for layer in layers.values())
    assert all(torch.equal(value, others[name]) for name, value in student.named_parameters() if name in others)


def test_a_layer_behind_which_more_happens_is_left_alone():
    """Lumina 2 norms what its MLP says: no solution of a linear system, and the reason is told."""
    found, student = collected(toy("lumina2"), RUNS["lumina2"], disturb=0.5)
    before = [value.clone() for value in student.parameters()]
    assert found.solve() == {} and set(found.unfit) == set(found.layers) and "multiply and add" in next(iter(found.unfit.values()))
    assert all(torch.equal(*pair) for pair in zip(student.parameters(), before))


def test_what_serves_only_the_rows_it_was_fitted_to_is_not_taken():
    """The held-out call is served best by the copy, the others ask for something else: the copy stays bit for bit."""
    calls = []

    def targets(state):
        calls.append(1)
        return state if len(calls) == 4 else tuple(-tokens for tokens in state)

    found, student = collected(toy("flux"), RUNS["flux"], disturb=0.0, targets=targets)
    before = [value.clone() for value in student.parameters()]
    (layer,) = found.solve().values()
    assert layer.iterations == 0 and layer.after == layer.before < 1e-9
    assert all(torch.equal(*pair) for pair in zip(student.parameters(), before))


@pytest.mark.parametrize("prompts, count", [(8, 32), (4, 16), (3, 16), (1, 9)])
def test_points_that_judge_share_no_prompt_with_the_others(prompts, count):
    rows = [(torch.full((1, 2, 2), float(i)), torch.tensor(i / count), i % prompts) for i in range(count)]
    at = [tuple(zip(*rows[i : i + CALL])) for i in range(0, count, CALL)]
    shown, judged = parted([(torch.stack(x), torch.stack(s), list(c)) for x, s, c in at])
    seen = [sorted(int(x.flatten()[0]) for call in part for x in call[0]) for part in (shown, judged)]
    assert sorted(seen[0] + seen[1]) == list(range(count)) and len(seen[1]) == count // 4
    assert all(len(call[2]) <= CALL for call in shown + judged)
    if prompts >= 4:
        assert not {c for call in shown for c in call[2]} & {c for call in judged for c in call[2]}


@pytest.fixture(scope="module")
def plan(tiny):
    stack = stack_under(tiny.model, "test")
    return PrunePlan(stack.family, model_hash(tiny.model), stack.counts, {}, (Run("single_blocks", 0, 1), Run("single_blocks", 2, 4)))


def distil(tiny, shown, plan, folder=None, services=None, **changed):
    settings = RunSettings(**{"steps": 1, "batch": 2, "lr": 0.0, "ema": 0.0, "save_every": 0, "own_share": 0.0, **changed})
    return distill_runs(tiny.model, plan, settings, shown, folder, services or host_services())


def test_fitted_students_of_the_tiny_model_begin_far_nearer(tiny, shown, plan):
    """Before any training the velocity errs less than half as much; the report tells each layer. The same twice, bit for bit."""
    copied, fitted, again = (distil(tiny, shown, plan, init=init) for init in ("middle", "fitted", "fitted"))
    assert fitted.report["velocity_error"]["all"] < 0.5 * copied.report["velocity_error"]["all"]
    assert set(fitted.report["fitted"]) == {run.path for run in plan.runs} and copied.report["fitted"] == {}
    assert all(layer["after"] < layer["before"] for layers in fitted.report["fitted"].values() for layer in layers.values())
    for path, student in fitted.students.items():
        assert all(torch.equal(*pair) for pair in zip(student.parameters(), again.students[path].parameters()))


def test_a_family_without_such_layers_says_so():
    model = toy("lumina2")
    stack = stack_under(model, "test")
    plan = PrunePlan(stack.family, model_hash(model), stack.counts, {}, (RUNS["lumina2"],))
    shown = Calibration(conditioning(5), None, (16, 6, 8), count=2, steps=2)
    done = distill_runs(model, plan, RunSettings(steps=1, batch=1, save_every=0), shown, None, host_services())
    assert done.report["fitted"]["layers.1"] == {} and any("as copied" in note for note in done.report["notes"])


def test_interrupted_while_fitting_and_while_training_it_ends_alike(tiny, shown, plan, tmp_path):
    settings = {"init": "fitted", "steps": 3, "lr": 1e-3, "own_share": 0.5}
    whole = distil(tiny, shown, plan, tmp_path / "whole", **settings)
    services, calls = interrupted_at(2, 9)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            distil(tiny, shown, plan, tmp_path / "part", services, **settings)
    resumed = distil(tiny, shown, plan, tmp_path / "part", services, **settings)
    assert resumed.losses == whole.losses and len(calls) > 9
    for path, student in whole.students.items():
        assert all(torch.equal(*pair) for pair in zip(student.parameters(), resumed.students[path].parameters()))
