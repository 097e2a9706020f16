"""Narrower layers: the rows and columns of heads and neurons that a plan does not keep are deleted.

Each layer is exchanged by an object patch for one of its own class, so that casting, weight functions and offloading are the host's, and
the numbers by which a block splits its tokens (heads, hidden size) are exchanged with it. A LoRA of the whole model stays usable, in front
of or behind the node: a narrow layer shows its weight at full size to what a host merges into it, and takes the part back that it has.

A layer that is left without neurons adds its bias and nothing else. No host's attention runs without heads, so an attention that keeps none
computes its first head and reads it with zeros: the same answer.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import input_error
from ...families.width import WidthGroup
from .apply import ATTACHMENT, apply_plan, plan_of, stack_under
from .identity import NETWORK, model_hash, original_part, original_weight
from .plan import PrunePlan
from .width import check_width, full_groups, groups_of, without_masks

__all__ = [
    "LayerCut", "NarrowWeights", "compact_model", "full_width", "is_plain", "layer_cuts", "narrow_fields", "narrow_layer", "narrowed",
    "spread",
]  # fmt: skip


@dataclass(frozen=True)
class LayerCut:
    """What stays of a layer: rows and columns by number, None for all. silent: the columns that read a head in name only."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    silent: Tensor | None = None

    def shape(self, layer: nn.Linear) -> tuple[int, int]:
        """Of the weight that stays of `layer`."""
        sides = ((self.rows, layer.out_features), (self.columns, layer.in_features))
        return tuple(whole if left is None else len(left) for left, whole in sides)


def layer_cuts(kept: Mapping[tuple[str, str], tuple[int, ...]], groups: Iterable[WidthGroup], part: Any) -> dict[str, LayerCut]:
    """Layer below the network → what stays of it. part: a path → the layer there at full size."""
    gone: dict[str, dict[str, list[Tensor]]] = {}
    for group in groups:
        if group.key not in kept:
            continue
        stays = set(kept[group.key]) or ({0} if group.is_heads else set())
        units = torch.tensor([unit for unit in range(group.count) if unit not in stays], dtype=torch.long)
        for side, spans in (("rows", group.rows), ("columns", group.columns)):
            for span in spans:
                gone.setdefault(span.layer, {}).setdefault(side, []).append(_places(span, units))
                if side == "columns" and not kept[group.key] and stays:
                    gone[span.layer].setdefault("silent", []).append(_places(span, torch.zeros(1, dtype=torch.long)))
    return {layer: _cut(part(layer), found) for layer, found in gone.items()}


def _places(span: Any, units: Tensor) -> Tensor:
    return (span.start + units[:, None] * span.size + torch.arange(span.size)).flatten()


def _cut(layer: nn.Linear, gone: Mapping[str, list[Tensor]]) -> LayerCut:
    def left(side: str, count: int) -> Tensor | None:
        if side not in gone:
            return None
        mask = torch.ones(count, dtype=torch.bool)
        mask[torch.cat(gone[side])] = False
        return mask.nonzero().flatten()

    columns, silent = left("columns", layer.in_features), None
    if "silent" in gone:
        silent = torch.isin(columns, torch.cat(gone["silent"])).nonzero().flatten()
    return LayerCut(left("rows", layer.out_features), columns, silent)


class NarrowWeights:
    """Mixed into a linear layer class: convert_ and set_ are what hosts call around merging a patch into a weight or bias."""

    def cut_to(self, cut: LayerCut, full: tuple[int, int]) -> None:
        self.cut, self.full = cut, full

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        """The narrow weight in its place in the full one, zeros elsewhere."""
        wide = spread(weight, self.cut.columns, self.full[1], 1)
        return spread(wide, self.cut.rows, self.full[0], 0)

    def set_weight(self, weight: Tensor, inplace_update: bool = False, seed: int | None = None, return_weight: bool = False, **kwargs):
        """Keep of a full weight what this layer has."""
        narrow = narrowed(weight, self.cut).to(self.weight.dtype)
        return narrow if return_weight else _put(self, "weight", narrow, inplace_update)

    def convert_bias(self, bias: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        return spread(bias, self.cut.rows, self.full[0], 0)

    def set_bias(self, bias: Tensor, inplace_update: bool = False, seed: int | None = None, return_weight: bool = False, **kwargs):
        narrow = (bias if self.cut.rows is None else bias[self.cut.rows.to(bias.device)]).to(self.bias.dtype)
        return narrow if return_weight else _put(self, "bias", narrow, inplace_update)


def spread(narrow: Tensor, places: Tensor | None, count: int, dim: int) -> Tensor:
    """`narrow` at its places among `count` along one dimension, zeros elsewhere; None leaves it."""
    if places is None or narrow.shape[dim] == count:
        return narrow
    wide = narrow.new_zeros(*narrow.shape[:dim], count, *narrow.shape[dim + 1 :])
    return wide.index_copy(dim, places.to(narrow.device), narrow)


def _put(layer: nn.Module, name: str, value: Tensor, inplace: bool) -> None:
    if inplace:
        getattr(layer, name).data.copy_(value)
    else:
        setattr(layer, name, nn.Parameter(value, requires_grad=False))


def narrowed(weight: Tensor, cut: LayerCut) -> Tensor:
    """The rows and columns of a full weight (out, in) that stay, as a tensor of its own."""
    if cut.rows is not None:
        weight = weight[cut.rows.to(weight.device)]
    if cut.columns is not None:
        weight = weight[:, cut.columns.to(weight.device)]
    weight = weight.contiguous().clone()
    if cut.silent is not None:
        weight[:, cut.silent.to(weight.device)] = 0
    return weight


def narrow_layer(layer: nn.Linear, weight: Tensor, bias: Tensor | None, cut: LayerCut, stored: bool = False) -> nn.Linear:
    """A layer of the class of `layer` with what `cut` leaves of weight and bias. stored: they are narrow already."""
    full = (layer.out_features, layer.in_features)
    weight = weight.clone() if stored else narrowed(weight, cut)
    if bias is not None and cut.rows is not None and not stored:
        bias = bias[cut.rows.to(bias.device)]
    kind = type(f"Narrow{type(layer).__name__}", (NarrowWeights, type(layer)), {})
    made = kind(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    made.cut_to(cut, full)
    return made


def compact_model(model: Any, plan: PrunePlan | None, where: str) -> Any:
    """A clone of MODEL with narrower layers, as `plan` says, or the plan that its masks hang on it. Blocks the plan leaves out go as well.

    Raises: NodeInputError for a model without a width plan, another model's plan, layers that are not plain (quantised ones), and wrappers
    that were made for the full size.
    """
    before = plan_of(model)
    plan = plan or before
    if plan is None or not plan.width:
        got = "a model without masks and no plan" if plan is None else "a plan without widths"
        raise input_error(where, "plan", got, "a plan that narrows layers", "Link the plan of Apply Width Mask, or a masked model.")
    if any(isinstance(patch, NarrowWeights) for patch in model.object_patches.values()):
        raise input_error(where, "model", "a model that is narrow already", "a model of full width", "Link the model before that node.")
    stack = stack_under(model, where)
    plan.check(stack, model_hash(model), where)
    if before is None and plan.removed(stack):
        model = apply_plan(model, plan, where)
    elif before is not None and before.removed(stack) != plan.removed(stack):
        remedy = "Make the plan on this model, or link the model before its plan."
        raise input_error(where, "plan", "a plan that leaves out other blocks", "one for this model's blocks", remedy)
    groups = groups_of(model, where)
    cuts = layer_cuts(check_width(plan, groups, where), groups, lambda path: original_part(model, path))
    patched = model.clone()
    size = model.model_size()
    with torch.inference_mode(False):
        for name, cut in cuts.items():
            size += _exchange_layer(patched, name, cut, where)
    for name, value in _numbers(plan.width, groups).items():
        patched.add_object_patch(NETWORK + name, value)
    patched.size = size
    patched.set_attachments(ATTACHMENT, plan)
    patched.patches_uuid = uuid.uuid4()  # an object patch alone does not tell the host that the network changes
    return patched


def full_width(model: Any, plan: PrunePlan, where: str) -> Any:
    """A clone of MODEL with every head and neuron again: without the narrow layers and masks that `plan`, which lies on it, put there.

    Raises: NodeInputError for a narrow model from a file, which has nothing else to show.
    """
    if model_hash(model) != plan.model:
        allowed = "a model that was masked or narrowed in this graph"
        raise input_error(where, "student", "a narrow model from a file", allowed, "Recover first, then save what comes out.")
    whole = model.clone()
    narrow = [name for name, patch in whole.object_patches.items() if isinstance(patch, NarrowWeights)]
    numbers = [NETWORK + name for name in _numbers(plan.width, full_groups(model, where))]
    for name in [*narrow, *(number for number in numbers if number in whole.object_patches)]:
        del whole.object_patches[name]
    for key, functions in whole.weight_wrapper_patches.items():
        whole.weight_wrapper_patches[key] = without_masks(functions)
    whole.size = 0  # asked for again
    whole.patches_uuid = uuid.uuid4()
    return whole


def _exchange_layer(patched: Any, name: str, cut: LayerCut, where: str) -> int:
    """Put the narrow layer at `name`; returns by how many bytes the model grows."""
    layer = original_part(patched, name)
    if NETWORK + name in patched.object_patches or not is_plain(layer):
        got = f"{name}, a {type(patched.object_patches.get(NETWORK + name, layer)).__name__}"
        raise input_error(where, "model", got, "plain linear layers", "Link this node before quantisation, to a model in 16 or 32 bits.")
    for key in (f"{NETWORK}{name}.weight", f"{NETWORK}{name}.bias"):
        left = without_masks(patched.weight_wrapper_patches.pop(key, []))
        if left:
            got = f"{name} with a {type(left[0]).__name__} on its weight"
            remedy = "Link this node before what trains or changes weights while the model runs."
            raise input_error(where, "model", got, "layers without functions on their weights", remedy)
    weight, bias = original_weight(patched, name), original_weight(patched, name, "bias")
    made = narrow_layer(layer, weight, bias, cut)
    patched.add_object_patch(NETWORK + name, made)
    return made.weight.nbytes - weight.nbytes + (made.bias.nbytes - bias.nbytes if bias is not None else 0)


def is_plain(layer: Any) -> bool:
    """Whether a layer's weight is numbers that can be cut: no packed ones, and no narrow layer already."""
    wide = isinstance(layer, nn.Linear) and layer.weight.is_floating_point() and layer.weight.element_size() > 1
    return wide and not hasattr(layer, "set_weight")


def _numbers(width: Mapping[str, Mapping[str, tuple[int, ...]]], groups: Iterable[WidthGroup]) -> dict[str, int]:
    """Attribute below the network → its value in the narrow blocks."""
    return narrow_fields({(path, kind): len(units) for path, kinds in width.items() for kind, units in kinds.items()}, groups)


def narrow_fields(counts: Mapping[tuple[str, str], int], groups: Iterable[WidthGroup]) -> dict[str, int]:
    """The same from how many units of each group stay; an attention that keeps none computes its first head."""
    found = {}
    for group in groups:
        if group.key in counts:
            found |= {name: each * (counts[group.key] or int(group.is_heads)) for name, each in group.fields}
    return found
