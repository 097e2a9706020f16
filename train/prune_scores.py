"""Block importance of a host's MODEL, measured on its own samples: from what a node was given to a plan, a report and numbers to draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..accel.prune.apply import plan_of, stack_under
from ..accel.prune.fitted_students import OUTCOME, VELOCITY, student_tables
from ..accel.prune.gates import gate_blocks
from ..accel.prune.identity import model_hash
from ..accel.prune.plan import PrunePlan
from ..accel.prune.probes import ProbeStats, Recorder, best_runs, probe_stats, probe_tables, trend_runs
from ..accel.prune.scores import Dispatcher, magnitude, relative_error, sensitivity, similarity
from ..accel.prune.select import PATTERNS, how_many, least_important, pattern, plan_without, protected
from ..errors import input_error
from ..families.stack import Stack
from .pool import CALL, HELD_OUT, Calibration, PoolData, checked_pool, inside, parted, points, sample_pool, velocities

__all__ = [
    "JUDGES", "OUTCOME", "VELOCITY", "Asked", "LayerStats", "RunSearch", "ScoreRequest", "Scored", "find_runs", "on_samples",
    "probe_layers", "runs_from", "score_blocks",
]  # fmt: skip


JUDGES = ("students", "cka", "outcome")
BY_STUDENTS = {VELOCITY: "students", OUTCOME: "outcome"}  # table → who judges


@dataclass(frozen=True)
class ScoreRequest:
    """method: of scores.METHODS or select.PATTERNS. remove: share of the blocks. at: points of the flow that are asked."""

    method: str
    remove: float
    protect: str = "0, -1"
    at: int = 16
    tokens: int = 1024


@dataclass(frozen=True)
class RunSearch:
    """remove: share of the blocks, 0 for the trend rule alone. merge: of probes.MERGES, VELOCITY or OUTCOME. The others as in
    probes.py."""

    remove: float = 0.0
    longest: int = 10
    largest_loss: float = 0.1
    tie: float = 1e-3
    protect: str = "0, -1"
    merge: str = "min"


@dataclass(frozen=True)
class LayerStats:
    """What the probes say of a model: its stack and hash, and the CKA of every run by each way to merge streams; under VELOCITY and
    OUTCOME what the model's answer loses, and its final latents too, where that was asked."""

    stack: Stack
    model: str
    tables: Mapping[str, ProbeStats]
    seconds: float

    def report(self) -> str:
        """What straight maps leave unsaid of every block, by the worst stream and by their mean."""
        worst, mean = (self.tables[merge].scores() for merge in ("min", "mean"))
        lines = [f"{self.stack.family}, {len(self.stack.blocks)} blocks, {self.seconds:.2f} s", "block         1 - CKA  mean of streams"]
        return "\n".join(lines + [f"{self.stack.at(path).name:12} {worst[path]:8.4f} {mean[path]:16.4f}" for path in worst])


@dataclass(frozen=True)
class Scored:
    """plan, a report for people, scores by block path, and paths that are left out."""

    plan: PrunePlan
    report: str
    scores: Mapping[str, float]
    gone: tuple[str, ...]


def whole_model(model: Any, where: str) -> Any:
    """Refuse a model with a plan on it: importance is of the blocks that are there."""
    if plan_of(model) is not None:
        raise input_error(where, "model", "a model with a plan on it", "a whole model", "Link the model before Apply Prune Plan.")
    return model


def score_blocks(
    model: Any, request: ScoreRequest, calibration: Calibration, guider: Callable, where: str, step: Callable[[], None] = lambda: None
) -> Scored:  # fmt: skip
    """Score the blocks, leave out the least important. step: called for each block that is left out once, by outcome twice.

    Raises: NodeInputError for shares and lists that do not fit.
    """
    stack, started = stack_under(whole_model(model, where), where), time.perf_counter()
    keep = protected(request.protect, stack, where)
    count = how_many(request.remove, stack, keep, where)
    scores: dict[str, float] = {}
    if request.method == "magnitude":
        scores = dict(magnitude(model, stack))
    elif request.method not in PATTERNS:

        def measure(gate: Dispatcher, ask: Asked) -> None:
            if request.method == "similarity":
                scores.update(similarity(ask, gate))
            elif request.method in ("sensitivity", "outcome"):
                scores.update(sensitivity(ask, gate, stack, step))
                if request.method == "outcome":
                    latents = sensitivity(ask.samples, gate, stack, step)
                    scores.update({path: error + latents[path] for path, error in scores.items()})
            else:
                scores.update(probe_stats(_recorded(gate, ask, request.tokens, request.at), stack, longest=1).scores())

        on_samples(model, calibration, guider, request.at, where, measure)
    if request.method in PATTERNS:
        gone = pattern(request.method, stack, count, keep, calibration.seed)
    else:
        gone = least_important(scores, stack, count, keep)
    seconds = time.perf_counter() - started
    plan = plan_without(gone, stack, model_hash(model), request.method, scores, remove=request.remove)
    paths = tuple(block.path for block in plan.removed(stack))
    lines = [f"{request.method}: {plan.describe(stack)}; {seconds:.2f} s"]
    lines += [f"{stack.at(path).name:12} {score:10.5f}{'  out' if path in paths else ''}" for path, score in scores.items()]
    return Scored(plan, "\n".join(lines), scores, paths)


def probe_layers(
    model: Any, calibration: Calibration, guider: Callable, where: str, longest: int = 10, ridge: float = 1e-4, at: int = 16,
    tokens: int = 1024, judge: str = "cka", step: Callable[[], None] = lambda: None,
) -> LayerStats:  # fmt: skip
    """PPCL's probes of every block. at: points of the flow; tokens: kept of each stream, over all points. judge: of JUDGES; for
    "students" the model is asked once more for every run of blocks, for "outcome" it also samples. step: called for each of these."""
    stack, started, found = stack_under(whole_model(model, where), where), time.perf_counter(), {}
    if judge not in JUDGES:
        raise input_error(where, "judge", judge, ", ".join(JUDGES), "Choose one of these.")
    if judge != "cka" and at < HELD_OUT:
        raise input_error(where, "points", at, f"{HELD_OUT} and more, of which a part judges", "Raise it, or set judge to cka.")

    def measure(gate: Dispatcher, ask: Asked) -> None:
        found.update(probe_tables(_recorded(gate, ask, tokens, at), stack, longest, ridge))
        if judge != "cka":
            found.update(student_tables(model, stack, gate, ask, longest, max(1, tokens // at), step, judge == "outcome"))

    on_samples(model, calibration, guider, at, where, measure)
    return LayerStats(stack, model_hash(model), found, time.perf_counter() - started)


def runs_from(stats: LayerStats, search: RunSearch, where: str) -> Scored:
    """The plan of the runs that `search` finds. Raises: NodeInputError where there are none."""
    stack, table = stats.stack, stats.tables.get(search.merge)
    if table is None:
        remedy = f"Set judge of Layer Probe to {BY_STUDENTS.get(search.merge, 'cka')}, or choose another way here."
        raise input_error(where, "merge_streams", search.merge, ", ".join(stats.tables), remedy)
    keep = protected(search.protect, stack, where)
    if search.merge in BY_STUDENTS and not search.remove:
        remedy = "Set remove, or choose min for the trend rule."
        raise input_error(where, "remove", f"0 with merge_streams {search.merge}", "a share: the trend rule is of CKA", remedy)
    if search.remove:
        runs = best_runs(table, how_many(search.remove, stack, keep, where), search.longest, keep)
    else:
        runs = trend_runs(table, search.longest, search.largest_loss, search.tie, keep)
    if not runs:
        allowed = "a search that finds runs of two blocks or more"
        raise input_error(where, "remove", search.remove, allowed, "Raise largest_loss, protect fewer blocks, or set remove.")
    scores = table.scores()
    plan = PrunePlan(stack.family, stats.model, stack.counts, {}, runs, method="runs", scores=scores)
    losses = {VELOCITY: "velocity error of its student", OUTCOME: "velocity error and final latents' of its student"}
    loss = losses.get(search.merge, "1 - CKA of its probes")
    lines = [f"runs: {plan.describe(stack)}", f"number  run  {loss}"]
    lines += [f"{number}: {run.holder}.{run.first}-{run.last}: {table.loss(run):.4f}" for number, run in enumerate(runs)]
    return Scored(plan, "\n".join(lines), scores, tuple(block.path for block in plan.removed(stack)))


def find_runs(model: Any, search: RunSearch, calibration: Calibration, guider: Callable, where: str, at: int = 16) -> Scored:
    """Probes and search in one."""
    judge = BY_STUDENTS.get(search.merge, "cka")
    return runs_from(probe_layers(model, calibration, guider, where, search.longest, at=at, judge=judge), search, where)


def _recorded(gate: Dispatcher, ask: Callable, tokens: int, at: int) -> Recorder:
    gate.current = recorder = Recorder(max(1, tokens // at))
    ask()
    gate.current = None
    return recorder


@dataclass(frozen=True)
class Asked:
    """A trainee at fixed points around its own samples: asked(held=True) at `judged`, those held out, asked(held=False) at `shown`, the
    others; samples(): final latents of whole runs from other noise, CALL of them at most."""

    trainee: Any
    calibration: Calibration
    fixed: list
    shown: list
    judged: list

    def __call__(self, held: bool | None = None) -> torch.Tensor:
        return velocities(self.trainee, {None: self.fixed, False: self.shown, True: self.judged}[held])

    def samples(self) -> torch.Tensor:
        few = replace(self.calibration, count=min(self.calibration.count, CALL), seed=self.calibration.seed + 1)
        return sample_pool(self.trainee, few)


def on_samples(
    model: Any, calibration: Calibration, guider: Callable, at: int, where: str, measure: Callable[[Dispatcher, Asked], None]
) -> None:
    """measure(gate, ask) with `gate` around every block and `ask` running the model."""
    stack, gate = stack_under(model, where), Dispatcher()

    def body(trainee: Any) -> None:
        pool = checked_pool(trainee, calibration, where)
        fixed = points(PoolData(pool, len(trainee.positive)), at, calibration.seed)
        with torch.no_grad():
            measure(gate, Asked(trainee, calibration, fixed, *parted(fixed)))

    inside(guider, gate_blocks(model, stack.blocks, gate), calibration, body)


def velocity_error(model: Any, teacher: Any, calibration: Calibration, guider: Callable, at: int) -> float:
    """‖v − v_t‖²/‖v_t‖² at fixed points around the teacher's own samples, one model after the other."""
    found: dict[str, Any] = {}

    def ask_teacher(trainee: Any) -> None:
        found["at"] = points(PoolData(sample_pool(trainee, calibration), len(trainee.positive)), at, calibration.seed)
        found["wanted"] = velocities(trainee, found["at"])

    inside(guider, teacher.clone(), calibration, ask_teacher)
    inside(guider, model.clone(), calibration, lambda trainee: found.update(given=velocities(trainee, found["at"])))
    return relative_error(found["given"], found["wanted"])
