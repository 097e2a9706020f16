"""Importance of blocks and linear probes: closed forms, a planted stretch of linear blocks, and the tiny model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rectiflow.accel.prune.apply import apply_plan, stack_under
from rectiflow.accel.prune.fitted_students import runs_to_judge
from rectiflow.accel.prune.identity import model_hash, original_module
from rectiflow.accel.prune.plan import Run
from rectiflow.accel.prune.probes import (
    ProbeStats,
    Recorder,
    apply_probe,
    best_runs,
    fit_probe,
    linear_cka,
    probe_stats,
    trend_runs,
)
from rectiflow.accel.prune.scores import Dispatcher, Leave, Similarity, relative_error
from rectiflow.accel.prune.select import plan_without
from rectiflow.errors import NodeInputError
from rectiflow.families.stack import Stack, StackBlock
from rectiflow.host import CFGGuider
from rectiflow.metrics.bars import bar_chart
from rectiflow.tests.accel.region_toys import conditioning, toy
from rectiflow.train.pool import Calibration, inside, sample_pool
from rectiflow.train.prune_scores import (
    RunSearch,
    ScoreRequest,
    find_runs,
    probe_layers,
    runs_from,
    score_blocks,
    velocity_error,
)

SEED = torch.Generator().manual_seed(5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=SEED)


def line(count: int) -> Stack:
    return Stack("toy", tuple(StackBlock("blocks", index, "double", ("x",), ("x",)) for index in range(count)))


def test_cka_of_rotations_is_one_and_of_independent_noise_nothing():
    a, rotation = random(4096, 64), torch.linalg.qr(random(64, 64).double()).Q
    assert abs(linear_cka(a, a.double() @ rotation * 3.0 + 1.0) - 1.0) < 1e-6
    assert linear_cka(a, random(4096, 64)) < 0.05
    assert linear_cka(torch.zeros(10, 3), a[:10, :3]) == 1.0  # nothing that could differ in direction


def test_a_probe_of_a_linear_layer_has_no_residual():
    h = random(4096, 32)
    outputs = h + h @ (0.3 * random(32, 32)) + random(32)
    probe = fit_probe(h, outputs, ridge=1e-8)
    assert float((apply_probe(h.double(), probe) - outputs).square().mean() / outputs.square().mean()) ** 0.5 < 1e-4
    alike = h[:8]  # fewer tokens than channels: the ridge keeps the map finite
    assert torch.isfinite(fit_probe(alike, alike * 2.0, ridge=1e-4)).all()


def test_the_search_finds_a_planted_stretch_of_linear_blocks():
    """12 blocks of which 4 to 8 are linear: a run covers 4..7 at least and nothing outside of 3..9."""
    stack, recorder = line(12), Recorder(2048)
    h = random(1, 2048, 24)
    for block in stack.blocks:
        turn = torch.linalg.qr(random(24, 24)).Q

        def run(h=h, turn=turn, linear=4 <= block.index <= 8):
            return (h @ turn if linear else 1.4 * torch.sin(3.0 * h @ turn),)

        (h,) = recorder(block, (h,), run)
    stats = probe_stats(recorder, stack, ridge=1e-8)
    runs = trend_runs(stats, largest_loss=0.1)
    assert runs and any(run.first <= 4 and run.last >= 7 for run in runs)
    assert all(run.first >= 3 and run.last <= 9 for run in runs)
    assert best_runs(stats, 4) == (Run("blocks", 4, 8),)
    assert set(stats.scores()) == {block.path for block in stack.blocks}


def test_best_runs_are_the_best_of_all():
    """Against every choice of disjoint runs in a stack of six."""
    table = torch.rand(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stats = ProbeStats({"blocks": table})

    def every(start: int, left: int):
        if left == 0:
            yield ()
        for first in range(start, 6):
            for last in range(first + 1, min(6, first + left + 1)):
                for others in every(last + 1, left - (last - first)):
                    yield (Run("blocks", first, last), *others)

    for remove in (1, 2, 3, 4):
        cheapest = min(sum(stats.loss(run) for run in runs) for runs in every(0, remove))
        assert sum(stats.loss(run) for run in best_runs(stats, remove)) == pytest.approx(cheapest, abs=1e-12)
    assert best_runs(stats, 6) == () and best_runs(stats, 1, kept=frozenset(f"blocks.{i}" for i in range(6))) == ()


def test_similarity_in_closed_form():
    watch, (block,) = Similarity(), line(1).blocks
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    watch(block, (x,), lambda: (x + torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]),))
    assert watch.scores()["blocks.0"] == pytest.approx((1.0 - 0.5**0.5) / 2)
    watch(block, (x,), lambda: (x.add_(1.0),))  # a block that writes in place is still seen
    assert watch.scores()["blocks.0"] > 0.1


def test_leaving_out_and_errors():
    (block,), gate = line(1).blocks, Dispatcher()
    assert gate(block, (1,), lambda: (2,)) == (2,)
    gate.current = Leave(["blocks.0"])
    assert gate(block, (1,), lambda: (2,)) == (1,)
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) == 0.5


@pytest.mark.parametrize("method", ["similarity", "sensitivity", "probe", "outcome"])
def test_a_planted_idle_block_of_the_tiny_model_goes_first(tiny, shown, method):
    """A block whose last projection is zero changes nothing of its streams: every number that looks at what blocks do ranks it lowest."""
    tiny.model.detach()  # another test may have left a narrow clone on the network
    module = original_module(tiny.model, "single_blocks.2")
    kept = {name: value.clone() for name, value in module.linear2.named_parameters()}
    try:
        for value in module.linear2.parameters():
            value.data.zero_()
        scored = score_blocks(tiny.model, ScoreRequest(method, 0.12, at=4), shown, CFGGuider, "test")
        assert scored.gone == ("single_blocks.2",)
        assert scored.scores["single_blocks.2"] == pytest.approx(0.0, abs=1e-9)
        pruned = apply_plan(tiny.model, scored.plan, "test")
        assert velocity_error(pruned, tiny.model, shown, CFGGuider, 4) < 1e-12
    finally:
        for name, value in module.linear2.named_parameters():
            value.data.copy_(kept[name])


def test_outcome_is_the_velocity_error_and_that_of_whole_runs(tiny, shown):
    """Against a model with the block skipped, sampled from the noise of the next seed."""
    scored = score_blocks(tiny.model, ScoreRequest("outcome", 0.12, at=4), shown, CFGGuider, "test")
    answers = score_blocks(tiny.model, ScoreRequest("sensitivity", 0.12, at=4), shown, CFGGuider, "test")
    stack, path = stack_under(tiny.model, "test"), "single_blocks.1"
    skipped = apply_plan(tiny.model, plan_without((stack.at(path),), stack, model_hash(tiny.model), "test"), "test")
    other, found = dataclasses.replace(shown, seed=shown.seed + 1), []
    for model in (skipped, tiny.model):
        inside(CFGGuider, model.clone(), other, lambda trainee: found.append(sample_pool(trainee, other)))
    assert scored.scores[path] - answers.scores[path] == pytest.approx(relative_error(*found), rel=1e-4)


def test_magnitude_and_patterns_ask_nothing_of_the_model(tiny, shown):
    def never(model):
        raise AssertionError("the model was asked")

    for method in ("magnitude", "even", "ends", "random"):
        scored = score_blocks(tiny.model, ScoreRequest(method, 1 / 3), shown, never, "test")
        assert len(scored.gone) == 3 and "leaves out 3 of 9" in scored.report
    again = score_blocks(tiny.model, ScoreRequest("random", 1 / 3), shown, never, "test")
    assert again.gone == scored.gone


def test_runs_of_the_tiny_model(tiny, shown):
    stats = probe_layers(tiny.model, shown, CFGGuider, "test", at=4)
    found = runs_from(stats, RunSearch(remove=1 / 3), "test")
    assert len(found.gone) == 3 and found.plan.runs
    stack = stack_under(tiny.model, "test")
    assert not {stack.blocks[0].path, stack.blocks[-1].path} & set(found.gone)
    each = [stats.tables[merge].cka["double_blocks"] for merge in ("min", "mean", "image")]
    assert all(0.0 <= float(table[i, i]) <= 1.0 for table in each for i in range(len(table)))
    assert float((each[1] - each[0]).nan_to_num().min()) >= 0.0 and float((each[2] - each[0]).nan_to_num().min()) >= 0.0
    with pytest.raises(NodeInputError, match="Raise largest_loss"):
        runs_from(stats, RunSearch(largest_loss=0.0, tie=0.0), "test")
    with pytest.raises(NodeInputError, match="Set judge of Layer Probe to students"):
        runs_from(stats, RunSearch(remove=1 / 3, merge="velocity"), "test")
    with pytest.raises(NodeInputError, match="judge"):
        probe_layers(tiny.model, shown, CFGGuider, "test", judge="eye")
    with pytest.raises(NodeInputError, match="points"):
        probe_layers(tiny.model, shown, CFGGuider, "test", at=3, judge="students")
    asked = []
    judged = probe_layers(tiny.model, shown, CFGGuider, "test", longest=3, at=8, judge="students", step=lambda: asked.append(1))
    assert len(asked) == len(runs_to_judge(stack, 3)) == (2 + 1) + (5 + 4)
    by_velocity = runs_from(judged, RunSearch(remove=1 / 3, longest=3, merge="velocity"), "test")
    assert len(by_velocity.gone) == 3 and "velocity error of its student" in by_velocity.report
    both = probe_layers(tiny.model, shown, CFGGuider, "test", longest=3, at=8, judge="outcome")
    velocity, outcome = (both.tables[name].cka["single_blocks"].nan_to_num(1.0) for name in ("velocity", "outcome"))
    assert torch.equal(velocity, judged.tables["velocity"].cka["single_blocks"].nan_to_num(1.0))
    assert bool((outcome <= velocity).all()) and bool((outcome < velocity)[velocity < 1.0].all())
    by_outcome = runs_from(both, RunSearch(remove=1 / 3, longest=3, merge="outcome"), "test")
    assert len(by_outcome.gone) == 3 and "final latents'" in by_outcome.report
    with pytest.raises(NodeInputError, match="Set judge of Layer Probe to outcome"):
        runs_from(judged, RunSearch(remove=1 / 3, merge="outcome"), "test")
    plain = probe_layers(tiny.model, shown, CFGGuider, "test", longest=3, at=8)
    assert torch.equal(*(stats.tables["min"].cka["single_blocks"].nan_to_num() for stats in (judged, plain)))
    with pytest.raises(NodeInputError, match="trend rule"):
        runs_from(judged, RunSearch(merge="velocity"), "test")
    with pytest.raises(NodeInputError, match="before Apply Prune Plan"):
        find_runs(apply_plan(tiny.model, found.plan, "test"), RunSearch(remove=1 / 3), shown, CFGGuider, "test")


def test_the_block_that_ends_a_stream_is_in_no_run():
    """SD3's last block hands no context on: it has no number, and every other run of its holder has one."""
    model = toy("sd3")
    case = Calibration(conditioning(5), None, (16, 6, 8), count=2, steps=2)
    stats = probe_layers(model, case, CFGGuider, "test", at=4, ridge=1e-3)
    table = stats.tables["min"].cka["joint_blocks"]
    assert torch.isnan(table[:, -1]).all() and not torch.isnan(table[0, :-1]).any()
    assert runs_from(stats, RunSearch(0.25, protect=""), "test").gone
    assert "double:3" not in stats.report() and "double:2" in stats.report()


def test_bars_mark_what_is_left_out():
    picture = bar_chart({"a": 1.0, "b": 0.5}, {"b"}, "title")
    assert picture.shape == (1, 360, 880, 3) and 0.0 <= float(picture.min()) <= float(picture.max()) <= 1.0
    orange = ((picture[0] - torch.tensor([213.0, 94.0, 0.0]) / 255).abs().amax(-1) < 0.02).sum()
    blue = ((picture[0] - torch.tensor([0.0, 114.0, 178.0]) / 255).abs().amax(-1) < 0.02).sum()
    assert float(blue / orange) == pytest.approx(2.0, rel=0.1)
