"""The engine on a MODEL: two wrappers under one key, nothing in the network and nothing in the node.

OUTER_SAMPLE opens a Run and puts it into the options of that sampling alone; APPLY_MODEL, moved outermost, asks it about every model call.
Without a Run (training, a direct call of the model) calls pass untouched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ...errors import input_error
from ...families.arch import ArchSpec, arch_spec
from ...families.blocks import BlockKey, parse_blocks
from ...families.decoupled import decoupled_spec
from ...families.gated import gated_modules
from ...families.modulation import modulated_input
from ...metrics.stopwatch import DeviceClock
from ..runs import held_in_options
from .amplification import Sampling
from .module_target import ModuleTarget
from .report import CacheLog
from .store import Key
from .targets import TARGETS, BlockTarget, Call, OutputTarget, Target
from .visits import CachePlan, Run

__all__ = ["attach", "detach", "is_attached", "make_target"]

KEY = "rectiflow_cache"
RUN = "rectiflow_cache_run"
OUTER, APPLY = "outer_sample", "apply_model"


def make_target(plan: CachePlan, transformer: Any, where: str) -> Target:
    """The target as this transformer can give it.

    Raises: NodeInputError for a transformer without block patches, a range with gaps, or a gate that the transformer cannot have.
    """
    if plan.target not in TARGETS:
        raise input_error(where, "granularity", plan.target, ", ".join(TARGETS), "Choose one of these.")
    probe = plan.policy.probe
    inside = probe is not None and probe.at != "latent"
    if inside and plan.target not in ("last_block", "block_delta"):
        remedy = "This rule looks at the first block; choose one of these."
        raise input_error(where, "granularity", plan.target, "last_block, block_delta", remedy)
    if plan.target in ("output", "output_delta"):
        return OutputTarget(plan.target == "output_delta")
    if plan.target == "condition":
        return _condition_target(transformer, where)
    arch = arch_spec(transformer)
    if plan.target == "modules":
        return ModuleTarget(gated_modules(transformer, arch, where))
    if arch is None:
        remedy = "Use Taylor Forecast Cache, or the rule input_change." if inside else "Set granularity to output."
        raise input_error(where, "granularity", plan.target, f"output: the blocks of {type(transformer).__name__} have no patches", remedy)
    ranges = plan.policy.ranges(arch)
    if ranges is None:
        ranges = {"": _chosen_blocks(plan, arch, where)}
    if not all(ranges.values()):
        raise input_error(where, "model", f"{len(arch.blocks)} blocks", "a model with more", "Set granularity to output.")
    if arch.long_skips and any(blocks[-1] != arch.blocks[-1] for blocks in ranges.values()):
        allowed = f"a range up to the last block: late blocks of {arch.family} read what early ones gave"
        raise input_error(where, "blocks", plan.blocks or plan.policy.line(), allowed, "Leave blocks empty, or name a range to the end.")
    modulated = modulated_input(transformer, where) if inside and probe.at == "entry" else None
    return BlockTarget(arch, ranges, plan.target == "block_delta", modulated)


def _condition_target(transformer: Any, where: str) -> BlockTarget:
    spec = decoupled_spec(transformer)
    if spec is None:
        got = f"condition, with a model of {type(transformer).__name__}"
        remedy = "Set granularity to block_delta over the front blocks, last_block or output: this model has no encoder of its own."
        raise input_error(where, "granularity", got, "condition with decoupled models (an encoder and a decoder)", remedy)
    target = BlockTarget(spec, {"": spec.blocks}, False)
    target.name = "condition"
    return target


def _chosen_blocks(plan: CachePlan, arch: ArchSpec, where: str) -> tuple[BlockKey, ...]:
    """The range that the plan names; the whole stack where it names none."""
    if plan.target != "block_delta" or not plan.blocks.strip():
        return arch.blocks
    named = parse_blocks(plan.blocks, arch.layout, where)
    chosen = tuple(key if key in arch.blocks else (arch.blocks[0][0], key[1]) for key in named)
    first = arch.blocks.index(chosen[0])
    if arch.blocks[first : first + len(chosen)] != chosen:
        allowed = f"one range without gaps in {arch.layout}"
        raise input_error(where, "blocks", plan.blocks, allowed, "Name blocks that follow each other, such as double:1-, single.")
    return chosen


def is_attached(model: Any) -> bool:
    return bool(model.wrappers.get(OUTER, {}).get(KEY))


def attach(model: Any, plan: CachePlan, log: CacheLog, where: str) -> Any:
    """A clone of MODEL `model` that samples with `plan` and reports to `log`.

    Raises: NodeInputError for a model that has a cache already, for limits out of range, and see make_target.
    """
    if is_attached(model):
        remedy = "Keep one cache node between model and sampler, or put Cache Off between the two."
        raise input_error(where, "model", "a model with a cache", "a model without one: two would forecast from forecasts", remedy)
    plan.limits.check(where)
    plan.policy.check(where)
    make_target(plan, model.get_model_object("diffusion_model"), where)
    cached = model.clone()

    def around_run(executor, *args, **kwargs):
        return _sampling(plan, log, where, executor, args, kwargs)

    cached.add_wrapper_with_key(OUTER, KEY, around_run)
    cached.add_wrapper_with_key(APPLY, KEY, _model_call)
    return cached


def detach(model: Any) -> Any:
    """A clone of MODEL `model` without our wrappers."""
    bare = model.clone()
    for kind in (OUTER, APPLY):
        bare.remove_wrappers_with_key(kind, KEY)
    return bare


def _sampling(plan: CachePlan, log: CacheLog, where: str, executor: Any, args: tuple, kwargs: dict) -> Any:
    guider = executor.class_obj
    patcher = guider.model_patcher
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    transformer = patcher.get_model_object("diffusion_model")
    target = make_target(plan, transformer, where)
    clock = DeviceClock(torch.device(patcher.load_device))
    run = Run(plan, target, sigmas.tolist(), clock.device, decoupled_spec(transformer) or arch_spec(transformer), where)
    run.record.prompt = log.running()
    with held_in_options(guider, RUN, run) as options:
        order = options.get("wrappers", {}).get(APPLY)
        if order is not None:
            options["wrappers"][APPLY] = {KEY: order[KEY], **order}
        clock.synchronise()
        start, finished = time.perf_counter(), False
        try:
            result = run.state.sample(Sampling(executor, args, kwargs, lambda continued: _without_run(options, continued)))
            finished = True
            return result
        finally:
            clock.synchronise()
            log.add(run.close(time.perf_counter() - start, finished))
            if order is not None:
                options["wrappers"][APPLY] = order


def _without_run(options: dict, sample: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A sampling within a run that is none of its own: its model calls pass untouched."""
    run = options.pop(RUN)
    try:
        return sample()
    finally:
        options[RUN] = run


def _model_call(executor, *args, **kwargs):
    """x and t stand first; the options are a keyword, or the last dictionary among the arguments. All else passes through."""
    place = None
    options = kwargs.get("transformer_options")
    if options is None:
        place = next((i for i in range(len(args) - 1, -1, -1) if isinstance(args[i], dict)), None)
        options = {} if place is None else args[place]
    run: Run | None = options.get(RUN)
    uuids, kinds = options.get("uuids") or (), options.get("cond_or_uncond") or ()
    if run is None or run.inside or not uuids or len(uuids) != len(kinds) or len(args) < 2 or args[0].shape[0] % len(uuids):
        return executor(*args, **kwargs)
    sigmas = args[1].tolist()
    if any(sigma != sigmas[0] for sigma in sigmas):
        run.record.note("a call whose rows are at different sigmas passed untouched")
        return executor(*args, **kwargs)

    def go_on(changed: dict) -> torch.Tensor:
        if place is None:
            return executor(*args, **{**kwargs, "transformer_options": changed})
        return executor(*args[:place], changed, *args[place + 1 :], **kwargs)

    keys, owners = _keys(executor.class_obj, options, uuids, kinds)
    context = kwargs.get("c_crossattn", args[3] if len(args) > 3 else None)
    text = context.shape[1] if torch.is_tensor(context) and context.ndim > 1 else 0
    run.inside = True  # a host that merges wrappers twice calls this function within itself
    try:
        return run.handle(Call(args[0], sigmas[0], options, go_on, text=text), keys, owners)
    finally:
        run.inside = False


def _keys(base_model: Any, options: dict, uuids: Any, kinds: Any) -> tuple[list[Key], tuple]:
    """A Key a part of the batch, and the objects they name by identity."""
    patches = {**options.get("patches_replace", {}).get("dit", {}), "attention": options.get("optimized_attention_override")}
    patches = {name: patch for name, patch in patches.items() if patch is not None}
    variant = tuple(sorted(((str(name), id(patch)) for name, patch in patches.items())))
    group = getattr(getattr(base_model, "current_patcher", None), "current_hooks", None)
    hooks = tuple((id(hook), float(getattr(hook, "strength", 1.0))) for hook in getattr(group, "hooks", ()))
    window = getattr(options.get("context_window"), "index_list", None)
    window = None if window is None else tuple(window)
    keys = [Key(uuid, int(kind), window, hooks, variant) for uuid, kind in zip(uuids, kinds)]
    return keys, (*patches.values(), *getattr(group, "hooks", ()))
