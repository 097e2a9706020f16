"""Block importance of a host's MODEL, measured on its own samples: from what a node was given to a plan, a report and numbers to draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..accel.prune.apply import plan_of, stack_under
from ..accel.prune.gates import gate_blocks
from ..accel.prune.identity import model_hash
from ..accel.prune.plan import PrunePlan
from ..accel.prune.probes import Recorder, best_runs, probe_stats, trend_runs
from ..accel.prune.scores import Dispatcher, magnitude, relative_error, sensitivity, similarity
from ..accel.prune.select import PATTERNS, how_many, least_important, pattern, plan_without, protected
from ..errors import input_error
from .pool import Calibration, PoolData, checked_pool, inside, points, sample_pool, velocities

__all__ = ["RunSearch", "ScoreRequest", "Scored", "find_runs", "score_blocks"]


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
    """remove: share of the blocks, 0 for the trend rule alone. The others as in probes.py."""

    remove: float = 0.0
    longest: int = 10
    largest_loss: float = 0.1
    tie: float = 1e-3
    ridge: float = 1e-4
    protect: str = "0, -1"
    at: int = 16
    tokens: int = 1024


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


def score_blocks(model: Any, request: ScoreRequest, calibration: Calibration, guider: Callable, where: str) -> Scored:
    """Score the blocks, leave out the least important. Raises: NodeInputError for shares and lists that do not fit."""
    stack, started = stack_under(whole_model(model, where), where), time.perf_counter()
    keep = protected(request.protect, stack, where)
    count = how_many(request.remove, stack, keep, where)
    scores: dict[str, float] = {}
    if request.method == "magnitude":
        scores = dict(magnitude(model, stack))
    elif request.method not in PATTERNS:

        def measure(gate: Dispatcher, ask: Callable) -> None:
            if request.method == "similarity":
                scores.update(similarity(ask, gate))
            elif request.method == "sensitivity":
                scores.update(sensitivity(ask, gate, stack))
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


def find_runs(model: Any, search: RunSearch, calibration: Calibration, guider: Callable, where: str) -> tuple[Scored, Any]:
    """PPCL's search: probes, CKA, runs. Returns the plan and the ProbeStats it came from."""
    stack, started = stack_under(whole_model(model, where), where), time.perf_counter()
    keep = protected(search.protect, stack, where)
    found = []
    on_samples(
        model, calibration, guider, search.at, where,
        lambda gate, ask: found.append(probe_stats(_recorded(gate, ask, search.tokens, search.at), stack, search.longest, search.ridge)),
    )  # fmt: skip
    stats = found[0]
    if search.remove:
        runs = best_runs(stats, how_many(search.remove, stack, keep, where), search.longest, keep)
    else:
        runs = trend_runs(stats, search.longest, search.largest_loss, search.tie, keep)
    if not runs:
        allowed = "a search that finds runs of two blocks or more"
        raise input_error(where, "remove", search.remove, allowed, "Raise largest_loss, protect fewer blocks, or set remove.")
    scores = stats.scores()
    plan = PrunePlan(stack.family, model_hash(model), stack.counts, {}, runs, method="runs", scores=scores)
    lines = [f"runs: {plan.describe(stack)}; {time.perf_counter() - started:.2f} s", "run: 1 - CKA of the probes"]
    lines += [f"{run.holder}.{run.first}-{run.last}: {stats.loss(run):.4f}" for run in runs]
    return Scored(plan, "\n".join(lines), scores, tuple(block.path for block in plan.removed(stack))), stats


def _recorded(gate: Dispatcher, ask: Callable, tokens: int, at: int) -> Recorder:
    gate.current = recorder = Recorder(max(1, tokens // at))
    ask()
    gate.current = None
    return recorder


def on_samples(
    model: Any, calibration: Calibration, guider: Callable, at: int, where: str, measure: Callable[[Dispatcher, Callable], None]
) -> None:
    """measure(gate, ask) with `gate` around every block, `ask` running the model at fixed points around its own samples."""
    stack, gate = stack_under(model, where), Dispatcher()

    def body(trainee: Any) -> None:
        pool = checked_pool(trainee, calibration, where)
        fixed = points(PoolData(pool, len(trainee.positive)), at, calibration.seed)
        with torch.no_grad():
            measure(gate, lambda: velocities(trainee, fixed))

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
