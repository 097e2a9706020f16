"""Mixed grains on a MODEL: OUTER_SAMPLE opens a run and drops it in `finally`, APPLY_MODEL merges in the calls of the chosen steps.

A cache from accel/cache stands outside: what it answers itself never comes here. Without a run everything passes untouched.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from ...errors import input_error
from ...families.cost import forward_cost
from ...families.tokens import TokenSpec, token_spec
from ..cache.clock import StepClock
from ..runs import held_in_options
from .binding import CALL_ARGUMENTS, is_attached, refuse_block_caches
from .cells import GrainCells, grain_cells
from .grid import TokenGrid
from .hooks import Unfit
from .mixed_grain import KEY, MergedCall, MixedGrain
from .token_skip import KEY as SKIP_KEY

__all__ = ["GrainLog", "attach_mixed_grain", "call_flops"]

RUN = "rectiflow_mixed_grain_run"
OUTER, APPLY = "outer_sample", "apply_model"
SUPPORTED = "Flux, Chroma, SD3, Qwen-Image, Wan"


class GrainLog:
    """What the last run did, for Attention Report; a node's output, filled while sampling.

    tokens: of the image, and how many the blocks of the range saw. calls: merged, left whole. flops: of one sample's call with and
    without merging, for each length of text.
    """

    def __init__(self):
        self.runs = 0
        self.settings = self.blocks = ""
        self.sides: tuple[int, ...] = ()
        self.tokens = (0, 0)
        self.cells = (0, 0)  # fine tokens and coarse cells
        self.calls = (0, 0)
        self.flops: dict[int, tuple[float, float]] = {}
        self.seconds = 0.0
        self.notes: list[str] = []

    def __deepcopy__(self, memo) -> GrainLog:
        return self

    @property
    def share(self) -> float:
        """Tokens in the range of all the image's."""
        return self.tokens[1] / self.tokens[0] if self.tokens[0] else 1.0

    def text(self) -> str:
        grid = "×".join(map(str, self.sides))
        lines = [
            self.settings,
            f"{grid} = {self.tokens[0]} image tokens; {self.blocks} see {self.tokens[1]}: {self.cells[0]} fine and {self.cells[1]} cells",
            f"model calls: {self.calls[0]} with merged tokens, {self.calls[1]} whole; run {self.seconds:.3f} s",
        ]
        for text, (merged, whole) in self.flops.items():
            lines.append(f"with {text} of text: {merged / 1e9:.4g} of {whole / 1e9:.4g} GFLOP a call and sample, {merged / whole:.1%}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False)


def call_flops(transformer: Any, spec: TokenSpec, plan: MixedGrain, cells: GrainCells, text: int, extra: int = 0) -> tuple[float, float]:
    """FLOPs of one sample's call with merged tokens in the plan's blocks, and without."""
    whole, inside = forward_cost(transformer, spec), forward_cost(transformer, spec, plan.blocks(spec))
    many, few = cells.count + extra, cells.merged + extra
    dense = whole.linear(many, text) + whole.attention(many, text)
    saved = inside.linear(many, text) - inside.linear(few, text) + inside.attention(many, text) - inside.attention(few, text)
    return dense - saved, dense


@dataclass
class _Run:
    """One sampling."""

    plan: MixedGrain
    spec: TokenSpec
    shape: tuple[int, ...]
    clock: StepClock
    cells: GrainCells
    transformer: Any
    log: GrainLog
    made: list[int] = field(default_factory=lambda: [0, 0])
    inside: bool = False
    unfit: bool = False

    def active(self, sigma: float) -> bool:
        """Whether this sigma lies between the chosen shares, counted from the noisy end: an inversion merges where sampling does."""
        moment = self.clock.at(sigma)
        passed = moment.u / max(1, self.clock.steps)
        sigmas = self.clock.sigmas
        if len(sigmas) > 1 and sigmas[0] < sigmas[-1]:
            passed = 1.0 - passed
        chosen = self.plan.start <= passed and (passed < self.plan.end or self.plan.end == 1.0)
        return chosen and self.cells.merged < self.cells.count and not self.unfit

    def note(self, text: str) -> None:
        if text not in self.log.notes:
            self.log.notes.append(text)

    def count(self, call: MergedCall) -> None:
        self.made[0] += 1
        if call.text not in self.log.flops:
            self.log.flops[call.text] = call_flops(self.transformer, self.spec, self.plan, self.cells, call.text, call.extra)


def attach_mixed_grain(model: Any, plan: MixedGrain, log: GrainLog, where: str) -> Any:
    """A clone of MODEL `model` whose blocks see coarse regions as one token each, and that reports to `log`.

    Raises: NodeInputError for settings that do not fit, a family whose tokens cannot be reached between blocks, or a model that computes
    part of its tokens already.
    """
    transformer = model.get_model_object("diffusion_model")
    spec = token_spec(transformer, where)
    if not spec.blocks:
        got = f"{type(transformer).__name__} ({spec.family}), whose blocks have no patches"
        raise input_error(where, "model", got, SUPPORTED, "Use one of these, or Region-Adaptive Sampling, which takes this model.")
    plan.check(spec, where)
    outer = model.wrappers.get(OUTER, {})
    if is_attached(model) or outer.get(KEY) or outer.get(SKIP_KEY):
        got = "a model with region-adaptive sampling, mixed grains or skipped MLPs"
        raise input_error(where, "model", got, "a model without them", "Keep one of these nodes between model and sampler.")
    patched = model.clone()

    def around_run(executor, *args, **kwargs):
        return _sampling(plan, spec, log, where, executor, args, kwargs)

    patched.add_wrapper_with_key(OUTER, KEY, around_run)
    patched.add_wrapper_with_key(APPLY, KEY, _model_call)
    return patched


def _sampling(plan: MixedGrain, spec: TokenSpec, log: GrainLog, where: str, executor: Any, args: tuple, kwargs: dict) -> Any:
    guider = executor.class_obj
    noise = kwargs["noise"] if "noise" in kwargs else args[0]
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    grid = TokenGrid.of(noise.shape[2:], spec.patch, where)
    maps = grid.pool(grid.from_mask(plan.grains.cpu(), len(noise), where, "grain_map"))
    cells = grain_cells(maps, grid, plan.side)
    found = GrainLog()
    found.settings, found.sides, found.tokens = plan.line(), grid.sides, (grid.count, cells.merged)
    found.cells = tuple(cells.frames * part.shape[1] for part in (cells.fine, cells.coarse))
    last = min(plan.last, len(spec.blocks) - 1)
    found.blocks = f"blocks {plan.first} to {last} of 0 to {len(spec.blocks) - 1}"
    transformer = guider.model_patcher.get_model_object("diffusion_model")
    run = _Run(plan, spec, tuple(noise.shape), StepClock(tuple(sigmas.tolist())), cells, transformer, found)
    start = time.perf_counter()
    try:
        with held_in_options(guider, RUN, run):
            return executor(*args, **kwargs)
    finally:
        found.seconds, found.calls, found.runs = time.perf_counter() - start, tuple(run.made), log.runs + 1
        if cells.merged == cells.count:
            found.notes.append("no gain: no region of the map is coarse")
        vars(log).update(vars(found))


def _model_call(executor, *args, **kwargs):
    given = {**dict(zip(CALL_ARGUMENTS, args)), **kwargs}
    rest = args[len(CALL_ARGUMENTS) :]
    options = given.get("transformer_options") or {}
    run: _Run | None = options.get(RUN)
    if run is None or run.inside:
        return executor(*args, **kwargs)
    x, sigmas = given["x"], given["t"].tolist()
    refuse_block_caches(options, "Mixed-Grain Tokens", run.cells.merged < run.cells.count)
    fits = tuple(x.shape[1:]) == run.shape[1:] and len(x) % run.shape[0] == 0 and len(set(sigmas)) == 1
    if not fits:
        run.note("a call over an area, a window or several sigmas passed whole")
    run.inside = True  # a host that merges wrappers twice calls this function within itself
    try:
        if fits and run.active(sigmas[0]):
            call = MergedCall(run.plan, run.spec, run.cells.to(x.device))
            try:
                changed = {**given, "control": call.residuals(given.get("control")), "transformer_options": call.patched(options)}
                first = [changed.pop(name, None) for name in CALL_ARGUMENTS]
                out = executor(*first, *rest, **changed)
                run.count(call)
                return out
            except Unfit as reason:
                logging.warning("Rectiflow mixed grains: calls are made whole: %s", reason)
                run.note(f"calls were made whole: {reason}")
                run.unfit = True
        run.made[1] += 1
        return executor(*args, **kwargs)
    finally:
        run.inside = False
