"""What a compressed file says about itself: a JSON that is checked field by field before a tensor is believed.

It stands twice in a file: as the tensor `compress.manifest` (uint8), since the stock loaders hand on tensors and nothing else, and under
`compress_manifest` in the metadata, for people. Names of layers and blocks are those of the whole model:

    {"format": "rectiflow.compressed", "version": 1, "arch": "Flux", "base": {"kind": "detect"}, "base_sha256_16": "<16 hex>",
     "dtype": "float16", "counts": {"double_blocks": 3}, "kept": {"double_blocks": [0, 2]}, "width": {"double_blocks.0.img_mlp.0":
     {"rows": 1024, "columns": 256}}, "fields": {"double_blocks.0": {"num_heads": 3}}, "plan": "<JSON of a prune plan>",
     "low_rank": {"double_blocks.0.img_mod.lin": {"rows": 1536, "columns": 256, "rank": 64, "group": 1}},
     "quant": {"double_blocks.0.img_mlp.0": {"layout": "groups", "bits": 4, …}}}

kept: blocks of a holder that are in the file, where some are not; tensors of these are renumbered without gaps. width: full size of a
linear layer that is stored narrower. fields: whole numbers that a narrowed block counts with. low_rank, left out where there is none:
layers that are two factors and a matrix shared by their group, stored with its first layer; group 0 has none. maps, left out where there
is none: MLPs that are one linear map, stored as its layer `map`, with the shapes of the weights that stood there,
{"double_blocks.0.img_mlp": {"0.weight": [1024, 256], …}}. text_runs, likewise: runs of blocks whose text is linear, first block to last,
{"double_blocks.1": "double_blocks.2"}; gone: modules that such a run does without, with the shapes of their weights, as in maps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..quant.directions import MOST
from ..quant.linear import LORA_POLICIES
from ..quant.rotation import KINDS
from ..quant.stored import LAYOUTS

__all__ = [
    "CORE_NAME", "METADATA", "TENSOR", "VERSION", "LayerFormat", "Manifest", "ManifestError", "Renumbering", "core_marker",
    "dtype_name", "read_core_marker", "widest_dtype",
]  # fmt: skip

FORMAT = "rectiflow.compressed"
VERSION = 1
TENSOR, METADATA = "compress.manifest", "compress_manifest"
CORE_NAME = "int8_tensorwise"
LONGEST = 64 << 20
LARGEST = 1 << 24  # channels
NARROWEST = 64  # a stored side is at least this share of the full one: the network is built at full size before it is narrowed
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPTIONAL = ("low_rank", "maps", "text_runs", "gone")  # fields that are left out where they are empty
DIRECTIONS = "directions"  # of a layer, likewise
HASH = re.compile(r"[0-9a-f]{16}")


class ManifestError(ValueError):
    """A manifest that this reader does not take; the message says what is wrong in it."""


def _whole(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ManifestError(f"{what} is {str(value)[:50]}, not a whole number from {low} to {high}")
    return value


def widest_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Of the largest floating tensor; float32 where there is none."""
    return max((t for t in tensors if t.is_floating_point()), key=torch.Tensor.numel, default=torch.zeros(0)).dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in DTYPES; float32 for one that a manifest does not know."""
    return next((name for name, value in DTYPES.items() if value == dtype), "float32")


@dataclass(frozen=True)
class LayerFormat:
    """One quantised layer: rows × columns, and how its tensors are read. beside: rank of what bypasses the codes; −1 for a full matrix.
    directions: of its input that are not rounded; left out of the manifest where there are none."""

    layout: str
    bits: int
    act_bits: int
    group: int
    rows: int
    columns: int
    rotation: str
    smooth: bool
    lora: str
    beside: int = 0
    directions: int = 0

    def check(self, name: str) -> None:
        """Raises: ManifestError."""
        whole = {"bits": (2, 3, 4, 6, 8), "act_bits": (4, 6, 8, 16)}
        words = {"layout": LAYOUTS, "rotation": KINDS, "lora": LORA_POLICIES}
        for field_name, allowed in {**whole, **words}.items():
            value = getattr(self, field_name)
            if isinstance(value, bool) or value not in allowed:
                raise ManifestError(f"layer {name[:100]}: {field_name} is {str(value)[:50]!r}; known are {', '.join(map(str, allowed))}")
        for field_name, low in (("rows", 1), ("columns", 1), ("group", 0), ("beside", -1), ("directions", 0)):
            _whole(getattr(self, field_name), low, LARGEST, f"layer {name[:100]}: {field_name}")
        if type(self.smooth) is not bool:
            raise ManifestError(f"layer {name[:100]}: smooth is neither true nor false")
        if self.directions > min(self.rows, self.columns, MOST):
            raise ManifestError(f"layer {name[:100]}: {self.directions} directions of {self.columns} columns and {self.rows} rows")
        grouped = self.layout == "groups"
        if (self.layout == "int8") != (self.bits == 8) or grouped != bool(self.group) or (grouped and self.columns % self.group):
            raise ManifestError(f"layer {name[:100]}: {self.layout} with {self.bits} bits, group {self.group} and {self.columns} columns")


@dataclass(frozen=True)
class Renumbering:
    """Between the whole model's numbers of blocks and those of a file that has no gaps. kept: holder → numbers, ascending."""

    kept: Mapping[str, tuple[int, ...]]

    def _mapped(self, name: str, number: Callable[[tuple[int, ...], int], int | None]) -> str | None:
        for holder, kept in self.kept.items():
            if name.startswith(f"{holder}."):
                index, _, rest = name[len(holder) + 1 :].partition(".")
                found = number(kept, int(index)) if index.isdecimal() and len(index) < 6 else None
                return None if found is None else f"{holder}.{found}" + (f".{rest}" if rest else "")
        return name

    def stored(self, name: str) -> str | None:
        """The file's name; None in a block that is not kept."""
        return self._mapped(name, lambda kept, index: kept.index(index) if index in kept else None)

    def whole(self, name: str) -> str | None:
        """The whole model's name of a file's; None beyond the kept blocks."""
        return self._mapped(name, lambda kept, index: kept[index] if index < len(kept) else None)


@dataclass(frozen=True)
class Manifest:
    """base: how the network is built, {"kind": "tiny"} or {"kind": "detect"}; arch: class of the transformer; dtype: of weights without
    codes; base_sha256_16: hash of the model that it was made from, as prune plans name it."""

    arch: str
    base: dict[str, str]
    base_sha256_16: str
    dtype: str
    quant: dict[str, LayerFormat] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    width: dict[str, dict[str, int]] = field(default_factory=dict)
    fields: dict[str, dict[str, int]] = field(default_factory=dict)
    plan: str = ""
    low_rank: dict[str, dict[str, int]] = field(default_factory=dict)
    maps: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    text_runs: dict[str, str] = field(default_factory=dict)
    gone: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def first_of_group(self) -> dict[int, str]:
        """Number of a group → its first layer, which holds the shared matrix."""
        return {sizes["group"]: name for name, sizes in reversed(self.low_rank.items()) if sizes["group"]}

    @property
    def numbering(self) -> Renumbering:
        return Renumbering(self.kept)

    def text(self) -> str:
        """JSON with sorted keys: equal manifests are equal texts."""
        said = {name: value for name, value in asdict(self).items() if value or name not in OPTIONAL}
        said["quant"] = {
            layer: {name: value for name, value in fields.items() if value or name != DIRECTIONS} for layer, fields in said["quant"].items()
        }
        return json.dumps({"format": FORMAT, "version": VERSION, **said}, sort_keys=True, separators=(",", ":"))

    def tensor(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.text().encode()), dtype=torch.uint8)

    @classmethod
    def read(cls, stored: torch.Tensor) -> Manifest:
        """The manifest of a tensor.

        Raises: ManifestError for anything but a manifest of this version.
        """
        if stored.dtype != torch.uint8 or stored.ndim != 1 or not 0 < stored.numel() <= LONGEST:
            raise ManifestError(f"{TENSOR} is {tuple(stored.shape)} {stored.dtype}, not bytes of a text")
        try:
            found = json.loads(stored.numpy().tobytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{TENSOR} is not JSON: {str(error)[:100]}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ManifestError(f"{TENSOR} is not of format {FORMAT}")
        if type(found.get("version")) is not int or found["version"] != VERSION:
            raise ManifestError(f"version {str(found.get('version'))[:20]} of {FORMAT}; this reader knows version {VERSION}")
        return cls._checked({name: value for name, value in found.items() if name not in ("format", "version")})

    @classmethod
    def _checked(cls, found: dict[str, Any]) -> Manifest:
        found = {**{name: {} for name in OPTIONAL}, **found}
        kinds = {name: dict for name in ("base", "quant", "counts", "kept", "width", "fields", *OPTIONAL)}
        kinds |= {name: str for name in ("arch", "base_sha256_16", "dtype", "plan")}
        if set(found) != set(kinds):
            raise ManifestError(f"fields {', '.join(sorted(set(found) ^ set(kinds)))[:200]} are missing or unknown")
        for name, kind in kinds.items():
            if not isinstance(found[name], kind):
                raise ManifestError(f"{name} is {type(found[name]).__name__}, not {kind.__name__}")
        if found["base"].get("kind") not in ("tiny", "detect") or len(found["base"]) != 1:
            raise ManifestError(f"base is {str(found['base'])[:100]}; known are tiny and detect")
        if found["dtype"] not in DTYPES:
            raise ManifestError(f"dtype is {found['dtype'][:50]!r}; known are {', '.join(DTYPES)}")
        if not HASH.fullmatch(found["base_sha256_16"]):
            raise ManifestError("base_sha256_16 must be a hash of 16 hexadecimal digits")
        if not all(isinstance(last, str) for last in found["text_runs"].values()):
            raise ManifestError("text_runs must name the last block of each run")
        checked = {
            "quant": {name: _layer(name, fields) for name, fields in found["quant"].items()},
            "kept": _kept(found["counts"], found["kept"]),
            "width": {name: _numbers(name, sizes, ("rows", "columns")) for name, sizes in found["width"].items()},
            "fields": {name: _numbers(name, counts) for name, counts in found["fields"].items()},
            "low_rank": {name: _factors(name, sizes) for name, sizes in found["low_rank"].items()},
            **{part: {name: _shapes(name, stood) for name, stood in found[part].items()} for part in ("maps", "gone")},
        }
        return cls(**{**found, **checked})


def _layer(name: str, fields: Any) -> LayerFormat:
    known = set(LayerFormat.__dataclass_fields__)
    if not isinstance(fields, Mapping) or set(fields) | {DIRECTIONS} != known:
        exactly = ", ".join(sorted(known - {DIRECTIONS}))
        raise ManifestError(f"layer {name[:100]} must have exactly the fields {exactly}, or {DIRECTIONS} too")
    layer = LayerFormat(**fields)
    layer.check(name)
    return layer


def _kept(counts: dict[str, Any], kept: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if set(counts) != set(kept):
        raise ManifestError("counts and kept must name the same holders")
    found = {}
    for holder, numbers in kept.items():
        count = _whole(counts[holder], 1, 10_000, f"counts of {holder[:100]}")
        if not isinstance(numbers, list):
            raise ManifestError(f"kept of {holder[:100]} is no list")
        found[holder] = tuple(_whole(number, 0, count - 1, f"kept of {holder[:100]}") for number in numbers)
        if list(found[holder]) != sorted(set(found[holder])):
            raise ManifestError(f"kept of {holder[:100]} does not rise")
    return found


def _numbers(name: str, found: Any, exactly: tuple[str, ...] | None = None) -> dict[str, int]:
    if not isinstance(found, dict) or (exactly is not None and set(found) != set(exactly)):
        raise ManifestError(f"{name[:100]} must have {', '.join(exactly or ('names and numbers',))}")
    return {what: _whole(value, 1, LARGEST, f"{what[:50]} of {name[:100]}") for what, value in found.items()}


def _factors(name: str, found: Any) -> dict[str, int]:
    group = found.get("group") if isinstance(found, dict) else None
    sizes = _numbers(name, {**found, "group": 1} if group == 0 and type(group) is int else found, ("rows", "columns", "rank", "group"))
    return {**sizes, "group": group}


def _shapes(name: str, found: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(found, dict) or not found or not all(isinstance(shape, list) and 1 <= len(shape) <= 2 for shape in found.values()):
        raise ManifestError(f"{name[:100]} must have shapes of the weights that stood there")
    return {part: tuple(_whole(side, 1, LARGEST, f"{part[:50]} of {name[:100]}") for side in shape) for part, shape in found.items()}


def core_marker(rotation: str) -> torch.Tensor:
    """The core's `comfy_quant` tensor of an 8-bit layer."""
    fields: dict[str, Any] = {"format": CORE_NAME}
    if rotation == "convrot":
        fields |= {"convrot": True, "convrot_groupsize": 256}
    return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)


def read_core_marker(stored: torch.Tensor, name: str) -> str:
    """The rotation that a `comfy_quant` tensor names.

    Raises: ManifestError for another format of the core, or another size of blocks.
    """
    try:
        found = json.loads(bytes(stored.flatten().tolist()).decode("utf-8"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ManifestError(f"layer {name[:100]}: comfy_quant is not JSON: {str(error)[:100]}") from error
    if not isinstance(found, dict) or found.get("format") != CORE_NAME:
        said = found.get("format") if isinstance(found, dict) else found
        raise ManifestError(f"layer {name[:100]}: format {str(said)[:50]!r} of the core; readable is {CORE_NAME}")
    if not found.get("convrot"):
        return "none"
    if found.get("convrot_groupsize") != 256:
        raise ManifestError(f"layer {name[:100]}: rotated in blocks of {str(found.get('convrot_groupsize'))[:20]}; readable are 256")
    return "convrot"
