"""Packed twin-log codes to what a product takes: 8-bit integers with a scale a row, or numbers.

    rows     value[n, k] = book[n, code[n, k]]                                      int8;  ŵ = value·scale[n]
    groups   value[n, k] = book[code[n, k]]·group_scale[n, k // group]              ŵ = value·scale[n]
             as int8: top[n] = max_k |value[n, k]|/127,  round(value/top[n]),       ŵ = code·top[n]·scale[n]

packed (n, ⌈k/8⌉·bits) uint8: eight codes of b bits are b bytes, the first in the lowest bits. book (n, 2^b) or (2^b,) int8; group_scale
(n, k/group) 8-bit float (e4m3) or None; scale (n, 1) float32.

    reference   codes one by one, float64
    torch       look-ups; two codes of 4 bits or four of 3 at a time
    Triton      a program has a row: eight codes are one word of 32 bits, their levels come from the book in the first-level cache. Groups
                are walked twice, for the row's range and for the codes; packed rows are 384 bytes per 768 weights, so the second walk costs
                nothing beside the write
"""

from __future__ import annotations

import torch

from .backend import takes_triton
from .form import Form

try:
    import triton
    import triton.language as tl
except ImportError:  # said by `unfit`; the torch path needs nothing of it
    triton = None

__all__ = ["aot_forms", "reference", "tlq_decode", "torch_path", "unfit", "unpacked"]

TOP = 127
CHUNK = 1 << 17  # weights of a chunk on a CPU: half a MiB of float32, which stays in the second-level cache
TINY = 1e-12
LANE = 8  # codes that fill whole bytes together, whatever their width
LANES = 128  # of a step: 1024 codes, 8 a thread of 4 warps, which is one write of 8 bytes


def unpacked(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row of bytes, uint8."""
    if bits == 8:
        return packed[..., :count]
    if bits in (2, 4):  # codes do not cross bytes: shifts of single bytes in place of words of eight
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :count]
    lanes = packed.to(torch.int64).unflatten(-1, (-1, bits))
    words = (lanes << (8 * torch.arange(bits, device=packed.device))).sum(-1, keepdim=True)
    codes = (words >> (bits * torch.arange(LANE, device=packed.device))) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def reference(
    packed: torch.Tensor, book: torch.Tensor, bits: int, columns: int, scale: torch.Tensor, group_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """ŵ (n, k) float64."""
    place = torch.arange(columns, device=packed.device) * bits
    found = torch.zeros(len(packed), columns, dtype=torch.int64, device=packed.device)
    for bit in range(bits):  # a code of 3 bits may cross a byte
        found |= (packed.long()[:, (place % (LANE * bits) + bit) // 8 + place // (LANE * bits) * bits] >> ((place + bit) % 8) & 1) << bit
    value = (book.expand(len(packed), -1) if book.ndim == 1 else book).double().gather(1, found)
    if group_scale is not None:
        value = value * group_scale.double().repeat_interleave(columns // group_scale.shape[1], 1)
    return value * scale.double()


def _levels(packed: torch.Tensor, book: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """book[code] (n, k) int8."""
    if bits == 4 and columns % 2 == 0:  # a byte at a time: half the look-ups, of two levels in a word, and no unpacked codes
        low, high = (book[..., None, :], book[..., :, None])
        pairs = torch.stack(torch.broadcast_tensors(low, high), -1).view(torch.int16).flatten()  # (256,) or (n·256,)
        place = packed[:, : columns // 2].int()
        if book.ndim == 2:
            place += torch.arange(0, 256 * len(packed), 256, dtype=torch.int32, device=packed.device)[:, None]
        return pairs.index_select(0, place.flatten()).view(torch.int8).view(len(packed), columns)
    if bits == 3 and book.ndim == 1 and columns % LANE == 0:  # four codes of 12 bits are a look-up of four levels in a word
        first, second, third = packed.int().unflatten(1, (-1, 3)).unbind(2)
        word = first | second << 8 | third << 16
        four = torch.arange(4096, device=packed.device)[:, None] >> torch.arange(0, 12, 3, device=packed.device) & 7
        levels = book[four].view(torch.int32).flatten()
        return levels.index_select(0, torch.stack((word & 4095, word >> 12), -1).flatten()).view(torch.int8).view(len(packed), columns)
    codes = unpacked(packed, bits, columns)
    return book.gather(1, codes.long()) if book.ndim == 2 else book.index_select(0, codes.flatten().int()).view(codes.shape)


def torch_path(
    packed: torch.Tensor, book: torch.Tensor, bits: int, columns: int, scale: torch.Tensor, group_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(codes int8, scale (n, 1)), or for a floating dtype (ŵ, scale as it was)."""
    as_int8 = dtype == torch.int8
    if group_scale is None and as_int8:
        return _levels(packed, book, bits, columns), scale.clone()
    out, out_scale = torch.empty(len(packed), columns, dtype=dtype, device=packed.device), scale.clone()
    chunk = max(1, CHUNK // columns) if packed.device.type == "cpu" else max(1, len(packed))
    per_row = [packed, out, scale, out_scale, *([] if group_scale is None else [group_scale.float()])]
    for start, (codes, into, row, row_out, *groups) in enumerate(zip(*[part.split(chunk) for part in per_row])):
        own = book if book.ndim == 1 else book[start * chunk : start * chunk + len(codes)]
        value = _levels(codes, own, bits, columns).float()
        if groups:
            value = value.unflatten(1, (groups[0].shape[1], -1)).mul_(groups[0][..., None]).flatten(1)
        if as_int8:
            top = (torch.maximum(value.amax(1, keepdim=True), -value.amin(1, keepdim=True)) / TOP).clamp_min(TINY)
            into.copy_(value.div_(top).round_())
            row_out.copy_(top * row)
        else:
            into.copy_(value.mul_(row))
    return out, out_scale


def unfit(packed: torch.Tensor) -> str:
    """Why the kernel cannot be used for these tensors; an empty string where it can."""
    return "is not installed" if triton is None else ""


if triton is not None:

    @triton.jit
    def _e4m3(raw):
        """An 8-bit float of 4 and 3 bits as float32, by its bits: devices before compute capability 8.9 do not know it."""
        raw = raw.to(tl.int32)
        exponent, fraction = (raw >> 3) & 15, raw & 7
        normal = (((exponent + 120) << 23) | (fraction << 20)).to(tl.float32, bitcast=True)
        size = tl.where(exponent > 0, normal, fraction.to(tl.float32) * 0.001953125)
        return tl.where(raw > 127, -size, size)

    @triton.jit
    def _values(
        packed_ptr, book_ptr, group_scale_ptr, first, columns, BITS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr
    ):  # fmt: skip
        """book[code]·group_scale of eight codes each lane, (LANES, 8) float32, and their columns."""
        lane = first // 8 + tl.arange(0, LANES)
        there = lane * 8 < columns
        word = tl.zeros((LANES,), tl.uint64 if BITS > 4 else tl.uint32)
        for i in tl.static_range(BITS):
            word |= tl.load(packed_ptr + lane * BITS + i, mask=there, other=0).to(word.dtype) << (8 * i)
        place = tl.arange(0, 8)
        code = (word[:, None] >> (BITS * place)[None, :].to(word.dtype)).to(tl.int32) & ((1 << BITS) - 1)
        value = tl.load(book_ptr + code).to(tl.float32)
        column = lane[:, None] * 8 + place[None, :]
        if GROUP > 0:
            value *= _e4m3(tl.load(group_scale_ptr + column // GROUP, mask=column < columns, other=0))
        return value, column

    @triton.jit
    def decode_kernel(
        packed_ptr, book_ptr, group_scale_ptr, scale_ptr, out_ptr, out_scale_ptr, columns, row_bytes, row_book, row_groups,
        BITS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, TO_INT8: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        packed_ptr += row * row_bytes
        book_ptr += row * row_book
        group_scale_ptr += row * row_groups
        out_ptr += row * columns
        scale = tl.load(scale_ptr + row)
        top = 1.0
        if GROUP > 0 and TO_INT8:
            peak = tl.zeros((LANES, 8), tl.float32)
            for first in range(0, columns, LANES * 8):
                value, column = _values(packed_ptr, book_ptr, group_scale_ptr, first, columns, BITS, LANES, GROUP)
                peak = tl.maximum(peak, tl.where(column < columns, tl.abs(value), 0.0))
            top = tl.maximum(tl.div_rn(tl.max(tl.max(peak, axis=1), axis=0), 127.0), 1e-12)
        if TO_INT8:
            tl.store(out_scale_ptr + row, top * scale)
        for first in range(0, columns, LANES * 8):
            value, column = _values(packed_ptr, book_ptr, group_scale_ptr, first, columns, BITS, LANES, GROUP)
            if GROUP > 0 and TO_INT8:  # ties to even, as torch rounds: an addend of 1.5·2²³ leaves no place behind the point
                value = (tl.div_rn(value, tl.zeros((LANES, 8), tl.float32) + top) + 12582912.0) - 12582912.0
            if not TO_INT8:
                value *= scale
            tl.store(out_ptr + column, value.to(out_ptr.dtype.element_ty), mask=column < columns)


def launch(
    packed: torch.Tensor, book: torch.Tensor, bits: int, columns: int, scale: torch.Tensor, group_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    packed, book, scale = packed.contiguous(), book.contiguous(), scale.contiguous()
    out, out_scale = torch.empty(len(packed), columns, dtype=dtype, device=packed.device), scale.clone()
    if out.numel():
        groups = packed if group_scale is None else group_scale.contiguous().view(torch.uint8)
        decode_kernel[(len(packed),)](
            packed, book, groups, scale, out, out_scale, columns, packed.shape[1], 0 if book.ndim == 1 else book.shape[1], groups.shape[1],
            BITS=bits, LANES=LANES, GROUP=0 if group_scale is None else columns // group_scale.shape[1], TO_INT8=dtype == torch.int8,
            num_warps=4,
        )  # fmt: skip
    return out, out_scale


@torch.library.custom_op(
    "rectiflow::tlq_decode", mutates_args=(),
    schema="(Tensor packed, Tensor book, int bits, int columns, Tensor scale, Tensor? group_scale, ScalarType dtype) -> (Tensor, Tensor)",
)  # fmt: skip
def _operator(packed, book, bits, columns, scale, group_scale, dtype):
    run = launch if packed.is_cuda else torch_path
    return run(packed, book, bits, columns, scale, group_scale, dtype)


@_operator.register_fake
def _(packed, book, bits, columns, scale, group_scale, dtype):
    return packed.new_empty((packed.shape[0], columns), dtype=dtype), torch.empty_like(scale)


def tlq_decode(
    packed: torch.Tensor, book: torch.Tensor, bits: int, columns: int, scale: torch.Tensor, group_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.int8, backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """packed (n, bytes) uint8 → (codes (n, columns) int8, scale (n, 1) float32), or for a floating `dtype` (ŵ (n, columns), scale).

    Args:
        book: (2^bits,) for all rows or (n, 2^bits), int8. scale: (n, 1) float32. group_scale: (n, groups) e4m3, groups that divide columns.
        backend: auto (Triton on CUDA where it is installed, else torch), torch or triton.

    Raises: ValueError for rows that are not as long as `columns` codes, groups that do not divide them, or a backend that is not there.
    """
    if not 1 <= bits <= 8 or packed.ndim != 2 or packed.shape[1] != -(-columns // LANE) * bits or book.shape[-1] != 1 << bits:
        raise ValueError(f"tlq_decode: rows {tuple(packed.shape)} and a book {tuple(book.shape)} for {columns} codes of {bits} bits")
    if group_scale is not None and (columns % group_scale.shape[1] or len(group_scale) != len(packed)):
        raise ValueError(f"tlq_decode: scales of groups {tuple(group_scale.shape)} for {len(packed)} rows of {columns}")
    if takes_triton("tlq_decode", backend, packed.is_cuda, lambda: unfit(packed)):
        return (_operator if packed.is_cuda else launch)(packed, book, bits, columns, scale, group_scale, dtype)
    return torch_path(packed, book, bits, columns, scale, group_scale, dtype)


def aot_forms(major: int) -> list[Form]:
    """The forms that bench/kernels.py compiles without a device; the same for every compute capability."""
    types = {"packed_ptr": "*u8", "book_ptr": "*i8", "group_scale_ptr": "*u8", "scale_ptr": "*fp32", "out_scale_ptr": "*fp32"}
    types |= {name: "i32" for name in ("columns", "row_bytes", "row_book", "row_groups")}
    forms = []
    for bits, group, out in ((4, 0, "i8"), (4, 32, "i8"), (3, 32, "i8"), (6, 0, "i8"), (4, 32, "bf16")):
        constants = {"BITS": bits, "LANES": LANES, "GROUP": group, "TO_INT8": out == "i8"}
        name = f"tlq_decode {bits} bits {'groups' if group else 'rows'} → {out.replace('i8', 'int8')}"
        aligned = ("columns", "row_bytes", "row_book")
        forms.append(Form(name, decode_kernel, types | {"out_ptr": f"*{out}"}, constants, {"num_warps": 4, "num_stages": 3}, aligned))
    return forms
