"""Every editing method behind one call, so that a node and a bench compare them on the same picture, prompts and schedule.

A method is a line such as `rf_edit steps=14 inject_steps=8 cfg=2`; METHODS lists the options of each with their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ..errors import input_error
from .feature_sharing import FeatureBank, RecordPlan, ReplayPlan, sample_rf_edit
from .flow_edit import FlowEditSampler
from .inversion import InvertSampler, inversion_sigmas
from .kv_edit import KVEditSampler
from .rf_inversion import sample_rf_inversion_forward, sample_rf_inversion_reverse
from .sampler_object import FlowSampler
from .source_target import source_target_guider
from .uni_edit import UniEditSampler

__all__ = ["METHODS", "EditTask", "HostCalls", "Method", "parse_methods", "resampled", "run_method"]


@dataclass(frozen=True)
class HostCalls:
    """What a comparison needs of the host: its functions sample_custom, calc_cond_batch, cfg_function, its classes CFGGuider, KSAMPLER."""

    sample_custom: Callable
    calc_cond_batch: Callable
    cfg_function: Callable
    cfg_guider: type
    ksampler: type


@dataclass(frozen=True)
class EditTask:
    """model: the host's patcher; source, target, negative: CONDITIONING; latent: the picture `(b, …)`; sigmas: falling; seed: of noise;
    mask: `(b or 1, h, w)`, what shall change, which kv_edit needs."""

    model: Any
    source: list
    target: list
    negative: list
    latent: torch.Tensor
    sigmas: torch.Tensor
    seed: int = 0
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Method:
    """name: a key of METHODS; options: all of its options; text: the line as it was written."""

    name: str
    options: Mapping[str, Any]
    text: str


def _run(task: EditTask, host: HostCalls, sampler, sigmas, latent, positive, cfg) -> torch.Tensor:
    none = torch.zeros_like(latent)
    return host.sample_custom(task.model, none, cfg, sampler, sigmas, positive, task.negative, latent, disable_pbar=True, seed=task.seed)


def _edit_features(task: EditTask, host: HostCalls, options: Mapping, solver: str) -> torch.Tensor:
    """Inversion by `solver`, edit by the same, features shared in `inject_steps` steps; with 0 it is the solver alone."""
    steps = min(options["inject_steps"], len(task.sigmas) - 1)
    bank = FeatureBank(RecordPlan(steps, options["blocks"]), solver)
    bank.sigmas = inversion_sigmas(task.sigmas)
    try:
        inverted = _run(task, host, InvertSampler(solver, watch=bank.watch if steps else None), bank.sigmas, task.latent, task.source, 1.0)
        plan = ReplayPlan(steps, options["match"], options["tokens"], "cond_and_uncond", options["strength"])
        sampler = host.ksampler(sample_rf_edit, {"bank": bank, "plan": plan, "calc_cond_batch": host.calc_cond_batch})
        return _run(task, host, FlowSampler(sampler, "latent"), task.sigmas, inverted, task.target, options["cfg"])
    finally:
        bank.release()


def _rf_inversion(task: EditTask, host: HostCalls, options: Mapping) -> torch.Tensor:
    """The controlled ODE; its way up sees the empty prompt, as published."""
    up = InvertSampler(sample_rf_inversion_forward, {"gamma": options["gamma"], "seed": task.seed})
    inverted = _run(task, host, up, inversion_sigmas(task.sigmas), task.latent, task.negative, 1.0)
    pull = {name: options[name] for name in ("eta", "start", "end", "trend")}
    down = FlowSampler(host.ksampler(sample_rf_inversion_reverse, {"source": task.latent, **pull}), "latent")
    return _run(task, host, down, task.sigmas, inverted, task.target, options["cfg"])


def _two_sided(task: EditTask, host: HostCalls, options: Mapping, sampler) -> torch.Tensor:
    calls = (host.calc_cond_batch, host.cfg_function)
    guider = source_target_guider(host.cfg_guider, task.model, calls, options["cfg_source"], options["cfg"])
    sides = {"positive": task.target, "negative": task.negative, "source": task.source, "source_negative": task.negative}
    guider.inner_set_conds(sides)
    return guider.sample(torch.zeros_like(task.latent), task.latent, sampler, task.sigmas, disable_pbar=True, seed=task.seed)


def _flow_edit(task: EditTask, host: HostCalls, options: Mapping) -> torch.Tensor:
    return _two_sided(task, host, options, FlowEditSampler(options["skip"], options["refine"], options["n_avg"], task.seed))


def _uni_edit(task: EditTask, host: HostCalls, options: Mapping) -> torch.Tensor:
    return _two_sided(task, host, options, UniEditSampler(options["alpha"], options["omega"]))


def _kv_edit(task: EditTask, host: HostCalls, options: Mapping) -> torch.Tensor:
    return _two_sided(task, host, options, KVEditSampler(task.mask, options["skip"], options["start"], task.seed))


def _by(solver: str) -> Callable:
    return lambda task, host, options: _edit_features(task, host, options, solver)


_FEATURES = {"cfg": 2.0, "inject_steps": 3, "blocks": "single:20-37", "match": "interval", "tokens": "all", "strength": 1.0}

# name → (function, its options and their defaults); every method also takes steps.
METHODS = MappingProxyType({
    "euler": (_by("euler"), {**_FEATURES, "inject_steps": 0}),
    "rf_edit": (_by("rf_solver"), _FEATURES),
    "fireflow": (_by("fireflow"), _FEATURES),
    "rf_inversion": (_rf_inversion, {"cfg": 2.0, "gamma": 0.5, "eta": 0.9, "start": 0.0, "end": 0.25, "trend": "constant"}),
    "flow_edit": (_flow_edit, {"cfg": 5.5, "cfg_source": 1.5, "skip": 4, "refine": 0, "n_avg": 1}),
    "uni_edit": (_uni_edit, {"cfg": 1.0, "cfg_source": 1.0, "alpha": 0.6, "omega": 5.0}),
    "kv_edit": (_kv_edit, {"cfg": 2.0, "cfg_source": 1.0, "skip": 0, "start": "inverted"}),
})


def parse_methods(text: str, where: str) -> list[Method]:
    """One method a line, its options as name=value; empty lines are left out.

    Raises: NodeInputError for an unknown method or option, or a value of another kind.
    """
    found = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, *pairs = line.split()
        if name not in METHODS:
            raise input_error(where, "methods", line, ", ".join(METHODS), "Write one method a line, such as: rf_edit cfg=2")
        defaults = {"steps": 0, **METHODS[name][1]}
        options = dict(defaults)
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in defaults:
                raise input_error(where, "methods", line, f"{name} with {', '.join(defaults)}", "Write options as name=value.")
            options[key] = _value(value, defaults[key], key, line, where)
        found.append(Method(name, MappingProxyType(options), line))
    if not found:
        raise input_error(where, "methods", text, ", ".join(METHODS), "Write one method a line.")
    return found


def _value(value: str, default: Any, key: str, line: str, where: str) -> Any:
    if isinstance(default, str):
        return value
    kind = type(default)
    try:
        number = kind(value)
    except ValueError:
        number = -1
    if not 0 <= number <= 1000:
        whole = "a whole number" if kind is int else "a number"
        raise input_error(where, "methods", line, f"{key}={whole} from 0 to 1000", "Correct this option.")
    return number


def resampled(sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """The schedule at another number of steps: its values read between each other, ends kept. 0 leaves it as it is."""
    if steps in (0, len(sigmas) - 1):
        return sigmas
    place = torch.linspace(0, len(sigmas) - 1, steps + 1)
    low = place.floor().long().clamp_max(len(sigmas) - 2)
    return torch.lerp(sigmas[low], sigmas[low + 1], place - low)


def run_method(method: Method, task: EditTask, host: HostCalls) -> tuple[torch.Tensor, int, int]:
    """The edited latent `(b, …)`, the model calls it took and the rows in them (a prompt and its negative are two)."""
    rows: list[int] = []
    model = task.model.clone()

    def count(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key("apply_model", "rectiflow_edit_methods", count)
    changed = {"model": model, "sigmas": resampled(task.sigmas, method.options["steps"])}
    edited = METHODS[method.name][0](EditTask(**{**task.__dict__, **changed}), host, method.options)
    return edited, len(rows), sum(rows)
