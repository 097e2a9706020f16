"""The checked reader that every checkpoint goes through.

A safetensors file is 8 bytes (header length, little endian), a JSON header {name: {dtype, shape, data_offsets}, "__metadata__":
{text: text}} and one block of tensor data (https://github.com/huggingface/safetensors, "Format"). The header comes from a
stranger, so all of it is judged against the file's real size before anything is mapped: after that no tensor can reach outside
the block, share bytes with another, or claim more elements than it has.

Tensors are views of a private, copy-on-write mapping: no byte is read before it is used, and a write (a merged LoRA) stays in
this process.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

__all__ = ["MAX_HEADER_BYTES", "SafetensorsHeader", "TensorEntry", "load_safetensors", "load_torch_file", "read_header"]

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_LARGEST = 2**63 - 1  # what torch keeps sizes and strides in
_LENGTH_BYTES = 8

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip

# First bytes of files that people rename to .safetensors, or load in its place.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"<!DO": "a web page, so the download got an error page instead of the file",
    b"<htm": "a web page, so the download got an error page instead of the file",
    b"vers": "a Git LFS pointer, so the repository was cloned without its large files",
}
_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header. `begin` and `end` are byte offsets into the data block."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a valid file says about itself: tensors in the file's order, metadata, and where the data block starts."""

    path: str
    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    data_start: int


def _refuse(path: str, problem: str, remedy: str = "The file is damaged or was made by a faulty program; fetch it again.") -> NoReturn:
    raise ValueError(f"{path}: {problem}. {remedy}")


def _refuse_tensor(path: str, name: str, problem: str) -> NoReturn:
    shown = name if len(name) <= 200 else name[:197] + "…"
    _refuse(path, f"tensor {shown!r} {problem}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:200]!r} stands twice in one object")
    return entries


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")


def _parse_json(path: str, header: bytes) -> dict[str, Any]:
    if header[:1] != b"{":
        _refuse(path, f"the header starts with {header[:1]!r} instead of '{{'")
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        _refuse(path, f"the header is not UTF-8 text at byte {error.start}")
    except RecursionError:
        _refuse(path, "the header nests deeper than any checkpoint does")
    except json.JSONDecodeError as error:
        _refuse(path, f"the header is not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except ValueError as error:  # duplicate keys, NaN, integers of thousands of digits
        _refuse(path, f"the header is not valid: {error}")
    return parsed


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _elements(path: str, name: str, shape: list[int]) -> int:
    """Product of the sizes; refused where torch could not keep the strides, even if another size is 0."""
    elements = strides = 1
    for size in shape:
        elements *= size
        strides *= max(size, 1)
        if strides > _LARGEST:
            _refuse_tensor(path, name, f"has more elements than memory can address: shape {shape}")
    return elements


def _entry(path: str, name: str, fields: Any, data_bytes: int) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _refuse_tensor(path, name, "must have exactly the fields dtype, shape and data_offsets")
    dtype_name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        _refuse_tensor(path, name, f"has dtype {str(dtype_name)[:50]!r}; readable are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(_is_size(size) for size in shape):
        _refuse_tensor(path, name, f"has shape {str(shape)[:100]}; a shape is a list of at most 64 sizes from 0 to 2^63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        _refuse_tensor(path, name, f"has data_offsets {str(offsets)[:100]}; they are two byte positions")
    begin, end = offsets
    if begin > end or end > data_bytes:
        _refuse_tensor(path, name, f"claims bytes {begin} to {end}, but the file holds {data_bytes} bytes of data")
    dtype = _DTYPES[dtype_name]
    needed = _elements(path, name, shape) * dtype.itemsize
    if needed != end - begin:
        _refuse_tensor(path, name, f"needs {needed} bytes for {dtype_name} {shape}, but its offsets give it {end - begin}")
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _check_cover(path: str, tensors: list[TensorEntry], data_bytes: int) -> None:
    """The tensors must fill the data block without gap or overlap."""
    reached = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != reached:
            what = "overlaps the tensor before it" if tensor.begin < reached else "leaves a gap before it"
            _refuse_tensor(path, tensor.name, f"{what}: it starts at byte {tensor.begin}, the one before ends at {reached}")
        reached = tensor.end
    if reached != data_bytes:
        _refuse(path, f"{data_bytes - reached} of {data_bytes} bytes of data belong to no tensor")


def _check_kind(path: str) -> int:
    """Size in bytes of a regular file whose name does not say that it is a pickle."""
    if path.lower().endswith(_PICKLE_SUFFIXES):
        _refuse(
            path,
            "files of this kind are pickles, which can run any program when they are opened",
            "Use the .safetensors file that most models are also published as, or convert it on a machine you can lose: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors').",
        )
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        _refuse(path, "this is not a regular file", "Choose a .safetensors file.")
    return status.st_size


def read_header(path: str | os.PathLike) -> SafetensorsHeader:
    """Read and check a file's header without touching its data.

    Raises: ValueError naming the file, and the tensor where one is at fault; OSError where the file cannot be opened.
    """
    path = os.fspath(path)
    size = _check_kind(path)
    if size == 0:
        _refuse(path, "the file is empty", "The download was broken off before it began; fetch the file again.")
    with open(path, "rb") as file:
        start = file.read(_LENGTH_BYTES)
        for magic, what in _OTHER_FORMATS.items():
            if start.startswith(magic):
                _refuse(path, f"this is {what}, not a safetensors file", "Get the model's .safetensors file.")
        if len(start) < _LENGTH_BYTES:
            _refuse(path, f"the file has {size} bytes, which is less than a header's length takes")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_BYTES:
            _refuse(path, f"the header claims {length} bytes; the limit is {MAX_HEADER_BYTES}", "This is not a safetensors file.")
        if length > size - _LENGTH_BYTES:
            _refuse(path, f"the header claims {length} bytes, but {size - _LENGTH_BYTES} follow", "The file is cut off; fetch it again.")
        parsed = _parse_json(path, file.read(length))
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "__metadata__ must map text to text")
    data_start = _LENGTH_BYTES + length
    data_bytes = size - data_start
    tensors = [_entry(path, name, fields, data_bytes) for name, fields in parsed.items()]
    _check_cover(path, tensors, data_bytes)
    return SafetensorsHeader(path, tuple(tensors), metadata, data_start)


def _tensor(block: torch.Tensor | None, entry: TensorEntry) -> torch.Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    data = block[entry.begin : entry.end]
    if data.data_ptr() % entry.dtype.itemsize:  # an old file without padded header: a copy of torch's own is aligned
        data = data.clone()
    if entry.dtype == torch.bool:  # a byte that is neither 0 nor 1 is no bool
        return (data != 0).reshape(entry.shape)
    return data.view(entry.dtype).reshape(entry.shape)


def load_safetensors(path: str | os.PathLike, device: torch.device | str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a file and its metadata.

    Args:
        path: a .safetensors file.
        device: where the tensors go; the CPU, as views of the mapped file, when None.

    Returns:
        ({name: tensor} in the file's order, {text: text}).

    Raises: ValueError naming file and tensor; OSError where the file cannot be opened.
    """
    header = read_header(path)
    with torch.inference_mode(False):  # a graph engine loads inside inference mode; gradients need ordinary tensors
        tensors = _map(header)
        if device is not None and torch.device(device).type != "cpu":
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return tensors, dict(header.metadata)


def _map(header: SafetensorsHeader) -> dict[str, torch.Tensor]:
    block = None
    if any(entry.end > entry.begin for entry in header.tensors):
        with open(header.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        needed = header.data_start + max(entry.end for entry in header.tensors)
        if len(mapped) < needed:
            _refuse(header.path, "the file shrank while it was read", "Wait until the program that writes it has finished.")
        block = torch.frombuffer(mapped, dtype=torch.uint8)[header.data_start :]
    return {entry.name: _tensor(block, entry) for entry in header.tensors}


def load_torch_file(
    ckpt: str | os.PathLike, safe_load: bool = True, device: torch.device | str | None = None, return_metadata: bool = False
):  # fmt: skip
    """ComfyUI's name for reading a checkpoint. Only safetensors files are read, so `safe_load` is always kept."""
    tensors, metadata = load_safetensors(ckpt, device)
    return (tensors, metadata) if return_metadata else tensors
