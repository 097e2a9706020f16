"""Tensors into a safetensors file, byte for byte the same for the same tensors, whole or not at all.

The layout is the format's own (https://github.com/huggingface/safetensors): 8 bytes of length, a JSON header padded to 8 bytes, the data by
falling size of an element and name. The package writes metadata in the order of a hash table, which differs from run to run; here it is
sorted.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["read_tensors", "write_tensors"]

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
ALIGNED = 8


def _header(tensors: list[tuple[str, torch.Tensor]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, tensor in tensors:
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % ALIGNED)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write `path`; what stood there stays until the new file is whole and on the disk.

    Raises: OSError for a disk that is full or a folder that cannot be written; ValueError for a dtype that the format does not have.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors files do not hold")
    header = _header(ordered, metadata)
    hidden = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(hidden, "xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _, tensor in ordered:
                flat = tensor.detach().cpu().contiguous().flatten()
                file.write(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a file, in memory of their own.

    Raises: OSError, or ValueError saying what is wrong with the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with torch.inference_mode(False), safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"no readable safetensors file: {error}") from error
