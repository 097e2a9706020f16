"""A file judged before it is believed: the manifest field by field, each tensor's dtype and shape against it, scales for being finite,
numbers of a permutation for being one.

Files of ours, and those whose layers are the core's int8_tensorwise. Names in what is returned are the whole model's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...errors import input_error
from ..modules import NETWORK
from ..prune.low_rank import LowRankLinear, SharedMatrix
from ..prune.plan import PrunePlan, plan_from_json
from ..quant.directions import DTYPE, Directions
from ..quant.linear import QuantLinear
from ..quant.rotation import BLOCK, CONVROT, Rotation, constant_rotation
from ..quant.stored import StoredWeight, expected_tensors
from .manifest import DTYPES, NARROWEST, TENSOR, LayerFormat, Manifest, ManifestError, dtype_name, read_core_marker, widest_dtype
from .tensor_file import read_tensors
from .writing import FILE_PREFIX

__all__ = ["Loaded", "read_model"]

PREFIXES = (FILE_PREFIX, NETWORK)
UNKNOWN = "0" * 16  # a core's file does not say what it was made from


@dataclass(frozen=True)
class Loaded:
    """What a file holds: quantised layers and factored ones by name, and the other weights of the network by name; size of the file in
    bytes."""

    manifest: Manifest
    layers: dict[str, QuantLinear]
    plain: dict[str, torch.Tensor]
    plan: PrunePlan | None
    size: int
    low_rank: dict[str, LowRankLinear] = field(default_factory=dict)


class _Parts:
    """The file's tensors; those of a layer are taken out one by one."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.left = tensors

    def take(self, layer: str, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        found = self.left.pop(f"{layer}.{part}", None)
        if found is None:
            raise ManifestError(f"layer {layer[:100]}: the tensor {part} is missing")
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ManifestError(f"layer {layer[:100]}: {part} is {tuple(found.shape)} {found.dtype}, not {shape} {dtype}")
        if found.is_floating_point() and not bool(torch.isfinite(found.float()).all()):
            raise ManifestError(f"layer {layer[:100]}: {part} has NaN or infinity")
        return found

    def rotation(self, name: str, kind: str, width: int) -> Rotation:
        if kind == "dual":
            side = next(size for size in range(min(BLOCK, width), 0, -1) if width % size == 0)
            first, second = (self.take(name, f"rotation_{part}", torch.float32, (side, side)) for part in ("first", "second"))
            order = self.take(name, "rotation_order", torch.int32, (width,)).long()
            if not torch.equal(order.sort().values, torch.arange(width)):
                raise ManifestError(f"layer {name[:100]}: rotation_order is no permutation")
            return Rotation("dual", None, ((None, first, 1), (order, second, 1)))
        if kind in ("none", "convrot"):
            if kind == "convrot" and width % CONVROT:
                raise ManifestError(f"layer {name[:100]}: convrot with {width} columns")
            return constant_rotation(kind, None, width)
        signs = self.take(name, "rotation_signs", torch.int8, (width,))
        if not bool((signs.abs() == 1).all()):
            raise ManifestError(f"layer {name[:100]}: rotation_signs are not ±1")
        return constant_rotation(kind, signs.float(), width)

    def layer(self, name: str, form: LayerFormat) -> QuantLinear:
        expected = expected_tensors(form.layout, form.bits, form.rows, form.columns, form.group)
        parts = {part: self.take(name, part, dtype, shape) for part, (dtype, shape) in expected.items()}
        self.left.pop(f"{name}.comfy_quant", None)
        smooth = self.take(name, "smooth", torch.float32, (form.columns,)) if form.smooth else None
        if smooth is not None and not bool((smooth > 0).all()):
            raise ManifestError(f"layer {name[:100]}: smooth has numbers that are not positive")
        bias = self.left.get(f"{name}.bias")
        if bias is not None and (bias.shape != (form.rows,) or not bias.is_floating_point()):
            raise ManifestError(f"layer {name[:100]}: bias is {tuple(bias.shape)} {bias.dtype}")
        weight, scale = parts["weight"], parts["weight_scale"]
        book, group_scale = parts.get("tlq_codebook"), parts.get("weight_s_rel")
        stored = StoredWeight(form.layout, form.bits, form.columns, weight, scale, book, group_scale)
        if stored.book is not None and not bool((stored.book.diff(dim=-1) >= 0).all()):
            raise ManifestError(f"layer {name[:100]}: tlq_codebook does not rise")
        rotation = self.rotation(name, form.rotation, form.columns)
        beside, directions = self.beside(name, form), self.directions(name, form)
        return QuantLinear(stored, bias, form.act_bits, rotation, smooth, form.lora, beside, directions=directions)

    def low_rank(self, manifest: Manifest) -> dict[str, LowRankLinear]:
        """The factored layers, one object for the matrix of each group."""
        dtype, matrices, found = DTYPES[manifest.dtype], {}, {}
        for group, name in manifest.first_of_group.items():
            sizes = manifest.low_rank[name]
            matrices[group] = SharedMatrix(self.take(name, "shared", dtype, (sizes["rows"], sizes["columns"])))
        for name, sizes in manifest.low_rank.items():
            shared, rank = matrices.get(sizes["group"]), sizes["rank"]
            if shared is not None and tuple(shared.tensor.shape) != (sizes["rows"], sizes["columns"]):
                raise ManifestError(f"layer {name[:100]}: of another size than its group")
            up = self.take(name, "weight", dtype, (sizes["rows"], rank))
            down = self.take(name, "down", dtype, (rank, sizes["columns"]))
            bias = self.left.get(f"{name}.bias")
            if bias is not None and (bias.shape != (sizes["rows"],) or not bias.is_floating_point()):
                raise ManifestError(f"layer {name[:100]}: bias is {tuple(bias.shape)} {bias.dtype}")
            found[name] = LowRankLinear(shared, up, down, bias, manifest.first_of_group.get(sizes["group"]) == name)
        return found

    def beside(self, name: str, form: LayerFormat) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not form.beside:
            return None
        if form.beside < 0:
            return torch.empty(0, form.columns), self.take(name, "lora_up", torch.float32, (form.rows, form.columns))
        down = self.take(name, "lora_down", torch.float32, (form.beside, form.columns))
        return down, self.take(name, "lora_up", torch.float32, (form.rows, form.beside))

    def directions(self, name: str, form: LayerFormat) -> Directions | None:
        if not form.directions:
            return None
        down = self.take(name, "directions_down", DTYPE, (form.directions, form.columns))
        return Directions(down, self.take(name, "directions_residual", DTYPE, (form.rows, form.directions)))


def read_model(path: Path, where: str) -> Loaded:
    """The compressed model of a file, checked.

    Raises: NodeInputError naming the file and what is wrong with it.
    """
    try:
        tensors, _ = read_tensors(path)
        prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in tensors)), "")
        stored = tensors.pop(TENSOR, None)
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        manifest = _core_manifest(tensors) if stored is None else Manifest.read(stored)
        parts = _Parts(_whole_names(tensors, manifest))
        with torch.inference_mode(False):
            layers = {name: parts.layer(name, form) for name, form in manifest.quant.items()}
            low_rank = parts.low_rank(manifest)
        _check_widths(manifest, parts.left)
        plan = plan_from_json(manifest.plan, where) if manifest.plan else None
        return Loaded(manifest, layers, parts.left, plan, path.stat().st_size, low_rank)
    except (OSError, ValueError) as error:
        allowed, remedy = "a whole file of Save Compressed, or an int8 file of the core", "Save the model again, or fetch the file again."
        raise input_error(where, "path", f"{path.name}: {error}"[:190], allowed, remedy) from error


def _whole_names(tensors: dict[str, torch.Tensor], manifest: Manifest) -> dict[str, torch.Tensor]:
    named = {}
    for key, tensor in tensors.items():
        whole = manifest.numbering.whole(key)
        if whole is None:
            raise ManifestError(f"the tensor {key[:100]} is of a block beyond those that are kept")
        named[whole] = tensor
    return named


def _check_widths(manifest: Manifest, plain: dict[str, torch.Tensor]) -> None:
    for name, full in manifest.width.items():
        form, weight = manifest.quant.get(name), plain.get(f"{name}.weight")
        if form is None and (weight is None or weight.ndim != 2):
            raise ManifestError(f"width of {name[:100]}, which is no linear layer of the file")
        rows, columns = (form.rows, form.columns) if form is not None else weight.shape
        for what, small, large in (("rows", rows, full["rows"]), ("columns", columns, full["columns"])):
            if not small <= large <= NARROWEST * small:
                raise ManifestError(f"width of {name[:100]}: {small} of {large} {what}")


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
        raise ManifestError(f"no {TENSOR} and no comfy_quant tensor: not a compressed model that this node reads")
    widest = widest_dtype(t for key, t in tensors.items() if not key.endswith(".weight_scale"))
    return Manifest("", {"kind": "detect"}, UNKNOWN, dtype_name(widest), layers)
