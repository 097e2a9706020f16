"""A MODEL as the tensors of a file: pruned, narrowed, quantised, or several of these.

Forms of a file:

    rectiflow   everything, with a manifest. Layers that the core's int8_tensorwise can say are written exactly so, tensor by tensor and
                with its marker
    core_int8   only such layers beside plain ones, without our manifest
    plain       no quantised layer: the numbers that the codes stand for, for any loader

What is written is what this clone runs: modules as it sees them, weights with its LoRAs and wrappers in them. Blocks that are left out are
not written, and the blocks behind them move up, so that loaders that count blocks find no gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import input_error
from ...families.stack import depth_is_counted
from ..modules import NETWORK, own_weight, seen_modules
from ..prune.apply import SkipBlock, plan_of
from ..prune.compact import NarrowWeights
from ..prune.identity import model_hash, original_module
from ..prune.linear_mlps import LinearMlp, NoText
from ..prune.low_rank import LowRankLinear
from ..prune.students import StudentBlock
from ..prune.text_runs import RunModulation, text_runs_of
from ..quant.linear import QuantLinear, factors, product
from .manifest import DTYPES, METADATA, TENSOR, LayerFormat, Manifest, core_marker, dtype_name, widest_dtype

__all__ = ["ATTACHMENT", "FILE_PREFIX", "FORMS", "changed_weight", "compressed_tensors"]

FORMS = ("rectiflow", "core_int8", "plain")
FILE_PREFIX = "model.diffusion_model."
ATTACHMENT = "rectiflow_compressed"  # the manifest of the file that a MODEL came from
Changed = Callable[[str, torch.Tensor], torch.Tensor]


def compressed_tensors(
    model: Any, form: str, dtype: str, base: str, changed: Changed, where: str
) -> tuple[dict[str, torch.Tensor], dict[str, str], Manifest]:
    """(tensors, metadata, manifest) of MODEL in one of FORMS.

    Args:
        dtype: of the weights that are not quantised, one of DTYPES, or "same". base: "tiny" or "detect", how the network is built again.
        changed: a weight's key and its float32 numbers → the numbers with this clone's patches and wrappers.

    Raises: NodeInputError for what the form cannot say.
    """
    modules = dict(seen_modules(model))
    layers = {name: _stored_layer(model, name, layer, changed) for name, layer in modules.items() if isinstance(layer, QuantLinear)}
    plain = dict(_plain_tensors(model, modules, changed))
    chosen = DTYPES.get(dtype, widest_dtype(plain.values()))
    written = _student_names(model, modules, where)
    formats = {written(name): form_of for name, (form_of, _) in layers.items()}
    shared = _low_rank_tensors(model, modules, changed)
    groups = {written(name): sizes for name, (sizes, _) in shared.items()} if form == "rectiflow" else {}
    manifest = _manifest(model, modules, formats, base, dtype_name(chosen), groups)
    _check_form(model, form, manifest, where)
    tensors = {name: weight.to(chosen) if weight.is_floating_point() else weight for name, weight in plain.items()}
    for name, (_, parts) in layers.items():
        if form == "plain":
            parts = {"weight": _numbers(modules[name], parts).to(chosen)}
        bias = modules[name].bias
        if bias is not None:
            key = f"{NETWORK}{name}.bias"
            parts = {**parts, "bias": changed(key, own_weight(model, name, modules[name], "bias").float()).to(chosen)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    for name, (_, parts) in shared.items():
        parts = parts if form == "rectiflow" else {"weight": changed(f"{NETWORK}{name}.weight", modules[name].numbers())}
        if modules[name].bias is not None:
            parts = {**parts, "bias": changed(f"{NETWORK}{name}.bias", own_weight(model, name, modules[name], "bias").float())}
        tensors |= {f"{name}.{part}": tensor.to(chosen) for part, tensor in parts.items()}
    placed = {FILE_PREFIX + manifest.numbering.stored(written(name)): tensor for name, tensor in tensors.items()}
    if form != "rectiflow":
        return placed, {}, manifest
    return placed | {TENSOR: manifest.tensor()}, {METADATA: manifest.text()}, manifest


def _student_names(model: Any, modules: Mapping[str, nn.Module], where: str) -> Callable[[str], str]:
    """Name in the network → name in the file: a student of a run is written as the block that it stands for.

    Raises: NodeInputError for one that is built otherwise than that block, which no loader could place.
    """
    students = [name for name, module in modules.items() if isinstance(module, StudentBlock)]
    for name in students:
        ours, theirs = (
            {key: value.shape for key, value in block.named_parameters()} for block in (modules[name].student, original_module(model, name))
        )
        if ours.keys() != theirs.keys():
            allowed = "students built as the first block of their run is"
            raise input_error(where, "model", f"a student of another kind at {name}", allowed, "Distill the runs with init first.")

    def written(name: str) -> str:
        owner = next((student for student in students if name.startswith(f"{student}.student.")), None)
        return name if owner is None else owner + name[len(owner) + len(".student") :]

    return written


def _check_form(model: Any, form: str, manifest: Manifest, where: str) -> None:
    if form == "rectiflow":
        return
    foreign = [name for name, found in manifest.quant.items() if not _core_can_say(found)]
    if form == "core_int8" and (foreign or not manifest.quant):
        got = f"core_int8 with {len(foreign)} other layers: {foreign[0]}, …" if foreign else "core_int8 of a model without quantised layers"
        allowed = "W8A8 layers with rotation none or convrot, without smoothing, directions or a LoRA beside the codes"
        remedy = "Choose rectiflow, or quantise with 8 bits, rotation convrot, smooth_alpha 0, directions 0 and lora before."
        raise input_error(where, "format", got, allowed, remedy)
    if manifest.maps:
        remedy = "Choose rectiflow: other loaders look for the MLPs."
        raise input_error(where, "format", f"{form} of a model with linear maps", "models with their own MLPs", remedy)
    if manifest.width or manifest.fields:
        remedy = "Choose rectiflow: other loaders take one width for all blocks."
        raise input_error(where, "format", f"{form} of a narrowed model", "models of full width", remedy)
    if manifest.kept and not depth_is_counted(model.get_model_object("diffusion_model")):
        remedy = "Choose rectiflow: other loaders take the number of this family's blocks from its width, and would make up those left out."
        raise input_error(where, "format", f"{form} without some blocks", "families whose blocks are counted in the file", remedy)


# The manifest


def _manifest(
    model: Any, modules: Mapping[str, nn.Module], quant: dict[str, LayerFormat], base: str, dtype: str, low_rank: dict[str, dict[str, int]]
) -> Manifest:
    known: Manifest | None = model.get_attachment(ATTACHMENT)
    plan = plan_of(model)
    skipped = [name for name, module in modules.items() if isinstance(module, SkipBlock)]
    counts, kept = {}, {}
    for holder in sorted({name.rpartition(".")[0] for name in skipped}):
        members = [name for name in modules if name.rpartition(".")[0] == holder]
        counts[holder] = len(members)
        kept[holder] = tuple(number for number in range(len(members)) if f"{holder}.{number}" not in skipped)
    width, fields = _narrowed(model, modules)
    if known is not None:
        width, fields = {**known.width, **width}, {**known.fields, **fields}
    arch = type(modules[""]).__name__
    origin = model_hash(model) if known is None else known.base_sha256_16
    built = {"kind": base} if known is None else known.base
    text = "" if plan is None else plan.to_json()
    maps = {**(known.maps if known is not None else {}), **_replaced(model, modules, LinearMlp)}
    gone = {**(known.gone if known is not None else {}), **_replaced(model, modules, (NoText, RunModulation))}
    gone |= {name: maps.pop(name) for name in list(maps) if isinstance(modules.get(name), NoText)}  # a map gave way to a run's
    return Manifest(arch, built, origin, dtype, quant, counts, kept, width, fields, text, low_rank, maps, dict(text_runs_of(model)), gone)


def _replaced(model: Any, modules: Mapping[str, nn.Module], kind: type | tuple[type, ...]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Modules of this clone of one kind → the shapes of the weights that stood there."""
    own = {name: original_module(model, name) for name, module in modules.items() if isinstance(module, kind)}
    return {
        name: {part: tuple(value.shape) for part, value in module.named_parameters()}
        for name, module in own.items() if not isinstance(module, (LinearMlp, NoText, RunModulation))
    }  # fmt: skip


def _narrowed(model: Any, modules: Mapping[str, nn.Module]) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """(full sizes of linear layers that are exchanged for smaller ones, whole numbers that are set on modules)."""
    width, fields = {}, {}
    for key, value in model.object_patches.items():
        name = key.removeprefix(NETWORK)
        if key == name:
            continue
        owner, _, last = name.rpartition(".")
        if type(value) is int and owner in modules:
            fields.setdefault(owner, {})[last] = value
        elif name in modules and isinstance(value, (nn.Linear, QuantLinear)):
            whole = original_module(model, name)
            full = {"rows": whole.out_features, "columns": whole.in_features}
            if full != {"rows": value.out_features, "columns": value.in_features}:
                width[name] = full
    return width, fields


# Quantised layers


def _core_can_say(form: LayerFormat) -> bool:
    plain = not (form.smooth or form.beside or form.directions)
    return form.layout == "int8" and form.act_bits == 8 and form.rotation in ("none", "convrot") and plain


def _stored_layer(model: Any, name: str, layer: QuantLinear, changed: Changed) -> tuple[LayerFormat, dict[str, torch.Tensor]]:
    """How a layer is read again, and its tensors, with what this clone's patches add."""
    codes, added = _patched(model, name, layer, changed)
    parts = dict(layer.stored.with_codes(codes).tensors())
    if layer.smooth is not None:
        parts["smooth"] = layer.smooth
    if layer.rotation.signs is not None:
        parts["rotation_signs"] = layer.rotation.signs.to(torch.int8)
    if layer.rotation.kind == "dual":
        (_, first, _), (order, second, _) = layer.rotation.blocks
        parts |= {"rotation_first": first, "rotation_order": order.to(torch.int32), "rotation_second": second}
    directions, beside = layer.directions, 0
    if directions is not None:
        parts |= {"directions_down": directions.down, "directions_residual": directions.residual}
    if added is not None:
        beside = len(added[0]) or -1
        parts |= {"lora_up": added[1].contiguous(), **({"lora_down": added[0].contiguous()} if len(added[0]) else {})}
    form = LayerFormat(
        layer.layout, layer.bits, layer.act_bits, layer.group, layer.out_features, layer.in_features, layer.rotation.kind,
        layer.smooth is not None, layer.lora, beside, 0 if directions is None else len(directions.down),
    )  # fmt: skip
    if _core_can_say(form):
        parts["comfy_quant"] = core_marker(layer.rotation.kind)
    return form, parts


def _patched(model: Any, name: str, layer: QuantLinear, changed: Changed) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """(codes, factors beside them) with the LoRAs that this clone has on the layer, as its policy takes them."""
    key, codes = f"{NETWORK}{name}.weight", own_weight(model, name, layer)
    if key not in model.patches and key not in model.weight_wrapper_patches:
        return codes, layer.added
    base = layer.numbers(layer.stored.with_codes(codes))
    patched = layer.narrowed(changed(key, layer.widened(base)))
    if layer.lora == "requant":
        return layer.requantised(patched, layer.stored.with_codes(codes)), layer.added
    added = factors(patched - base, float(base.norm()))
    if layer.added is not None:
        added = factors(product(*added) + product(*layer.added), float(base.norm()))
    return codes, added


def _numbers(layer: QuantLinear, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight (n, k) float32 that a layer with these tensors stands for."""
    numbers = layer.numbers(layer.stored.with_codes(parts["weight"]))
    return numbers + product(parts.get("lora_down", ()), parts["lora_up"]) if "lora_up" in parts else numbers


# Factored layers


def _low_rank_tensors(
    model: Any, modules: Mapping[str, nn.Module], changed: Changed
) -> dict[str, tuple[dict[str, int], dict[str, torch.Tensor]]]:
    """Factored layer → (its sizes, its tensors, float32, with what this clone's patches add as more columns and rows of the factors)."""
    found: dict[str, tuple[dict[str, int], dict[str, torch.Tensor]]] = {}
    groups: dict[int, int] = {}
    for name, layer in modules.items():
        if not isinstance(layer, LowRankLinear):
            continue
        key, up, down = f"{NETWORK}{name}.weight", own_weight(model, name, layer).float(), layer.down.float()
        if key in model.patches or key in model.weight_wrapper_patches:
            base = layer.numbers(up)
            a, b = factors(changed(key, base) - base, float(base.norm()))
            up, down = torch.cat((up, b), dim=1), torch.cat((down, a if len(a) else torch.eye(layer.in_features)))
        parts = {"weight": up, "down": down}
        if layer.shared is not None and id(layer.shared) not in groups:
            groups[id(layer.shared)] = len(groups) + 1
            parts["shared"] = layer.shared.tensor
        sizes = {"rows": layer.out_features, "columns": layer.in_features, "rank": len(down), "group": groups.get(id(layer.shared), 0)}
        found[name] = (sizes, parts)
    return found


# Everything else


def changed_weight(model: Any, module: nn.Module, part: str, key: str, weight: torch.Tensor, changed: Changed) -> torch.Tensor:
    """`weight` with the patches that lie on it; those of a narrow layer are of the whole one's size, as the host merges them."""
    if not weight.is_floating_point():
        return weight
    if isinstance(module, NarrowWeights) and key in model.patches:
        wide = changed(key, getattr(module, f"convert_{part}")(weight.float()))
        return getattr(module, f"set_{part}")(wide, return_weight=True)
    return changed(key, weight.float()).to(weight.dtype)


def _plain_tensors(model: Any, modules: Mapping[str, nn.Module], changed: Changed) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight outside of quantised layers, patches applied."""
    for name, module in modules.items():
        if isinstance(module, (QuantLinear, LowRankLinear)):
            continue
        for part in [part for part, value in module._parameters.items() if value is not None]:
            full = f"{name}.{part}" if name else part
            weight = own_weight(model, name, module, part)
            yield full, changed_weight(model, module, part, NETWORK + full, weight, changed)
        for part, value in module._buffers.items():
            if value is not None and part not in module._non_persistent_buffers_set:
                yield f"{name}.{part}" if name else part, value
