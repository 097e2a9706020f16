"""One number in place of a cache's settings: policy, target and steps as a preset, or a recording of the user's model, gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import input_error
from ...families.arch import arch_spec
from ..attention.dispatch import KEY as ATTENTION
from ..attention.rope import KEY as ROPE
from ..region.binding import KEY as REGION
from .binding import KEY as CACHE
from .policy import Limits
from .preset import MOST_SPEED, Point, Preset, preset_for
from .recording import Recording
from .schedule import CacheSchedule
from .schedule_search import SearchOptions, search_schedule
from .scheduled import ScheduledCache
from .spread import SpreadCache, SpreadSchedule, budget_of
from .taylor import TaylorSeer
from .visits import CachePlan

__all__ = ["Chosen", "calibrated", "companions", "from_preset", "replayed"]

KNOWN = {REGION: "region-adaptive sampling", ATTENTION: "grouped attention", ROPE: "RoPE extrapolation", "torch.compile": "torch.compile"}


@dataclass(frozen=True)
class Chosen:
    """plan: for `attach`; text: what it is and what is known of it, in lines."""

    plan: CachePlan
    text: str


def _check_speed(speed: float, where: str) -> None:
    if not 1.0 <= speed <= MOST_SPEED:
        raise input_error(where, "speed", speed, f"1 to {MOST_SPEED:g}", "1 is off, 2 computes half of the steps.")


def from_preset(model: Any, speed: float, where: str) -> Chosen:
    """For MODEL `model` as it stands. speed: 1, off, to 4.

    Raises: NodeInputError for other speeds.
    """
    _check_speed(speed, where)
    network = model.get_model_object("diffusion_model")
    if speed == 1.0:
        return _told(CachePlan(SpreadCache()), model, "speed 1: off, every step is computed")
    arch = arch_spec(network)
    preset = preset_for(arch.family if arch is not None else "")
    targets, remark = ("last_block", "output"), ""
    if arch is None:
        targets, remark = ("output",), "; its blocks have no patches"
    elif REGION in _wrapper_keys(model):
        targets, remark = ("output",), "; region-adaptive sampling computes only some tokens of a step"
    point = preset.best(speed, targets)
    plan = _plan(point, preset, speed)
    name = arch.family if arch is not None else type(network).__name__
    head = f"speed {speed:g}: {plan.policy.line()}; granularity {plan.target}{remark}"
    return _told(plan, model, head, *_figures(preset, point, speed, name))


def _plan(point: Point, preset: Preset, speed: float) -> CachePlan:
    """A measured schedule is stretched to the very speed; intervals stay those of the point."""
    settings = point.settings
    if point.policy == "schedule":
        schedule = SpreadSchedule(point.shares, speed, preset.steps, point.reach)
        return CachePlan(SpreadCache(settings["order"], speed=speed), point.target, schedule=schedule)
    policy = TaylorSeer(settings["order"], interval=settings["interval"])
    return CachePlan(policy, point.target, Limits(settings["warmup_steps"], settings["tail_steps"]))


def _figures(preset: Preset, point: Point, speed: float, name: str) -> list[str]:
    if not preset.measured_on:
        lines = [f"not measured on {name}: a cautious setting, about {point.ratio:g}× fewer steps over 28"]
        if point.ratio < speed - 0.2:
            lines.append(f"{speed:g}× was asked; without a measurement no more than that is done: record your model and link recording")
        return lines
    decibels = f"PSNR {point.psnr:.1f} dB, worst picture {point.psnr_worst:.1f} dB"
    return [
        f"preset {preset.family}, measured at {point.ratio:.3g}×: {decibels}, against no cache",
        f"measured on {preset.measured_on}; other models differ: link recording to search on your own",
    ]  # fmt: skip


def calibrated(model: Any, recording: Recording, speed: float, where: str) -> Chosen:
    """Searched on a recording of the user's model, for its steps and target: forecasts fitted to it, weighed by what the recording knows.

    Raises: NodeInputError for a recording without a whole run, and speeds from 1 to 4 that are none.
    """
    _check_speed(speed, where)
    runs = recording.whole_runs(where)
    metric = "guided" if all(len(run.guided) == run.steps for run in runs) else "rel_l2"
    weights = "amplified" if any(run.amplification for run in runs) else "dsigma"
    options = SearchOptions(budget_of(speed, runs[-1].steps), 1, metric=metric, weights=weights, fitted=True)
    found = search_schedule(recording, options, where)
    schedule = found.schedule
    gain = f", {schedule.cost / schedule.even_cost:.0%} of the error of even steps" if schedule.even_cost > 0 else ""
    how = f"{metric} errors, weights {weights}, fitted forecasts"
    head = f"speed {speed:g}: searched on {found.pictures} recorded pictures, {schedule.line()}, {how}{gain}"
    return _replay(model, schedule, head)


def replayed(model: Any, schedule: CacheSchedule) -> Chosen:
    """As a given schedule has it; it says itself how many steps are computed."""
    return _replay(model, schedule, f"schedule as given, {schedule.line()}, order {schedule.order}; speed is not asked")


def _replay(model: Any, schedule: CacheSchedule, head: str) -> Chosen:
    target = schedule.target or "last_block"
    plan = CachePlan(ScheduledCache.of(schedule), target, blocks=schedule.blocks, schedule=schedule)
    return _told(plan, model, f"{head}; granularity {target}")


def _told(plan: CachePlan, model: Any, *lines: str) -> Chosen:
    others = companions(model)
    also = [f"also on this model, kept: {', '.join(others)}"] if others else []
    return Chosen(plan, "\n".join([*lines, *also]))


def _wrapper_keys(model: Any) -> list[str]:
    """Of what other nodes put around the model's calls, by MODEL or by its options."""
    inside = model.model_options.get("transformer_options", {}).get("wrappers", {})
    tables = [*model.wrappers.values(), *inside.values()]
    found = [str(key) for table in tables for key, members in table.items() if members and key is not None]
    return [key for key in dict.fromkeys(found) if key != CACHE]


def companions(model: Any) -> list[str]:
    """What else changes this model's calls, in words: wrappers, block patches, an attention override, patched weights, hooks."""
    options = model.model_options.get("transformer_options", {})
    found = [KNOWN.get(key, key) for key in _wrapper_keys(model)]
    if blocks := len(options.get("patches_replace", {}).get("dit", {})):
        found.append(f"patches of {blocks} block" + "s" * (blocks > 1))
    if options.get("optimized_attention_override") is not None:
        found.append("an attention override")
    if model.patches:
        found.append(f"{len(model.patches)} patched weights (LoRA)")
    if model.object_patches:
        found.append(f"{len(model.object_patches)} replaced parts ({', '.join(sorted(model.object_patches))[:80]})")
    return found
