"""Runs of double blocks of a host's MODEL whose text is nearly linear, measured on its own samples, and the model with maps there."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..accel.prune.plan import Run
from ..accel.prune.probes import ProbeStats, best_runs
from ..accel.prune.scores import Dispatcher, relative_error
from ..accel.prune.text_runs import TextTokens, text_blocks, text_losses, with_text_runs
from ..errors import input_error
from ..families.stack import StackBlock
from .pool import HELD_OUT, Calibration, inside, velocities
from .prune_scores import Asked, on_samples

__all__ = ["JUDGES", "TextLinearised", "TextRequest", "linearise_text"]


JUDGES = ("velocity", "maps")


@dataclass(frozen=True)
class TextRequest:
    """runs: such as "1-2, 4-6" within the double blocks; "" for those that lose least and spare `count` blocks their text, each of
    `longest` blocks at most. judge: what a run loses, of JUDGES. at: points of the flow that are asked; tokens: kept of each block over
    all of them."""

    runs: str = ""
    count: int = 1
    longest: int = 6
    judge: str = "velocity"
    at: int = 32
    tokens: int = 8192


@dataclass(frozen=True)
class TextLinearised:
    """model; what every run that was looked at loses, by the judge; the runs whose text is linear now; a report for people."""

    model: Any
    losses: Mapping[str, float]
    runs: tuple[Run, ...]
    report: str


def linearise_text(
    model: Any, request: TextRequest, calibration: Calibration, guider: Callable, where: str,
    steps: Callable[[int], Callable[[], None]] = lambda count: lambda: None,
) -> TextLinearised:  # fmt: skip
    """The text of runs of blocks as maps.

    By "maps", as published, a run loses what its maps leave unsaid of its text. By "velocity" it loses ‖v − v_t‖²/‖v_t‖² of the model's
    answer with that run's maps in place, where they were not fitted: text that nobody reads any more may be said badly. steps(count): of a
    bar with so many parts, what is called for each.

    Raises: NodeInputError for a family without text of its own weights, runs that are not there, and more blocks than there are.
    """
    started = time.perf_counter()
    parts, groups = text_blocks(model, where)
    asked, longest = _asked(request, groups, where), request.longest
    if request.judge not in JUDGES:
        raise input_error(where, "judge", request.judge, ", ".join(JUDGES), "Choose one of these.")
    if request.at < HELD_OUT:
        raise input_error(where, "points", request.at, f"{HELD_OUT} and more, of which a part judges", "Raise it.")
    if asked:
        groups = tuple(tuple(block for group in groups for block in group if block in run) for run in asked)
        longest = max(map(len, groups))
    tokens = TextTokens(parts, max(1, request.tokens // request.at), calibration.seed)
    answers: list[Tensor] = []
    judged: list = []

    def unguided(at: list) -> list:
        """The same points with the negative prompt, which guidance asks as often; it is the one of use, so that it need not be held out."""
        return [(x, sigma, [None] * len(cond)) for x, sigma, cond in at] if calibration.negative else []

    def measure(gate: Dispatcher, ask: Asked) -> None:
        network = model.model.diffusion_model
        with ExitStack() as hooks:
            for block in (block for group in groups for block in group):
                layer = network.get_submodule(f"{block.path}.{parts.qkv[0]}")  # as it lies there during the run
                hooks.enter_context(layer.register_forward_pre_hook(tokens.hook(block.path)))
            gate.current = tokens
            tokens.held = False
            velocities(ask.trainee, ask.shown + unguided(ask.shown))
            tokens.held = True
            answers.append(velocities(ask.trainee, ask.judged))
            tokens.held = gate.current = None
        judged.extend(ask.judged + unguided(ask.judged))
        if calibration.negative:
            answers.append(velocities(ask.trainee, unguided(ask.judged)))

    def velocity_loss(patched: Any) -> float:
        given = {}
        inside(guider, patched.clone(), calibration, lambda trainee: given.update(velocity=velocities(trainee, judged)))
        return relative_error(given["velocity"], torch.cat(answers))

    on_samples(model, calibration, guider, request.at, where, measure)
    blocks = len(getattr(model.model.diffusion_model, parts.holder))
    with torch.inference_mode(False), torch.no_grad():
        unsaid, found = text_losses(tokens, groups, longest, blocks)
        stats, candidates = unsaid, _finite(unsaid, parts.holder, blocks)
        if request.judge == "velocity":
            table, step = torch.full((blocks, blocks), float("nan"), dtype=torch.float64), steps(len(candidates))
            for run in candidates:
                step()
                table[run.first, run.last] = 1.0 - velocity_loss(with_text_runs(model, [run], tokens, found))
            stats = ProbeStats({parts.holder: table})
        runs = asked or best_runs(stats, request.count, longest)
        if not runs:
            allowed = f"a number of blocks that runs of 2 to {longest} neighbours can spare"
            raise input_error(where, "count", request.count, allowed, "Lower it, or allow longer runs.")
        patched = with_text_runs(model, runs, tokens, found)
        lost = velocity_loss(patched)
    sizes = f"{model.model_size() / 2**20:.2f} → {patched.model_size() / 2**20:.2f} MiB"
    chosen = ", ".join(map(_name, runs))
    lines = [f"text of blocks {chosen} is linear: velocity error {lost:.4f}; {sizes}; {time.perf_counter() - started:.2f} s", ""]
    lines += ["| run | unsaid by its maps | velocity error | |", "|---|---|---|---|"]
    for run in candidates:
        said = f"{stats.loss(run):.4f}" if request.judge == "velocity" else ""
        lines.append(f"| {_name(run)} | {unsaid.loss(run):.4f} | {said} | {'linear' if run in runs else ''} |")
    return TextLinearised(patched, {_name(run): stats.loss(run) for run in candidates}, tuple(runs), "\n".join(lines))


def _finite(stats: ProbeStats, holder: str, blocks: int) -> list[Run]:
    runs = [Run(holder, first, last) for first in range(blocks) for last in range(first + 1, blocks)]
    return [run for run in runs if math.isfinite(stats.loss(run))]


def _name(run: Run) -> str:
    return f"{run.first}-{run.last}"


def _asked(request: TextRequest, groups: tuple[tuple[StackBlock, ...], ...], where: str) -> tuple[Run, ...]:
    """The runs that `runs` names, none for an empty text.

    Raises: NodeInputError for what is no list of runs, and runs that overlap or hold other blocks than those with text of their own.
    """
    found: list[Run] = []
    there = "; ".join(f"{group[0].index} to {group[-1].index}" for group in groups) or "none"
    allowed = f"runs of two neighbours and more such as 1-2, 4-6 within {there}, without overlap"
    for part in filter(None, (part.strip() for part in request.runs.split(","))):
        match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", part)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        inside = any(group[0].index <= first < last <= group[-1].index for group in groups)
        if not match or not inside or any(run.first <= last and first <= run.last for run in found):
            raise input_error(where, "runs", part, allowed, "Correct the list, or leave it empty.")
        found.append(Run(groups[0][0].holder, first, last))
    return tuple(found)
