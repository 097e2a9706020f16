"""Skipped MLPs on a MODEL: OUTER_SAMPLE opens a run and drops it in `finally`; PREDICT_NOISE chooses the tokens of each visit from the
velocity of the one before; APPLY_MODEL hooks the MLPs for the length of a call.

Nothing in the network changes and no token moves: attention, ControlNets and block patches see what they always see.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import input_error
from ...families.cost import forward_cost
from ...families.mlps import MlpSite, chosen_sites, mlp_sites
from ...families.tokens import TokenSpec, token_spec
from ..cache.binding import RUN as CACHE_RUN
from ..cache.clock import StepClock
from ..runs import held_in_options
from .binding import CALL_ARGUMENTS
from .binding import RUN as REGION_RUN
from .grid import TokenGrid
from .mixed_grain import KEY as GRAIN_KEY
from .token_skip import KEY, MlpStore, SkipCall, TokenSkip, scores_of

__all__ = ["SkipLog", "attach_token_skip", "skip_flops"]

RUN = "rectiflow_token_skip_run"
OUTER, PREDICT, APPLY = "outer_sample", "predict_noise", "apply_model"


class SkipLog:
    """What the last run did, for Attention Report; a node's output, filled while sampling.

    tokens: of the image, and how many of them run in a call that skips, mean over pictures. calls: with skipped MLPs, whole. flops: of one
    sample's call with skipping and without, and of its chosen MLPs, for each length of text.
    """

    def __init__(self):
        self.runs = 0
        self.settings = ""
        self.mlps = 0
        self.tokens: tuple[int, float] = (0, 0.0)
        self.calls = (0, 0)
        self.flops: dict[int, tuple[float, float, float]] = {}
        self.kept_bytes = 0
        self.seconds = 0.0
        self.notes: list[str] = []

    def __deepcopy__(self, memo) -> SkipLog:
        return self

    @property
    def share(self) -> float:
        """Tokens that run of all the image's."""
        return self.tokens[1] / self.tokens[0] if self.tokens[0] else 1.0

    def text(self) -> str:
        lines = [
            self.settings,
            f"{self.mlps} MLPs over {self.tokens[1]:g} of {self.tokens[0]} image tokens; calls: {self.calls[0]} so, {self.calls[1]} whole",
            f"outputs kept: {self.kept_bytes / 2**20:.2f} MiB at most; run {self.seconds:.3f} s",
        ]
        for text, (skipping, whole, mlps) in self.flops.items():
            share = f"{skipping / whole:.1%}; these MLPs are {mlps / whole:.1%} of a whole one"
            lines.append(f"with {text} of text: {skipping / 1e9:.4g} of {whole / 1e9:.4g} GFLOP a call and sample, {share}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def skip_flops(
    transformer: Any, spec: TokenSpec, sites: Sequence[MlpSite], tokens: int, running: float, text: int
) -> tuple[float, float, float]:
    """FLOPs of one sample's call in which `running` of `tokens` image tokens go through the MLPs of `sites`, of a whole one, and of those
    MLPs in it."""
    cost = forward_cost(transformer, spec)
    whole = cost.linear(tokens, text) + cost.attention(tokens, text)
    weights = 2.0 * sum(site.weights for site in sites)
    mlps = sum(2.0 * site.weights * (tokens if site.kind == "image" else tokens + text) for site in sites)
    return whole - weights * (tokens - running), whole, mlps


@dataclass
class _Run:
    """One sampling."""

    plan: TokenSkip
    spec: TokenSpec
    network: torch.nn.Module
    sites: tuple[MlpSite, ...]
    beside: tuple[str, ...]  # MLPs over the image alone that run whole
    batch: int
    shape: tuple[int, ...]
    grid: TokenGrid
    clock: StepClock
    store: MlpStore | None
    always: torch.Tensor | None  # (1 or b, n) bool
    log: SkipLog
    made: list[int] = field(default_factory=lambda: [0, 0])
    visiting: bool = False
    inside: bool = False
    phase: str = "whole"  # or skip, or keep: a whole call that keeps outputs
    chosen: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    velocity: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.plan.count(self.grid.count)

    @property
    def enabled(self) -> bool:
        return self.count < self.grid.count and bool(self.sites)

    def note(self, text: str) -> None:
        if text not in self.log.notes:
            logging.info("Rectiflow token skip: %s", text)
            self.log.notes.append(text)

    def begin(self, sigma: float) -> None:
        """Open a visit: whether MLPs skip in it, and which tokens run."""
        self.visiting = True
        steps, moment = max(1, self.clock.steps), self.clock.at(sigma)
        passed, ends = moment.u / steps, self.plan.end
        chosen = self.enabled and self.plan.start <= passed and (passed < ends or ends == 1.0) and sigma > 0.0 and not moment.foreign
        if chosen and self.scores is not None:
            self.phase = "skip"
            top = self.scores.argsort(dim=1, descending=True, stable=True)[:, : self.count]
            self.chosen = torch.zeros_like(self.scores, dtype=torch.bool).scatter_(1, top, True)
            if self.always is not None:
                self.chosen |= self.always.to(self.chosen.device)
            return
        soon = (moment.u + 1) / steps >= self.plan.start
        self.phase = "keep" if self.store is not None and soon and sigma > 0.0 else "whole"

    def finish(self, x: torch.Tensor, denoised: torch.Tensor, sigma: float) -> None:
        self.visiting = False
        if sigma == 0.0 or not self.enabled:
            return
        v = (x.float() - denoised.float()) / sigma
        self.scores = scores_of(self.plan.router, v, self.velocity, denoised, self.grid)
        self.velocity = v

    def call(self, text: int, keys: Sequence[Hashable]) -> SkipCall | None:
        """What hooks the next call, or None for one that stays as it is."""
        skips = self.phase == "skip"
        if skips and self.store is not None and not self.store.has(keys):
            self.note("a condition without kept outputs was computed whole")
            skips = False
        if not skips and self.store is None or self.phase == "whole":
            return None
        even = self.count if self.always is None else None
        return SkipCall(self.sites, self.chosen if skips else None, even, self.grid.count, text, keys, self.store, self.beside)

    def count_call(self, call: SkipCall | None, text: int) -> None:
        skipped = call is not None and call.chosen is not None and bool(call.ran)
        self.made[0 if skipped else 1] += 1
        if call is not None and call.whole:
            self.note(f"computed whole, being of another length or no plain layers: {', '.join(sorted(call.whole)[:4])}")
        if skipped:
            running = float(call.chosen.sum()) / len(call.chosen)
            self.log.tokens = (self.grid.count, running)
            if text not in self.log.flops:
                sites = [site for site in self.sites if site.path in call.ran]
                self.log.flops[text] = skip_flops(self.network, self.spec, sites, self.grid.count, running, text)


def attach_token_skip(model: Any, plan: TokenSkip, log: SkipLog, where: str) -> Any:
    """A clone of MODEL `model` whose MLPs run for part of the image's tokens, and that reports to `log`.

    Raises: NodeInputError for settings that do not fit, a family whose tokens are not known, or a model whose MLPs skip or merge already.
    """
    plan.check(where)
    transformer = model.get_model_object("diffusion_model")
    token_spec(transformer, where)
    chosen_sites(transformer, plan.blocks, where)
    outer = model.wrappers.get(OUTER, {})
    if outer.get(KEY) or outer.get(GRAIN_KEY):
        got = "a model with skipped MLPs or mixed-grain tokens"
        raise input_error(where, "model", got, "a model without them", "Keep one of these nodes between model and sampler.")
    patched = model.clone()

    def around_run(executor, *args, **kwargs):
        return _sampling(plan, log, where, executor, args, kwargs)

    patched.add_wrapper_with_key(OUTER, KEY, around_run)
    patched.add_wrapper_with_key(PREDICT, KEY, _visit)
    patched.add_wrapper_with_key(APPLY, KEY, _model_call)
    return patched


def _opened(plan: TokenSkip, where: str, guider: Any, noise: torch.Tensor, sigmas: torch.Tensor) -> _Run:
    network = guider.model_patcher.get_model_object("diffusion_model")
    spec = token_spec(network, where)
    sites = chosen_sites(network, plan.blocks, where)
    grid = TokenGrid.of(noise.shape[2:], spec.patch, where)
    always = None
    if plan.always is not None:
        always = grid.pool(grid.from_mask(plan.always.cpu(), len(noise), where, "region_mask")) >= 0.5
    store = MlpStore(plan.cap, where) if plan.keeps and plan.count(grid.count) < grid.count else None
    log = SkipLog()
    log.settings, log.mlps, log.tokens = plan.line(), len(sites), (grid.count, float(grid.count))
    clock = StepClock(tuple(sigmas.tolist()))
    beside = tuple(site.path for site in mlp_sites(network, where) if site.kind == "image" and site not in sites)
    return _Run(plan, spec, network, sites, beside, len(noise), tuple(noise.shape), grid, clock, store, always, log)


def _sampling(plan: TokenSkip, log: SkipLog, where: str, executor: Any, args: tuple, kwargs: dict) -> Any:
    guider = executor.class_obj
    noise = kwargs["noise"] if "noise" in kwargs else args[0]
    run = _opened(plan, where, guider, noise, kwargs["sigmas"] if "sigmas" in kwargs else args[3])
    start = time.perf_counter()
    try:
        with held_in_options(guider, RUN, run):
            return executor(*args, **kwargs)
    finally:
        found = run.log
        found.seconds, found.calls, found.runs = time.perf_counter() - start, tuple(run.made), log.runs + 1
        if run.store is not None:
            found.kept_bytes = run.store.peak
            run.store.drop()
        run.chosen = run.scores = run.velocity = None
        vars(log).update(vars(found))


def _visit(executor, x, timestep, *args, **kwargs):
    options = kwargs["model_options"] if "model_options" in kwargs else args[0] if args else {}
    run: _Run | None = options.get("transformer_options", {}).get(RUN)
    if run is None or run.visiting or tuple(x.shape) != run.shape:
        return executor(x, timestep, *args, **kwargs)
    sigma = float(timestep.flatten()[0])
    run.begin(sigma)
    try:
        denoised = executor(x, timestep, *args, **kwargs)
        run.finish(x, denoised, sigma)
        return denoised
    finally:
        run.visiting = False


def _model_call(executor, *args, **kwargs):
    given = {**dict(zip(CALL_ARGUMENTS, args)), **kwargs}
    options = given.get("transformer_options") or {}
    run: _Run | None = options.get(RUN)
    if run is None or run.inside or not run.visiting or not run.enabled:
        return executor(*args, **kwargs)
    _refuse_module_caches(options)
    x, sigmas, keys = given["x"], given["t"].tolist(), tuple(options.get("uuids") or ())
    region = options.get(REGION_RUN)
    fits = keys and len(x) == run.batch * len(keys) and tuple(x.shape[1:]) == run.shape[1:] and len(set(sigmas)) == 1
    if not fits or region is not None and region.phase == "active":
        run.note("a call over an area, a window, several sigmas or part of the tokens passed whole")
        return executor(*args, **kwargs)
    context = given.get("c_crossattn")
    text = context.shape[1] if isinstance(context, torch.Tensor) and context.ndim > 1 else 0
    call = run.call(text, keys)
    run.inside = True  # a host that merges wrappers twice calls this function within itself
    try:
        if call is None:
            out = executor(*args, **kwargs)
        else:
            with call.on(run.network):
                out = executor(*args, **kwargs)
    finally:
        run.inside = False
    run.count_call(call, text)
    return out


def _refuse_module_caches(options: dict) -> None:
    cache = options.get(CACHE_RUN)
    if getattr(getattr(cache, "target", None), "name", "") == "modules":
        remedy = "Set granularity of the cache node to another: modules keeps what MLPs give, which is a part here."
        raise input_error("Cache with Token-Skip MLP", "granularity", "modules", "output, last_block or block_delta", remedy)
