"""A LoRA for the rows and columns that a narrowed model has, and for the blocks that a pruned one has.

    up (out, r) keeps the rows that its layer keeps, down (r, in) the columns; diff and diff_b keep both. Layers of blocks that are left out
    are dropped; with `renumber` the others get the numbers that they have in a file without gaps.

A model in memory does not need this: its narrow layers take a LoRA of full size (compact.py), and its blocks keep their numbers. It is for
files that are loaded without our nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ...families.stack import Stack
from .compact import LayerCut
from .identity import NETWORK
from .plan import PrunePlan

__all__ = ["SlicedLora", "slice_lora"]

UP = (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight")
DOWN = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight")
WHOLE, BIAS, OTHER = ".diff", ".diff_b", (".alpha", ".dora_scale")


@dataclass
class SlicedLora:
    """tensors: of the LoRA; sliced, whole: how many layers were cut and how many are as they were; dropped: layers of removed blocks."""

    tensors: dict[str, Tensor]
    sliced: int = 0
    whole: int = 0
    dropped: list[str] = field(default_factory=list)


def slice_lora(lora: Mapping[str, Tensor], plan: PrunePlan, stack: Stack, cuts: Mapping[str, LayerCut], renumber: bool) -> SlicedLora:
    """The LoRA for the model that `plan` makes. cuts: of compact.layer_cuts, layer below the network → what stays.

    Raises: ValueError naming a tensor that does not fit the layer at full size, is of a kind that cannot be cut, or is named otherwise than
    by its layer ("diffusion_model.…", kohya's "lora_unet_…", or the layer alone).
    """
    names = {layer: layer for layer in cuts}
    names |= {layer.replace(".", "_"): layer for layer in cuts}
    moved = {block.path: _moved(block, plan, stack) for block in stack.blocks}
    gone = {block.path for block in plan.removed(stack)}
    made, layers = SlicedLora({}), {"sliced": set(), "whole": set(), "dropped": set()}
    for key, tensor in lora.items():
        prefix, layer, ending = _parts(key)
        block = _block_of(layer, moved)
        if block in gone:
            layers["dropped"].add(layer)
            continue
        cut = cuts.get(names.get(layer, ""))
        name = prefix + _renamed(layer, block, moved, renumber) + ending
        made.tensors[name] = tensor if cut is None else _sliced(key, tensor, ending, cut)
        layers["whole" if cut is None else "sliced"].add(layer)
    made.sliced, made.whole, made.dropped = len(layers["sliced"]), len(layers["whole"]), sorted(layers["dropped"])
    return made


def _parts(key: str) -> tuple[str, str, str]:
    """"diffusion_model.a.b.lora_up.weight" → ("diffusion_model.", "a.b", ".lora_up.weight")."""
    ending = next((known for known in (*UP, *DOWN, BIAS, WHOLE, *OTHER) if key.endswith(known)), None)
    if ending is None:
        raise ValueError(f"{key[:100]}: of a kind that cannot be cut; lora_up/lora_down (A/B), diff and diff_b can")
    prefix = next((known for known in (NETWORK, "lora_unet_", "model.diffusion_model.") if key.startswith(known)), "")
    return prefix, key[len(prefix) : len(key) - len(ending)], ending


def _block_of(layer: str, paths: Mapping[str, str]) -> str | None:
    return next((path for path in paths if layer.startswith((f"{path}.", f"{path.replace('.', '_')}_"))), None)


def _moved(block, plan: PrunePlan, stack: Stack) -> str:
    """The path of a block in a file without gaps."""
    gone = {other.path for other in plan.removed(stack)}
    before = sum(other.path not in gone for other in stack.blocks if other.holder == block.holder and other.index < block.index)
    return f"{block.holder}.{before}"


def _renamed(layer: str, block: str | None, moved: Mapping[str, str], renumber: bool) -> str:
    if not renumber or block is None:
        return layer
    if layer.startswith(f"{block}."):
        return moved[block] + layer[len(block) :]
    return moved[block].replace(".", "_") + layer[len(block) :]


def _sliced(key: str, tensor: Tensor, ending: str, cut: LayerCut) -> Tensor:
    if ending in OTHER:
        if tensor.numel() > 1:
            raise ValueError(f"{key[:100]}: DoRA scales belong to whole rows of columns; merge this LoRA before narrowing")
        return tensor
    for side, places in ((0, cut.rows if ending not in DOWN else None), (1, cut.columns if ending in (*DOWN, WHOLE) else None)):
        if places is None:
            continue
        if tensor.ndim <= side or (len(places) and int(places[-1]) >= tensor.shape[side]):
            raise ValueError(f"{key[:100]}: {tuple(tensor.shape)} is narrower than the layer it is for")
        tensor = tensor.index_select(side, places.to(tensor.device))
    tensor = tensor.contiguous().clone()
    if cut.silent is not None and ending in (*DOWN, WHOLE):
        tensor[:, cut.silent.to(tensor.device)] = 0
    return tensor
