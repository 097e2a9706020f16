"""Quantised models as files: what is written of a MODEL, and what is read back before a network is built around it.

Forms of a file:

    rectiflow   every layout; a manifest says which layer is what. Layers that the core's int8_tensorwise can say are written exactly so,
                tensor by tensor and with its marker, so that a file with only such layers loads in a current ComfyUI as well
    core_int8   only such layers, without our manifest
    plain       no quantised layer: the numbers that the codes stand for, for any loader

A file that is read is judged before it is believed: the manifest field by field, each tensor's dtype and shape against it, scales for
being finite, codes of a permutation for being one.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import input_error
from ..quant.attach import PREFIX, own_weight, quantised_parts
from ..quant.linear import QuantLinear
from ..quant.rotation import BLOCK, Rotation, constant_rotation
from ..quant.stored import StoredWeight, expected_tensors
from .manifest import DTYPES, METADATA, TENSOR, LayerFormat, Manifest, ManifestError, core_marker, read_core_marker
from .tensor_file import read_tensors

__all__ = ["FORMS", "Loaded", "describe", "install", "model_tensors", "read_model"]

FORMS = ("rectiflow", "core_int8", "plain")
FILE_PREFIX = "model.diffusion_model."
PREFIXES = (FILE_PREFIX, PREFIX)
SAMPLE = 64  # numbers of each weight that go into the hash of a model
Merge = Callable[[str, torch.Tensor], torch.Tensor]


# Writing


def _format_of(layer: QuantLinear) -> LayerFormat:
    return LayerFormat(
        layer.layout, layer.bits, layer.act_bits, layer.group, layer.out_features, layer.in_features, layer.rotation.kind,
        layer.smooth is not None, layer.lora,
    )  # fmt: skip


def _core_can_say(form: LayerFormat) -> bool:
    return form.layout == "int8" and form.act_bits == 8 and form.rotation in ("none", "convrot") and not form.smooth


def _layer_tensors(layer: QuantLinear, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(layer.stored.with_codes(codes).tensors())
    if layer.smooth is not None:
        named["smooth"] = layer.smooth
    if layer.rotation.signs is not None:
        named["rotation_signs"] = layer.rotation.signs.to(torch.int8)
    if layer.rotation.kind == "dual":
        (_, first, _), (order, second, _) = layer.rotation.blocks
        named |= {"rotation_first": first, "rotation_order": order.to(torch.int32), "rotation_second": second}
    if _core_can_say(_format_of(layer)):
        named["comfy_quant"] = core_marker(layer.rotation.kind)
    return named


def _patched_codes(model: Any, name: str, layer: QuantLinear, merge: Merge, where: str) -> torch.Tensor:
    """The codes with the LoRAs that this clone has on the layer."""
    key = f"{PREFIX}{name}.weight"
    kept = model.backup.get(key)
    codes = layer.weight.data if kept is None or kept.weight.dtype != layer.weight.dtype else kept.weight
    if key not in model.patches:
        return codes
    if layer.lora == "bypass":
        remedy = "Put the LoRA before Quantize with policy before, or choose the policy requant."
        raise input_error(where, "model", f"a LoRA that bypasses the codes of {name}", "LoRAs that are in the codes", remedy)
    unpatched = layer.numbers(layer.stored.with_codes(codes))
    return layer.stored.requantised(layer._into_basis(merge(key, unpatched)), zlib.crc32(key.encode()))


def _plain_tensors(model: Any, parts: Mapping[str, QuantLinear], merge: Merge) -> dict[str, torch.Tensor]:
    """Every weight outside of quantised layers, patches applied."""
    transformer, found = model.get_model_object("diffusion_model"), {}
    for name, module in transformer.named_modules():
        if name in parts:
            continue
        own = model.get_model_object(PREFIX + name) if isinstance(module, QuantLinear) else module
        for part, value in _persistent(own):
            key = f"{name}.{part}" if name else part
            weight = own_weight(model, name, own) if part == "weight" else value.data
            found[key] = merge(PREFIX + key, weight.float()).to(weight.dtype) if PREFIX + key in model.patches else weight
    return found


def _persistent(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    own = [(name, value) for name, value in module._parameters.items() if value is not None]
    buffers = [(name, value) for name, value in module._buffers.items() if value is not None]
    return own + [(name, value) for name, value in buffers if name not in module._non_persistent_buffers_set]


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits of names, shapes and a few numbers of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        sample = tensors[name].flatten()[:SAMPLE].float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def model_tensors(
    model: Any, form: str, dtype: str, base: str, merge: Merge, where: str
) -> tuple[dict[str, torch.Tensor], dict[str, str], Manifest]:
    """(tensors, metadata, manifest) of MODEL in one of FORMS.

    Args:
        dtype: of the weights that are not quantised, one of DTYPES, or "same". base: "tiny" or "detect", how the network is built again.
        merge: a weight's key and its float32 numbers → the numbers with this clone's patches.

    Raises: NodeInputError for a model without quantised layers, and for layers that the form cannot say.
    """
    parts = quantised_parts(model)
    if not parts:
        raise input_error(where, "model", "a model without quantised layers", "a quantised one", "Put Quantize before this node.")
    formats = {name: _format_of(layer) for name, layer in parts.items()}
    foreign = [name for name, found in formats.items() if not _core_can_say(found)]
    if form == "core_int8" and foreign:
        allowed = "W8A8 layers with rotation none or convrot and no smoothing"
        remedy = "Choose rectiflow, or quantise with 8 bits, rotation convrot and smooth_alpha 0."
        raise input_error(where, "format", f"core_int8 with {len(foreign)} other layers: {foreign[0]}, …", allowed, remedy)
    plain = _plain_tensors(model, parts, merge)
    widest = max((t for t in plain.values() if t.is_floating_point()), key=torch.Tensor.numel, default=torch.zeros(0))
    chosen = DTYPES.get(dtype, widest.dtype)
    plain = {name: weight.to(chosen) if weight.is_floating_point() else weight for name, weight in plain.items()}
    named = next((name for name, value in DTYPES.items() if value == chosen), "float32")
    arch = type(model.get_model_object("diffusion_model")).__name__
    manifest = Manifest(arch, {"kind": base}, fingerprint(plain), named, formats)
    tensors = {FILE_PREFIX + name: weight for name, weight in plain.items()}
    for name, layer in parts.items():
        codes = _patched_codes(model, name, layer, merge, where)
        if form == "plain":
            tensors[f"{FILE_PREFIX}{name}.weight"] = layer.numbers(layer.stored.with_codes(codes)).to(chosen)
        else:
            tensors |= {f"{FILE_PREFIX}{name}.{part}": tensor for part, tensor in _layer_tensors(layer, codes).items()}
        if layer.bias is not None:
            tensors[f"{FILE_PREFIX}{name}.bias"] = layer.bias.data.to(chosen)
    if form != "rectiflow":
        return tensors, {}, manifest
    return tensors | {TENSOR: manifest.tensor()}, {METADATA: manifest.text()}, manifest


# Reading


@dataclass(frozen=True)
class Loaded:
    """What a file holds: quantised layers by name; plain, the state dict of the network, where each quantised weight is one number spread
    over its shape (it takes no memory); size in bytes."""

    manifest: Manifest
    layers: dict[str, QuantLinear]
    plain: dict[str, torch.Tensor]
    size: int

    def prefixed(self) -> dict[str, torch.Tensor]:
        return {FILE_PREFIX + name: weight for name, weight in self.plain.items()}


def _take(tensors: dict[str, torch.Tensor], layer: str, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    found = tensors.pop(f"{layer}.{part}", None)
    if found is None:
        raise ManifestError(f"layer {layer[:100]}: the tensor {part} is missing")
    if found.dtype != dtype or tuple(found.shape) != shape:
        raise ManifestError(f"layer {layer[:100]}: {part} is {tuple(found.shape)} {found.dtype}, not {shape} {dtype}")
    if found.is_floating_point() and not bool(torch.isfinite(found.float()).all()):
        raise ManifestError(f"layer {layer[:100]}: {part} has NaN or infinity")
    return found


def _rotation_of(tensors: dict[str, torch.Tensor], name: str, form: LayerFormat) -> Rotation:
    width = form.columns
    if form.rotation == "dual":
        side = next(size for size in range(min(BLOCK, width), 0, -1) if width % size == 0)
        first, second = (_take(tensors, name, f"rotation_{part}", torch.float32, (side, side)) for part in ("first", "second"))
        order = _take(tensors, name, "rotation_order", torch.int32, (width,)).long()
        if not torch.equal(order.sort().values, torch.arange(width)):
            raise ManifestError(f"layer {name[:100]}: rotation_order is no permutation")
        return Rotation("dual", None, ((None, first, 1), (order, second, 1)))
    if form.rotation in ("none", "convrot"):
        if form.rotation == "convrot" and width % 256:
            raise ManifestError(f"layer {name[:100]}: convrot with {width} columns")
        return constant_rotation(form.rotation, None, width)
    signs = _take(tensors, name, "rotation_signs", torch.int8, (width,))
    if not bool((signs.abs() == 1).all()):
        raise ManifestError(f"layer {name[:100]}: rotation_signs are not ±1")
    return constant_rotation(form.rotation, signs.float(), width)


def _layer_from(tensors: dict[str, torch.Tensor], name: str, form: LayerFormat) -> QuantLinear:
    expected = expected_tensors(form.layout, form.bits, form.rows, form.columns, form.group)
    parts = {part: _take(tensors, name, part, dtype, shape) for part, (dtype, shape) in expected.items()}
    tensors.pop(f"{name}.comfy_quant", None)
    smooth = _take(tensors, name, "smooth", torch.float32, (form.columns,)) if form.smooth else None
    if smooth is not None and not bool((smooth > 0).all()):
        raise ManifestError(f"layer {name[:100]}: smooth has numbers that are not positive")
    bias = tensors.get(f"{name}.bias")
    if bias is not None and (bias.shape != (form.rows,) or not bias.is_floating_point()):
        raise ManifestError(f"layer {name[:100]}: bias is {tuple(bias.shape)} {bias.dtype}")
    stored = StoredWeight(
        form.layout, form.bits, form.columns, parts["weight"], parts["weight_scale"], parts.get("tlq_codebook"), parts.get("weight_s_rel")
    )
    return QuantLinear(stored, bias, form.act_bits, _rotation_of(tensors, name, form), smooth, form.lora)


def _core_manifest(tensors: dict[str, torch.Tensor]) -> Manifest:
    """The manifest that a file of the core's stands for; its scales are brought to one a row."""
    layers = {}
    for name in [key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")]:
        rotation = read_core_marker(tensors[f"{name}.comfy_quant"], name)
        weight, scale = tensors.get(f"{name}.weight"), tensors.get(f"{name}.weight_scale")
        if weight is None or scale is None or weight.ndim != 2 or scale.numel() not in (1, weight.shape[0]):
            raise ManifestError(f"layer {name[:100]}: weight and weight_scale do not make a linear layer")
        tensors[f"{name}.weight_scale"] = scale.float().reshape(-1, 1).expand(weight.shape[0], 1).contiguous()
        form = LayerFormat("int8", 8, 8, 0, weight.shape[0], weight.shape[1], rotation, False, "bypass")
        form.check(name)
        layers[name] = form
    if not layers:
        raise ManifestError(f"no {TENSOR} and no comfy_quant tensor: not a quantised model that this node reads")
    rest = {k: t for k, t in tensors.items() if t.is_floating_point() and not k.endswith(".weight_scale")}
    widest = max(rest.values(), key=torch.Tensor.numel, default=torch.zeros(0)).dtype
    named = next((name for name, value in DTYPES.items() if value == widest), "float32")
    return Manifest("", {"kind": "detect"}, fingerprint(rest), named, layers)


def read_model(path: Path, where: str) -> Loaded:
    """The quantised model of a file, checked.

    Raises: NodeInputError naming the file and what is wrong with it.
    """
    try:
        tensors, _ = read_tensors(path)
        prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in tensors)), "")
        stored = tensors.pop(TENSOR, None)
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        manifest = _core_manifest(tensors) if stored is None else Manifest.read(stored)
        dtype = DTYPES[manifest.dtype]
        layers = {}
        with torch.inference_mode(False):
            for name, form in manifest.quant.items():
                layers[name] = _layer_from(tensors, name, form)
                tensors[f"{name}.weight"] = torch.zeros(1, 1, dtype=dtype).expand(form.rows, form.columns)
        return Loaded(manifest, layers, tensors, path.stat().st_size)
    except (OSError, ValueError) as error:
        remedy = "Save the model again, or fetch the file again."
        allowed = "a whole file of Save Compressed, or an int8 file of the core"
        raise input_error(where, "path", f"{path.name}: {error}"[:190], allowed, remedy) from error


def install(model: Any, loaded: Loaded, where: str) -> Any:
    """Put the file's layers into the network of a MODEL that was just made from `loaded.plain` and that nobody else has.

    Raises: NodeInputError for a layer that the network does not have.
    """
    transformer = model.get_model_object("diffusion_model")
    for name, layer in loaded.layers.items():
        owner, _, last = name.rpartition(".")
        try:
            parent = transformer.get_submodule(owner)
            own = getattr(parent, last)
        except AttributeError:
            own = None
        if not isinstance(own, nn.Linear) or (own.out_features, own.in_features) != (layer.out_features, layer.in_features):
            got = f"a file whose layer {name[:100]} is not in {type(transformer).__name__}"
            raise input_error(where, "path", got, "layers of the model that the file describes", "Save the model again.")
        setattr(parent, last, layer)
    model.size = 0
    model.model_size()
    return model


def describe(loaded: Loaded) -> str:
    """What a file holds, as text with a table."""
    manifest = loaded.manifest
    weights = sum(form.rows * form.columns for form in manifest.quant.values())
    stored = sum(layer.nbytes for layer in loaded.layers.values())
    others = sum(t.nbytes for n, t in loaded.plain.items() if not (n.endswith(".weight") and n.removesuffix(".weight") in loaded.layers))
    arch = manifest.arch or "core int8 file"
    lines = [f"{arch}, made from {manifest.base_sha256_16}; {loaded.size / 2**20:.2f} MiB, others in {manifest.dtype}"]
    bits = 8 * stored / max(weights, 1)
    lines += [f"{len(loaded.layers)} quantised layers: {weights} weights in {stored} bytes, {bits:.2f} bits a weight"]
    lines += [f"everything else: {others} bytes", ""]
    lines += ["| layer | size | format | rotation | bits/weight | LoRA |", "|---|---|---|---|---|---|"]
    for name, form in manifest.quant.items():
        group = f" group {form.group}" if form.group else ""
        what = f"W{form.bits}A{form.act_bits} {form.layout}{group}"
        rotation = form.rotation + (" + smooth" if form.smooth else "")
        size = f"{form.rows}×{form.columns}"
        lines.append(f"| {name} | {size} | {what} | {rotation} | {loaded.layers[name].bits_per_weight:.2f} | {form.lora} |")
    return "\n".join(lines)
