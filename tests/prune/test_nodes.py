"""The nodes from plan to students, as a graph engine calls them, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from rectiflow.accel.prune.apply import plan_of, stack_under
from rectiflow.accel.prune.identity import model_hash
from rectiflow.accel.prune.plan import PrunePlan, Run
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded import sd
from rectiflow.nodes.compressed_files import RectiflowLoadCompressed, RectiflowSaveCompressed
from rectiflow.nodes.depth import (
    RectiflowApplyRuns,
    RectiflowDepthPruneLearn,
    RectiflowDistillRuns,
    RectiflowFindRedundantRuns,
    RectiflowLayerProbe,
)
from rectiflow.nodes.pruning import RectiflowApplyPrunePlan
from rectiflow.tests.accel.region_toys import conditioning, noise, sample
from rectiflow.tests.models import small_models

SHOWN = {"samples": 2, "sample_steps": 2, "cfg": 1.0, "seed": 3}
RUN = {"steps": 2, "batch": 2, "save_every": 0}


@pytest.fixture(scope="module")
def made(tiny):
    """(MODEL, plan with students): probes, runs and students of a toy Flux through the nodes; `tiny` opens the host."""
    model = sd.load_diffusion_model_state_dict(small_models.flux(depth=3, depth_single_blocks=4).state_dict())
    base = {"positive": conditioning(5), "latent": {"samples": torch.zeros(1, 16, 4, 4)}, **SHOWN}
    with torch.inference_mode():
        stats, report, plot = RectiflowLayerProbe().execute(model=model, tokens=256, ridge=1e-3, max_run=3, points=4, **base)
        assert "double:0" in report and plot.shape[-1] == 3
        search = {"max_run": 2, "largest_loss": 0.1, "tie": 0.001, "protect": "0, -1", "merge_streams": "mean"}
        plan, _ = RectiflowFindRedundantRuns().execute(stats=stats, remove=0.3, **search)
        distil = {"lr": 1e-3, "init": "average", "loss": "mse", "own_share": 0.5, "name": "node runs"}
        plan, file, report, _ = RectiflowDistillRuns().execute(model=model, plan=plan, **distil, **RUN, **base)
    assert file == "node runs/students.safetensors" and len(json.loads(report)["runs"]) == 2
    return model, plan


def draw(model):
    return sample(model, noise(size=(4, 4)), steps=1, cfg=1.0)


def test_both_apply_nodes_put_the_students_on(made):
    model, plan = made
    runs, report = RectiflowApplyRuns().execute(model=model, plan=plan, active_runs="all", start_percent=0.0, end_percent=1.0)
    whole, _ = RectiflowApplyPrunePlan().execute(model=model, plan=plan, enabled=True)
    assert torch.equal(draw(runs), draw(whole)) and "node runs/students.safetensors" in report
    none, _ = RectiflowApplyRuns().execute(model=model, plan=plan, active_runs="none", start_percent=0.0, end_percent=0.5)
    assert torch.equal(draw(none), draw(model)) and not torch.equal(draw(runs), draw(model))
    assert plan_of(runs).runs and not plan_of(none).runs


def test_the_report_counts_loras_that_meet_no_block(made):
    model, plan = made
    run = json.loads(plan)["runs"][0]
    student, kept = (f"diffusion_model.{run['holder']}.{run['first']}", "diffusion_model.double_blocks.0")
    names = {part: next(name for name, _ in model.model.named_parameters() if name.startswith(f"{part}.")) for part in (student, kept)}
    patched = model.clone()
    assert len(patched.add_patches({name: ("diff", (torch.zeros(1),)) for name in names.values()})) == 2
    _, report = RectiflowApplyPrunePlan().execute(model=patched, plan=plan, enabled=True)
    assert "1 of 2 patched weights" in report
    assert "patched weights" not in RectiflowApplyPrunePlan().execute(model=model, plan=plan, enabled=True)[1]


ELSEWHERE = ("../runs/students.safetensors", "node runs/lora.safetensors", "/etc/passwd", "", "other/students.safetensors")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_students_come_from_their_folder_alone(made, name):
    model, plan = made
    changed = json.loads(plan)
    changed["students"] = {path: name for path in changed["students"]}
    for node, inputs in ((RectiflowApplyRuns, {"active_runs": "all", "start_percent": 0.0, "end_percent": 1.0}),
                         (RectiflowApplyPrunePlan, {"enabled": True})):  # fmt: skip
        with pytest.raises(NodeInputError, match="plan"):
            node().execute(model=model, plan=json.dumps(changed), **inputs)


def test_bad_ranges_and_names_are_refused(made):
    model, plan = made
    with pytest.raises(NodeInputError, match="Exchange"):
        RectiflowApplyRuns().execute(model=model, plan=plan, active_runs="all", start_percent=0.6, end_percent=0.5)
    with pytest.raises(NodeInputError, match="name"):
        RectiflowDepthPruneLearn().execute(
            model=model, positive=conditioning(5), latent={"samples": torch.zeros(1, 16, 4, 4)}, double_pattern="1:2", single_pattern="",
            protect="", name="../depth", **RUN, **SHOWN,
        )  # fmt: skip


def test_students_are_saved_as_the_blocks_they_stand_for(tiny):
    """The file loads as a pruned model and draws the same latent bit for bit."""
    stack = stack_under(tiny.model, "test")
    plan = PrunePlan(stack.family, model_hash(tiny.model), stack.counts, {}, (Run("single_blocks", 1, 3),))
    base = {"positive": tiny.conditioning("noto cat on white"), "latent": {"samples": torch.zeros(1, 16, 8, 8)}, **SHOWN}
    distil = {"lr": 1e-3, "init": "middle", "loss": "dir_mse", "own_share": 0.0, "name": "tiny runs"}
    with torch.inference_mode():
        made, _, _, _ = RectiflowDistillRuns().execute(model=tiny.model, plan=plan.to_json(), **distil, **{**base, **RUN, "steps": 1})
        model, _ = RectiflowApplyRuns().execute(model=tiny.model, plan=made, active_runs="all", start_percent=0.0, end_percent=1.0)
        saved = RectiflowSaveCompressed().execute(model=model, filename_prefix="runs/tiny", format="rectiflow", dtype="same")
        loaded = RectiflowLoadCompressed().execute(path=saved[0] if isinstance(saved, tuple) else saved["result"][0])
    latents = [tiny.sample("noto cat on white", tiny.noise([1]), model=each, steps=2) for each in (model, loaded[0])]
    assert torch.equal(*latents)


def test_a_finished_run_is_not_repeated_and_an_unknown_one_is_new(made):
    assert RectiflowDistillRuns.IS_CHANGED(name="node runs") == 2
    assert RectiflowDistillRuns.IS_CHANGED(name="never ran") == -1
