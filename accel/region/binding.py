"""RAS on a MODEL: three wrappers under one key and, for NextDiT, two object patches; nothing in the network and nothing in the node.

OUTER_SAMPLE opens a RegionRun and drops it in `finally`; PREDICT_NOISE opens and closes each visit; APPLY_MODEL makes the calls. A cache
from accel/cache stands outside: what it answers itself never comes here. Without a run (training, a direct call) everything passes
untouched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ...errors import input_error
from ...families.tokens import TokenSpec, token_spec
from ..cache.binding import RUN as CACHE_RUN
from ..runs import held_in_options
from .embed import NAMES, embed_patches, running
from .hooks import PartialCall
from .mixed_grain import KEY as GRAIN_KEY
from .plan import RegionPlan
from .report import RegionLog
from .run import RegionRun, RunShape

__all__ = ["CALL_ARGUMENTS", "attach", "detach", "is_attached", "refuse_block_caches"]

KEY = "rectiflow_ras"
RUN = "rectiflow_ras_run"
OUTER, PREDICT, APPLY = "outer_sample", "predict_noise", "apply_model"
CALL_ARGUMENTS = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")
_CALLBACK, _MASK, _SIGMAS, _SEED = 5, 4, 3, 7  # places in OUTER_SAMPLE's arguments


def is_attached(model: Any) -> bool:
    return bool(model.wrappers.get(OUTER, {}).get(KEY))


def attach(model: Any, plan: RegionPlan, log: RegionLog, where: str) -> Any:
    """A clone of MODEL `model` that samples with `plan` and reports to `log`.

    Raises: NodeInputError for settings that do not fit, a model that has RAS already, or a family whose tokens cannot be reached.
    """
    plan.check(where)
    if model.wrappers.get(OUTER, {}).get(GRAIN_KEY):
        remedy = "Keep one of these nodes between model and sampler."
        raise input_error(where, "model", "a model with mixed-grain tokens", "a model without them", remedy)
    if is_attached(model):
        remedy = "Keep one of these nodes between model and sampler."
        raise input_error(where, "model", "a model with region-adaptive sampling", "a model without it", remedy)
    spec = token_spec(model.get_model_object("diffusion_model"), where)
    patched = model.clone()
    if not spec.blocks:
        if not hasattr(patched, "add_object_patch"):
            remedy = "Use a host whose models take object patches."
            raise input_error(where, "model", spec.family, "a model that takes object patches", remedy)
        paths = [f"diffusion_model.{name}" for name in NAMES]
        for path, patch in zip(paths, embed_patches(*(patched.get_model_object(path) for path in paths))):
            patched.add_object_patch(path, patch)

    def around_run(executor, *args, **kwargs):
        return _sampling(plan, spec, log, where, executor, args, kwargs)

    patched.add_wrapper_with_key(OUTER, KEY, around_run)
    patched.add_wrapper_with_key(PREDICT, KEY, _visit)
    patched.add_wrapper_with_key(APPLY, KEY, _model_call)
    return patched


def detach(model: Any) -> Any:
    """A clone of MODEL `model` without our wrappers; object patches that stay hand everything on."""
    bare = model.clone()
    for kind in (OUTER, PREDICT, APPLY):
        bare.remove_wrappers_with_key(kind, KEY)
    return bare


def _sampling(plan: RegionPlan, spec: TokenSpec, log: RegionLog, where: str, executor: Any, args: tuple, kwargs: dict) -> Any:
    def given(name: str, place: int) -> Any:
        return kwargs[name] if name in kwargs else args[place] if len(args) > place else None

    noise, seed = given("noise", 0), given("seed", _SEED)
    sigmas = tuple(given("sigmas", _SIGMAS).tolist())
    run = RegionRun(plan, spec, RunShape(noise.shape, sigmas, int(seed or 0), given("denoise_mask", _MASK)), where)
    preview = _Preview(run, given("callback", _CALLBACK)) if plan.overlay and run.enabled else None
    if preview is not None and preview.callback is not None:
        if "callback" in kwargs:
            kwargs = {**kwargs, "callback": preview}
        else:
            args = (*args[:_CALLBACK], preview, *args[_CALLBACK + 1 :])
    start, finished = time.perf_counter(), False
    try:
        with held_in_options(executor.class_obj, RUN, run):
            result = executor(*args, **kwargs)
            finished = True
            if preview is not None:
                preview.restore()
            return result
    finally:
        log.add(run.close(time.perf_counter() - start, finished))


class _Preview:
    """The sampler's callback, shown the tokens that are computed. A last call gives back the picture as it is, for whoever keeps it."""

    def __init__(self, run: RegionRun, callback: Callable | None):
        self.run, self.callback = run, callback
        self.last: tuple | None = None

    def __call__(self, step: int, x0: Any, x: Any, total: int, *args, **kwargs) -> Any:
        shown = x0 if step >= total - 1 else self.run.overlay(x0)
        self.last = None if shown is x0 else (step, x0, x, total, *args)
        return self.callback(step, shown, x, total, *args, **kwargs)

    def restore(self) -> None:
        if self.last is not None:
            self.callback(*self.last)


def _visit(executor, x, timestep, *args, **kwargs):
    options = kwargs["model_options"] if "model_options" in kwargs else args[0] if args else {}
    run: RegionRun | None = options.get("transformer_options", {}).get(RUN)
    if run is None or run.visiting:
        return executor(x, timestep, *args, **kwargs)
    sigma = float(timestep.flatten()[0])
    if x.shape[0] != run.batch or tuple(x.shape[2:]) != run.grid.shape:
        return executor(x, timestep, *args, **kwargs)
    run.begin(sigma)
    try:
        denoised = executor(x, timestep, *args, **kwargs)
        run.finish(x, denoised, sigma)
        return denoised
    finally:
        run.visiting = False


def _model_call(executor, *args, **kwargs):
    given = {**dict(zip(CALL_ARGUMENTS, args)), **kwargs}
    rest = args[len(CALL_ARGUMENTS) :]
    options = given.get("transformer_options") or {}
    run: RegionRun | None = options.get(RUN)
    if run is None or run.inside or not run.visiting:
        return executor(*args, **kwargs)
    x, sigmas, uuids, kinds = given["x"], given["t"].tolist(), options.get("uuids") or (), options.get("cond_or_uncond") or ()
    fits = uuids and len(uuids) == len(kinds) and x.shape[0] == run.batch * len(uuids) and tuple(x.shape[2:]) == run.grid.shape
    if not fits or any(sigma != sigmas[0] for sigma in sigmas):
        run.record.note("a call over an area, a window or several sigmas passed untouched")
        return executor(*args, **kwargs)
    refuse_block_caches(options, "Region-Adaptive Sampling", run.enabled)

    def go(partial: PartialCall | None) -> torch.Tensor:
        if partial is None:
            return executor(*args, **kwargs)
        changed = {**given, "control": partial.residuals(given.get("control"), x.shape[0]), "transformer_options": partial.patched(options)}
        first = [changed.pop(name, None) for name in CALL_ARGUMENTS]
        with nullcontext() if run.spec.blocks else running(partial):
            return executor(*first, *rest, **changed)

    run.inside = True  # a host that merges wrappers twice calls this function within itself
    try:
        return run.call(x, sigmas[0], list(zip(uuids, kinds)), go)
    finally:
        run.inside = False


def refuse_block_caches(options: dict, beside: str, enabled: bool) -> None:
    """Raises: NodeInputError where a cache keeps tokens by place, in a run where `beside`, a node's title, moves them."""
    cache = options.get(CACHE_RUN)
    target = getattr(getattr(cache, "target", None), "name", "output")
    if cache is not None and target not in ("output", "output_delta") and enabled:
        remedy = "Set granularity of the cache node to output: other caches keep tokens by place, which move here."
        raise input_error(f"Cache with {beside}", "granularity", target, "output", remedy)
