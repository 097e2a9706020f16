"""From a number a head and neuron to what is kept, and masks that show a narrower model at full size.

A mask multiplies the columns that read a head or a neuron, W·diag(m), by a weight wrapper: it needs nothing of a block's code, is exact,
and can be differentiated in m. Masks have to run behind every other wrapper, a LoRA that comes after one would fill its columns again; some
hosts put a LoRA there when memory runs short, so that the order is made right before each run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import input_error
from ...families.width import WidthGroup, width_groups
from .apply import ATTACHMENT, plan_of, stack_under
from .identity import NETWORK, model_hash, original_parameters, original_part, original_weight
from .linear_mlps import linear_parts
from .plan import PrunePlan

__all__ = [
    "ColumnMask", "MaskValue", "WidthCut", "WidthScores", "check_width", "full_groups", "groups_of", "kept_units", "magnitude",
    "mask_model", "masked_by", "put_masks_on", "removed_share", "unit_weights", "width_plan", "without_masks",
]  # fmt: skip

CALLBACK = "rectiflow_width_mask"
Kept = Mapping[tuple[str, str], tuple[int, ...]]  # (block path, kind) → kept units, ascending


@dataclass(frozen=True)
class WidthScores:
    """A number for every head and neuron of one model; high is important.

    values: (block path, kind) → (count,) float32. method: how they were made. facts: figures for people.
    """

    family: str
    model: str
    method: str
    values: Mapping[tuple[str, str], Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WidthCut:
    """How much goes.

    remove: share of the weights that belong to heads, and of those that belong to neurons, each by itself.
    scope: "global" ranks over all blocks, "local" takes the same share of each. align: kept neurons of a layer are a multiple of it.
    min_heads: heads that each attention keeps.
    """

    remove: float = 0.2
    scope: str = "global"
    align: int = 64
    min_heads: int = 1


def groups_of(model: Any, where: str) -> tuple[WidthGroup, ...]:
    """The heads and neurons of MODEL as it was loaded, without the blocks that a plan on it leaves out.

    Raises: NodeInputError for a family that is not known, and a model whose MLPs are linear maps.
    """
    if maps := linear_parts(model):
        remedy = "Take one of the two out; the report of Width to Linear says which MLPs are maps."
        raise input_error(where, "model", f"{len(maps)} MLPs that are linear maps", "a model with its own MLPs", remedy)
    stack, plan = stack_under(model, where), plan_of(model)
    gone = {block.path for block in plan.removed(stack)} | set(plan.students) if plan else set()
    return tuple(group for group in full_groups(model, where) if group.path not in gone)


def full_groups(model: Any, where: str) -> tuple[WidthGroup, ...]:
    """The same with the blocks that a plan leaves out."""
    return width_groups(stack_under(model, where), lambda path: original_part(model, path))


def unit_weights(group: WidthGroup, model: Any) -> int:
    """How many weights one head or neuron of the group has."""
    rows = sum(span.size * (original_part(model, span.layer).in_features + _has_bias(model, span.layer)) for span in group.rows)
    return rows + sum(span.size * original_part(model, span.layer).out_features for span in group.columns)


def _has_bias(model: Any, layer: str) -> int:
    return int(original_part(model, layer).bias is not None)


# From numbers to what is kept


def kept_units(groups: tuple[WidthGroup, ...], scores: WidthScores, cut: WidthCut, model: Any) -> dict[tuple[str, str], tuple[int, ...]]:
    """(block path, kind) → units that stay, of the groups that have scores. The least important go first; of equal ones the later."""
    kept = {}
    for heads in (True, False):
        mine = [group for group in groups if group.is_heads == heads and group.key in scores.values]
        cost = {group.key: unit_weights(group, model) for group in mine}
        least = cut.min_heads if heads else 0
        counts = _local(mine, cut, least) if cut.scope == "local" else _global(mine, scores, cut, cost, least)
        for group in mine:
            count = counts[group.key] if heads else _aligned(counts[group.key], group.count, cut.align)
            order = torch.argsort(scores.values[group.key], descending=True, stable=True)
            kept[group.key] = tuple(sorted(order[:count].tolist()))
    return kept


def _local(groups: list[WidthGroup], cut: WidthCut, least: int) -> dict[tuple[str, str], int]:
    return {group.key: max(min(least, group.count), group.count - round(cut.remove * group.count)) for group in groups}


def _global(groups: list[WidthGroup], scores: WidthScores, cut: WidthCut, cost: Mapping, least: int) -> dict[tuple[str, str], int]:
    """Kept units of each group where the least important of all go until the share of weights is reached, to the nearest unit."""
    counts = {group.key: group.count for group in groups}
    budget = cut.remove * sum(cost[group.key] * group.count for group in groups)
    units = [(value, -place, group) for place, group in enumerate(groups) for value in scores.values[group.key].tolist()]
    for _, _, group in sorted(units, key=lambda unit: unit[:2]):
        if counts[group.key] <= min(least, group.count):
            continue
        if budget < cost[group.key] / 2:
            break
        counts[group.key] -= 1
        budget -= cost[group.key]
    return counts


def _aligned(count: int, whole: int, align: int) -> int:
    """`count` to the nearest multiple of `align`, halves up, at most `whole`."""
    return min(whole, math.floor(count / align + 0.5) * align)


def width_plan(model: Any, kept: Kept, groups: tuple[WidthGroup, ...], where: str, **about: Any) -> PrunePlan:
    """The plan that keeps `kept`, with what a plan on MODEL leaves out already. Groups that stay whole are not named."""
    stack = stack_under(model, where)
    width: dict[str, dict[str, tuple[int, ...]]] = {}
    for group in groups:
        if group.key in kept and len(kept[group.key]) < group.count:
            width.setdefault(group.path, {})[group.kind] = kept[group.key]
    before = plan_of(model) or PrunePlan(stack.family, model_hash(model), stack.counts)
    return replace(before, width=width, **about)


def check_width(plan: PrunePlan, groups: tuple[WidthGroup, ...], where: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """(block path, kind) → kept units of the plan. Raises: NodeInputError for heads or neurons that the model does not have."""
    counts = {group.key: group.count for group in groups}
    kept = {(path, kind): tuple(units) for path, kinds in plan.width.items() for kind, units in kinds.items()}
    for key, units in kept.items():
        if key not in counts or any(unit >= counts[key] for unit in units):
            got = f"{key[1]} {max(units, default=0)} of {key[0]}"
            has = f"{counts[key]} of them" if key in counts else "none that can be removed"
            raise input_error(where, "plan", got, f"units that the model has; it has {has}", "Make the plan again on this model.")
    return kept


def removed_share(kept: Kept, groups: tuple[WidthGroup, ...], model: Any) -> dict[str, float]:
    """Share of weights that go: of heads, of neurons, and of all weights of the network."""
    whole = {"heads": 0, "neurons": 0}
    gone = dict(whole)
    for group in groups:
        name, cost = "heads" if group.is_heads else "neurons", unit_weights(group, model)
        whole[name] += cost * group.count
        gone[name] += cost * (group.count - len(kept.get(group.key, range(group.count))))
    total = sum(value.numel() for _, value in original_parameters(model))
    shares = {name: gone[name] / whole[name] for name in whole if whole[name]}
    return {**shares, "all": sum(gone.values()) / total}


def magnitude(model: Any, groups: tuple[WidthGroup, ...]) -> dict[tuple[str, str], Tensor]:
    """Root mean square of each unit's weights: rows with their bias and columns."""
    found = {}
    for group in groups:
        total = torch.zeros(group.count, dtype=torch.float64)
        for span in group.rows:
            rows = slice(span.start, span.start + span.size * group.count)
            weight, bias = original_weight(model, span.layer), original_weight(model, span.layer, "bias")
            total += weight[rows].double().square().sum(1).view(group.count, -1).sum(1).cpu()
            if bias is not None:
                total += bias[rows].double().square().view(group.count, -1).sum(1).cpu()
        for span in group.columns:
            columns = slice(span.start, span.start + span.size * group.count)
            total += original_weight(model, span.layer)[:, columns].double().square().sum(0).view(group.count, -1).sum(1).cpu()
        found[group.key] = (total / unit_weights(group, model)).sqrt().float()
    return found


# Masks


class MaskValue:
    """What a group's units are multiplied by, shared by the layers that read them; None, or not active, is 1 for all."""

    def __init__(self, value: Tensor | None = None):
        self.value = value
        self.active = True


@dataclass(frozen=True)
class _Place:
    start: int
    size: int
    mask: MaskValue


class ColumnMask:
    """Weight wrapper: W (out, in) → W·diag(m), with m of the groups that this layer reads; W itself where none has a value."""

    def __init__(self, places: tuple[_Place, ...]):
        self.places = places

    def __call__(self, weight: Tensor) -> Tensor:
        given = [(place, place.mask.value) for place in self.places if place.mask.active and place.mask.value is not None]
        if not given:
            return weight
        parts, at = [], 0
        for place, value in given:
            parts += [weight.new_ones(place.start - at), value.to(weight).repeat_interleave(place.size)]
            at = place.start + place.size * len(value)
        return weight * torch.cat([*parts, weight.new_ones(weight.shape[1] - at)])

    def __deepcopy__(self, memo):
        return self


def put_masks_on(model: Any, groups: tuple[WidthGroup, ...], callback: str) -> tuple[Any, dict[tuple[str, str], MaskValue]]:
    """(a clone of MODEL with a mask for every group, none with a value yet; the masks by group).

    callback: the host's name for "before a run".
    """
    masks = {group.key: MaskValue() for group in groups}
    places: dict[str, list[_Place]] = {}
    for group in groups:
        for span in group.columns:
            places.setdefault(span.layer, []).append(_Place(span.start, span.size, masks[group.key]))
    patched = model.clone()
    for layer, found in places.items():
        patched.add_weight_wrapper(f"{NETWORK}{layer}.weight", ColumnMask(tuple(sorted(found, key=lambda place: place.start))))
    patched.remove_callbacks_with_key(callback, CALLBACK)
    patched.add_callback_with_key(callback, CALLBACK, masks_last(tuple(places)))
    return patched, masks


def masks_last(layers: tuple[str, ...]) -> Callable[[Any], None]:
    """A callback that puts the masks of a model behind the other functions of their layers."""

    def sort(patcher: Any) -> None:
        for name in layers:
            layer = patcher.model.diffusion_model.get_submodule(name)
            layer.weight_function = sorted(layer.weight_function, key=lambda function: isinstance(function, ColumnMask))

    return sort


def mask_model(model: Any, plan: PrunePlan, callback: str, where: str) -> Any:
    """A clone of MODEL that answers as the narrower one would, at full size. The plan hangs on it.

    Raises: NodeInputError for another model's plan, a plan that also leaves out blocks that are there, or a model that is masked already.
    """
    before = plan_of(model)
    if before is not None and before.width:
        raise input_error(where, "model", "a model whose width is cut already", "a model of full width", "Link the model before that.")
    stack = stack_under(model, where)
    plan.check(stack, model_hash(model), where)
    if plan.removed(stack) != (before.removed(stack) if before else ()):
        remedy = "Apply Prune Plan before this node, or make the plan on this model."
        raise input_error(where, "plan", "a plan that leaves out blocks that the model has", "one for this model's blocks", remedy)
    patched, _ = masked_by(model, plan, callback, where)
    patched.set_attachments(ATTACHMENT, plan)
    return patched


def masked_by(model: Any, plan: PrunePlan, callback: str, where: str) -> tuple[Any, tuple[MaskValue, ...]]:
    """(a clone of MODEL, which has its full width, with masks of what `plan` keeps; the masks)."""
    groups = groups_of(model, where)
    kept = check_width(plan, groups, where)
    chosen = tuple(group for group in groups if group.key in kept)
    patched, masks = put_masks_on(model, chosen, callback)
    for group in chosen:
        with torch.inference_mode(False):
            masks[group.key].value = torch.zeros(group.count).index_fill(0, torch.tensor(kept[group.key], dtype=torch.long), 1.0)
    return patched, tuple(masks.values())


def without_masks(functions: list) -> list:
    """The functions of a weight that are no masks."""
    return [function for function in functions if not isinstance(function, ColumnMask)]

