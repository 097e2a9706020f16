"""What a compressed file says about itself: a JSON that is checked field by field before a tensor is believed.

It stands twice in a file: as the tensor `compress.manifest` (uint8), since the stock loaders hand on tensors and nothing else, and under
`compress_manifest` in the metadata, for people. Version 1 describes quantised layers. Removed blocks (kept), narrowed ones (width) and
trained replacements (students) have their fields, which a file of this version leaves empty: a reader that does not know how to build them
refuses a file that has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..quant.linear import LORA_POLICIES
from ..quant.rotation import KINDS
from ..quant.stored import LAYOUTS

__all__ = ["CORE_NAME", "METADATA", "TENSOR", "VERSION", "LayerFormat", "Manifest", "ManifestError", "core_marker", "read_core_marker"]

FORMAT = "rectiflow.compressed"
VERSION = 1
TENSOR, METADATA = "compress.manifest", "compress_manifest"
CORE_NAME = "int8_tensorwise"
LONGEST = 16 << 20
LARGEST = 1 << 24  # channels
EMPTY = ("kept", "students", "width")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HASH = re.compile(r"[0-9a-f]{16}")


class ManifestError(ValueError):
    """A manifest that this reader does not take; the message says what is wrong in it."""


@dataclass(frozen=True)
class LayerFormat:
    """One quantised layer: rows × columns, and how its tensors are read."""

    layout: str
    bits: int
    act_bits: int
    group: int
    rows: int
    columns: int
    rotation: str
    smooth: bool
    lora: str

    def check(self, name: str) -> None:
        """Raises: ManifestError."""
        whole = {"bits": (2, 3, 4, 6, 8), "act_bits": (4, 6, 8, 16)}
        words = {"layout": LAYOUTS, "rotation": KINDS, "lora": LORA_POLICIES}
        for field_name, allowed in {**whole, **words}.items():
            value = getattr(self, field_name)
            if isinstance(value, bool) or value not in allowed:
                raise ManifestError(f"layer {name[:100]}: {field_name} is {str(value)[:50]!r}; known are {', '.join(map(str, allowed))}")
        for field_name in ("rows", "columns", "group"):
            value = getattr(self, field_name)
            if type(value) is not int or not (0 if field_name == "group" else 1) <= value <= LARGEST:
                raise ManifestError(f"layer {name[:100]}: {field_name} is {str(value)[:50]}")
        if type(self.smooth) is not bool:
            raise ManifestError(f"layer {name[:100]}: smooth is neither true nor false")
        grouped = self.layout == "groups"
        if (self.layout == "int8") != (self.bits == 8) or grouped != bool(self.group) or (grouped and self.columns % self.group):
            raise ManifestError(f"layer {name[:100]}: {self.layout} with {self.bits} bits, group {self.group} and {self.columns} columns")


@dataclass(frozen=True)
class Manifest:
    """base: how the network is built, {"kind": "tiny"} or {"kind": "detect"}; arch: class of the transformer; dtype: of the other weights;
    base_sha256_16: hash of the model that it was made from; parents: hashes of what came before that."""

    arch: str
    base: dict[str, str]
    base_sha256_16: str
    dtype: str
    quant: dict[str, LayerFormat]
    kept: dict[str, Any] = field(default_factory=dict)
    students: dict[str, Any] = field(default_factory=dict)
    width: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)

    def text(self) -> str:
        """JSON with sorted keys: equal manifests are equal texts."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":"))

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
            found = json.loads(bytes(stored.tolist()).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{TENSOR} is not JSON: {str(error)[:100]}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ManifestError(f"{TENSOR} is not of format {FORMAT}")
        if type(found.get("version")) is not int or found["version"] != VERSION:
            raise ManifestError(f"version {str(found.get('version'))[:20]} of {FORMAT}; this reader knows version {VERSION}")
        return cls._checked({name: value for name, value in found.items() if name not in ("format", "version")})

    @classmethod
    def _checked(cls, found: dict[str, Any]) -> Manifest:
        kinds = {"arch": str, "base": dict, "base_sha256_16": str, "dtype": str, "quant": dict, "kept": dict, "students": dict,
                 "width": dict, "train": dict, "parents": list}  # fmt: skip
        if set(found) != set(kinds):
            raise ManifestError(f"fields {', '.join(sorted(set(found) ^ set(kinds)))[:200]} are missing or unknown")
        for name, kind in kinds.items():
            if not isinstance(found[name], kind):
                raise ManifestError(f"{name} is {type(found[name]).__name__}, not {kind.__name__}")
        for name in EMPTY:
            if found[name]:
                raise ManifestError(f"the file has {name} (pruned or replaced blocks), which this reader cannot build")
        if found["base"].get("kind") not in ("tiny", "detect") or len(found["base"]) != 1:
            raise ManifestError(f"base is {str(found['base'])[:100]}; known are tiny and detect")
        if found["dtype"] not in DTYPES:
            raise ManifestError(f"dtype is {found['dtype'][:50]!r}; known are {', '.join(DTYPES)}")
        hashes = [found["base_sha256_16"], *found["parents"]]
        if not all(isinstance(value, str) and HASH.fullmatch(value) for value in hashes):
            raise ManifestError("base_sha256_16 and parents must be hashes of 16 hexadecimal digits")
        return cls(**{**found, "quant": {name: _layer(name, fields) for name, fields in found["quant"].items()}})


def _layer(name: str, fields: Any) -> LayerFormat:
    known = set(LayerFormat.__dataclass_fields__)
    if not isinstance(fields, Mapping) or set(fields) != known:
        raise ManifestError(f"layer {name[:100]} must have exactly the fields {', '.join(sorted(known))}")
    layer = LayerFormat(**fields)
    layer.check(name)
    return layer


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
