"""The MODEL of a file: the host builds a network of the blocks that are there, then the file's layers take their places in it.

The host is given a state dict of the whole widths, in which every weight that is stored otherwise is one number spread over its shape: it
takes no memory. What is set afterwards is set on a network that was just made and that nobody else has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...errors import input_error
from ...families.stack import COUNTED_BY_WIDTH, depth_is_counted, stack_of
from ...families.text import TEXT_FAMILIES
from ...families.width import width_groups
from ..modules import NETWORK
from ..prune.apply import ATTACHMENT as PLAN
from ..prune.apply import TEXT_RUNS, SkipBlock
from ..prune.compact import LayerCut, layer_cuts, narrow_layer
from ..prune.linear_mlps import LinearMlp, linear_like
from ..prune.plan import PrunePlan
from ..prune.text_runs import place_text_run
from ..prune.width import check_width
from .manifest import DTYPES, Manifest
from .reading import Loaded
from .writing import ATTACHMENT

__all__ = ["built_model"]

MOVED = ("quant", "width", "fields", "low_rank", "maps", "text_runs", "gone")  # what a manifest has by the names of layers
Make = Callable[[dict[str, torch.Tensor]], Any]


def built_model(loaded: Loaded, make: Make, where: str, compact: bool = False) -> Any:
    """MODEL of a file.

    Args:
        make: state dict without a prefix → MODEL of a new network, None for one that the host does not know.
        compact: number the blocks that are there from 0, in place of their numbers in the whole model.

    Raises: NodeInputError for a file that is not a whole model of its family.
    """
    manifest = loaded.manifest

    def refuse(what: str) -> Exception:
        remedy = "Save the model again, or fetch the file again."
        return input_error(where, "path", f"a file {what}"[:190], "a whole model of one family", remedy)

    try:
        model = make(_state(loaded))
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise refuse(f"that is no whole model: {error}") from error
    if model is None:
        raise input_error(where, "path", manifest.arch, "a transformer that this host knows", "Update the host, or save the model again.")
    network = model.get_model_object(NETWORK[:-1])
    if manifest.arch not in ("", type(network).__name__):
        raise refuse(f"of {manifest.arch[:100]} that reads as {type(network).__name__}")
    try:
        _place_blocks(network, loaded, where)
        for path in manifest.maps:
            _place_map(network, path, loaded)
        _place_text_runs(network, loaded, where)
        cuts = _cuts(network, loaded, where)
        for path, fields in manifest.fields.items():
            _set_fields(network.get_submodule(path), path, fields)
        for name in manifest.width:
            if name not in loaded.layers:
                _place(network, name, _narrow(network, name, loaded, cuts.get(name)), loaded)
        for name, layer in loaded.low_rank.items():
            _place(network, name, layer, loaded)
        for name, layer in loaded.layers.items():
            own = network.get_submodule(name)
            _place(network, name, layer, loaded)
            if name in cuts and cuts[name].shape(own) == (layer.out_features, layer.in_features):
                layer.cut_to(cuts[name], (own.out_features, own.in_features))
    except (AttributeError, LookupError) as error:
        raise refuse(f"that does not fit {type(network).__name__}: {error}") from error
    special = {**loaded.layers, **loaded.low_rank}
    missing = [key for key in network.state_dict() if key not in loaded.plain and key.rpartition(".")[0] not in special]
    if missing:
        raise refuse(f"without {len(missing)} weights of {type(network).__name__}: {missing[0]}")
    model.size = 0
    model.size = model.model_size() + sum(layer.held_bytes for layer in special.values())
    return _compacted(model, loaded, where) if compact and manifest.kept else _with_manifest(model, manifest, loaded.plan)


def _with_manifest(model: Any, manifest: Manifest, plan: PrunePlan | None) -> Any:
    model.set_attachments(ATTACHMENT, manifest)
    if plan is not None:
        model.set_attachments(PLAN, plan)
    if manifest.text_runs:
        model.set_attachments(TEXT_RUNS, manifest.text_runs)
    return model


def _compacted(model: Any, loaded: Loaded, where: str) -> Any:
    """MODEL without the modules that stand for blocks that are left out, and nothing known of them."""
    network = model.get_model_object(NETWORK[:-1])
    if not depth_is_counted(network):
        remedy = "Turn it off: this family's number of blocks follows from its width."
        raise input_error(where, "compact_numbering", True, "families whose blocks are counted in a file", remedy)
    for holder in loaded.manifest.kept:
        setattr(network, holder, nn.ModuleList(block for block in getattr(network, holder) if not isinstance(block, SkipBlock)))
    stored = loaded.manifest.numbering.stored
    moved = {part: {stored(n): v for n, v in getattr(loaded.manifest, part).items()} for part in MOVED}
    moved["text_runs"] = {first: stored(last) for first, last in moved["text_runs"].items()}
    return _with_manifest(model, replace(loaded.manifest, counts={}, kept={}, plan="", **moved), None)


def _state(loaded: Loaded) -> dict[str, torch.Tensor]:
    """What the host builds from: whole widths, the blocks that are there numbered without gaps."""
    manifest, dtype = loaded.manifest, DTYPES[loaded.manifest.dtype]
    own = tuple(f"{path}." for path in manifest.maps)
    state = {key: tensor for key, tensor in loaded.plain.items() if not key.startswith(own)}
    for path, shapes in (manifest.maps | manifest.gone).items():
        state |= {f"{path}.{part}": torch.zeros((1,) * len(shape), dtype=dtype).expand(shape) for part, shape in shapes.items()}
    full = {name: (form.rows, form.columns) for name, form in manifest.quant.items()}
    full |= {name: (sizes["rows"], sizes["columns"]) for name, sizes in manifest.width.items()}
    full |= {name: (sizes["rows"], sizes["columns"]) for name, sizes in manifest.low_rank.items()}
    for name, shape in full.items():
        if name.startswith(own):
            continue
        state[f"{name}.weight"] = torch.zeros(1, 1, dtype=dtype).expand(shape)
        if f"{name}.bias" in state:
            state[f"{name}.bias"] = torch.zeros(1, dtype=dtype).expand(shape[0])
    if COUNTED_BY_WIDTH in manifest.kept:
        return state | _stand_ins(state, manifest.kept[COUNTED_BY_WIDTH], manifest.counts[COUNTED_BY_WIDTH])
    return {manifest.numbering.stored(name): tensor for name, tensor in state.items()}


def _stand_ins(state: dict[str, torch.Tensor], kept: tuple[int, ...], count: int) -> dict[str, torch.Tensor]:
    """Weights without memory for the blocks that are left out of a family whose blocks are not counted: shaped as the last but one."""
    like = f"{COUNTED_BY_WIDTH}.{kept[-2] if len(kept) > 1 else kept[-1]}."
    shapes = {key[len(like) :]: tensor for key, tensor in state.items() if key.startswith(like)}
    gone = [number for number in range(count) if number not in kept]
    return {
        f"{COUNTED_BY_WIDTH}.{number}.{rest}": torch.zeros((1,) * t.ndim, dtype=t.dtype).expand(t.shape)
        for number in gone for rest, t in shapes.items()
    }  # fmt: skip


def _place_blocks(network: nn.Module, loaded: Loaded, where: str) -> None:
    """Every block at its number in the whole model; what hands its tokens on at the numbers between."""
    for holder, kept in loaded.manifest.kept.items():
        there, count = list(getattr(network, holder)), loaded.manifest.counts[holder]
        by_number = dict(zip(kept, there)) if depth_is_counted(network) else {number: there[number] for number in kept}
        if len(by_number) != len(kept):
            raise LookupError(f"{len(there)} blocks in {holder}, {len(kept)} are kept")
        setattr(network, holder, nn.ModuleList(by_number.get(number, nn.Identity()) for number in range(count)))
    if loaded.manifest.kept:
        for block in stack_of(network, where).blocks:
            if block.index not in loaded.manifest.kept.get(block.holder, (block.index,)):
                getattr(network, block.holder)[block.index] = SkipBlock(block)


def _set_fields(module: nn.Module, path: str, fields: dict[str, int]) -> None:
    for name, value in fields.items():
        own = getattr(module, name, None)
        if not name.isidentifier() or type(own) is not int or not 1 <= value <= own:
            raise LookupError(f"{name[:50]} of {path[:100]} cannot be {value}")
        setattr(module, name, value)


def _cuts(network: nn.Module, loaded: Loaded, where: str) -> dict[str, LayerCut]:
    """Layer → which rows and columns of the whole one it holds, where the file's plan says so."""
    plan = loaded.plan
    if plan is None or not plan.width:
        return {}
    stack = stack_of(network, where)
    there = {block.path for block in stack.blocks if not isinstance(network.get_submodule(block.path), SkipBlock)}
    rest = replace(stack, blocks=tuple(block for block in stack.blocks if block.path in there))
    groups = width_groups(rest, lambda path: functools.reduce(getattr, path.split("."), network))
    return layer_cuts(check_width(plan, groups, where), groups, network.get_submodule)


def _narrow(network: nn.Module, name: str, loaded: Loaded, cut: LayerCut | None) -> nn.Module:
    """A linear layer of the network's own class around the file's smaller weight; with a cut it takes LoRAs of the whole size."""
    own, weight = network.get_submodule(name), loaded.plain[f"{name}.weight"]
    bias = loaded.plain.get(f"{name}.bias")
    if not isinstance(own, nn.Linear) or (bias is None) != (own.bias is None) or (bias is not None and bias.shape != weight.shape[:1]):
        raise LookupError(f"{name[:100]} is no linear layer with such a bias")
    if cut is not None and cut.shape(own) == tuple(weight.shape):
        return narrow_layer(own, weight.to(own.weight.dtype), bias if bias is None else bias.to(own.bias.dtype), cut, stored=True)
    return linear_like(own, weight, bias)


def _place_map(network: nn.Module, path: str, loaded: Loaded) -> None:
    """The file's linear map, plain or in few bits, in the place of an MLP of the network."""
    owner, _, last = path.rpartition(".")
    parent, name = network.get_submodule(owner), f"{path}.map"
    mlp = getattr(parent, last)
    linear = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)]
    sides = (linear[-1].out_features, linear[0].in_features) if len(linear) > 1 else None
    form, weight = loaded.manifest.quant.get(name), loaded.plain.get(f"{name}.weight")
    stored = tuple(weight.shape) if weight is not None else (form.rows, form.columns) if form is not None else None
    bias = loaded.plain.get(f"{name}.bias")
    if sides is None or stored != sides or bias is not None and bias.shape != stored[:1]:
        raise LookupError(f"{path[:100]} is no MLP that a map of {stored} can stand for")
    if weight is None:  # its codes are placed with the others
        weight = torch.zeros(1, 1).expand(stored)
    setattr(parent, last, LinearMlp(linear_like(linear[-1], weight, bias)))


def _place_text_runs(network: nn.Module, loaded: Loaded, where: str) -> None:
    if not loaded.manifest.text_runs:
        return
    stack = stack_of(network, where)
    by_path = {block.path: block for block in stack.blocks}
    for first, last in loaded.manifest.text_runs.items():
        place_text_run(network, by_path[first], by_path[last], TEXT_FAMILIES[stack.family])


def _place(network: nn.Module, name: str, layer: nn.Module, loaded: Loaded) -> None:
    owner, _, last = name.rpartition(".")
    parent = network.get_submodule(owner)
    own = getattr(parent, last)
    full = loaded.manifest.width.get(name, {"rows": layer.out_features, "columns": layer.in_features})
    if not isinstance(own, nn.Linear) or full != {"rows": own.out_features, "columns": own.in_features}:
        raise LookupError(f"{name[:100]} is no linear layer of {full['rows']}×{full['columns']}")
    setattr(parent, last, layer)
