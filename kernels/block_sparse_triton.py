"""The Triton side of block_sparse_attention.py: kernel, launcher, and the forms that are compiled ahead of time.

A program has BLOCK_M queries of one block and one head. It walks the blocks that its block keeps (CSR: `row_start`, `kept`) in tiles of
BLOCK_N keys. Rows are read through `order`, so that neighbours in a group need not be neighbours in memory; a row of 64 or 128 channels is
one or two full cache lines. Scores are kept in base 2: exp2 is one instruction.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .form import Form

try:
    import triton
    import triton.language as tl
except ImportError:  # said by `unfit`; the torch path needs nothing of it
    triton = None

__all__ = ["aot_forms", "launch", "unfit"]

WIDTHS = (16, 32, 64, 128)  # of a head; a power of two, as a tile's side
LOG2_E = math.log2(math.e)


def tile_shape(width: int) -> dict[str, int]:
    """Tiles whose accumulators and offsets stay in 255 registers a thread on every architecture of bench/kernels.py: nothing is spilled."""
    return {"BLOCK_M": 128, "BLOCK_N": 32 if width > 64 else 64, "num_warps": 8, "num_stages": 2}


def unfit(q: torch.Tensor, bias: torch.Tensor | None) -> str:
    """Why the kernel cannot be used for these tensors; an empty string where it can."""
    if triton is None:
        return "is not installed"
    if q.shape[-1] not in WIDTHS:
        return f"takes heads of {', '.join(map(str, WIDTHS))} channels, not {q.shape[-1]}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"does not take {q.dtype}"
    if bias is not None and (bias.shape[1] != 1 or bias.shape[2] != 1):
        return "takes a bias of keys alone"
    return ""


if triton is not None:

    @triton.jit
    def block_sparse_kernel(
        q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, order_ptr, starts_ptr, row_start_ptr, kept_ptr, tile_block_ptr, tile_first_ptr,
        heads, tokens, stride_b, stride_h, stride_n, scale,
        WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        tile, pair = tl.program_id(0), tl.program_id(1)
        sample = pair // heads
        base = sample.to(tl.int64) * stride_b + (pair % heads).to(tl.int64) * stride_h
        block = tl.load(tile_block_ptr + tile)
        position = tl.load(tile_first_ptr + tile) + tl.arange(0, BLOCK_M)
        inside = position < tl.load(starts_ptr + block + 1)
        channel = tl.arange(0, WIDTH)
        row = tl.load(order_ptr + position, mask=inside, other=0)
        # Rows of one head lie within 2³¹ elements: 32-bit offsets take half the registers of pointers.
        q_ptr, k_ptr, v_ptr, out_ptr = q_ptr + base, k_ptr + base, v_ptr + base, out_ptr + base
        place = row[:, None] * stride_n + channel[None, :]
        q = tl.load(q_ptr + place, mask=inside[:, None], other=0.0)
        best = tl.full((BLOCK_M,), -1e30, tl.float32)
        mass = tl.zeros((BLOCK_M,), tl.float32)
        total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for entry in range(tl.load(row_start_ptr + block), tl.load(row_start_ptr + block + 1)):
            other = tl.load(kept_ptr + entry)
            end = tl.load(starts_ptr + other + 1)
            for first in range(tl.load(starts_ptr + other), end, BLOCK_N):
                key = first + tl.arange(0, BLOCK_N)
                there = key < end
                source = tl.load(order_ptr + key, mask=there, other=0)
                offset = source[:, None] * stride_n + channel[None, :]
                k = tl.load(k_ptr + offset, mask=there[:, None], other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
                if HAS_BIAS:
                    scores += tl.load(bias_ptr + sample.to(tl.int64) * tokens + source, mask=there, other=0.0)[None, :]
                scores = tl.where(there[None, :], scores, -float("inf"))
                new_best = tl.maximum(best, tl.max(scores, axis=1))
                weight = tl.exp2(scores - new_best[:, None])
                fade = tl.exp2(best - new_best)
                v = tl.load(v_ptr + offset, mask=there[:, None], other=0.0)
                total = total * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
                mass = mass * fade + tl.sum(weight, axis=1)
                best = new_best
        # Read again: keeping the offsets of q through the loop would cost up to 64 registers a thread.
        row = tl.load(order_ptr + position, mask=inside, other=0, volatile=True)
        place = row[:, None] * stride_n + channel[None, :]
        tl.store(out_ptr + place, (total / mass[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
        if HAS_LSE:
            tl.store(lse_ptr + pair.to(tl.int64) * tokens + row, (best + tl.log2(mass)) * 0.6931471805599453, mask=inside)


def _tables(layout: Any, block_m: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """order, starts, row_start, kept, and block and first position of each tile of queries, all int32."""
    starts, row_start, tile_block, tile_first = [0], [0], [], []
    for i, (length, row) in enumerate(zip(layout.lengths, layout.kept)):
        firsts = range(starts[-1], starts[-1] + length, block_m)
        tile_first += firsts
        tile_block += [i] * len(firsts)
        starts.append(starts[-1] + length)
        row_start.append(row_start[-1] + len(row))
    lists = (starts, row_start, [i for row in layout.kept for i in row], tile_block, tile_first)
    made = [torch.tensor(values, dtype=torch.int32, device=device) for values in lists]
    return (torch.cat(layout.blocks).to(device, torch.int32), *made)


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Any, bias: torch.Tensor | None, with_lse: bool):
    """As block_sparse_attention; tensors that `unfit` has passed."""
    batch, heads, tokens, width = q.shape
    q, k, v = (x.contiguous() for x in (q, k, v))
    shape = tile_shape(width)
    known = layout.__dict__.setdefault("_device_tables", {})  # a layout serves every layer and step of a run
    where = (q.device, shape["BLOCK_M"])
    if where not in known:
        known[where] = _tables(layout, shape["BLOCK_M"], q.device)
    order, starts, row_start, kept, tile_block, tile_first = known[where]
    added = q
    if bias is not None:
        added = torch.zeros(bias.shape, device=q.device).masked_fill(~bias, -1e9) if bias.dtype == torch.bool else bias.float()
        added = (added.clamp(min=-1e9) * LOG2_E).expand(batch, 1, 1, tokens).contiguous()
    out = torch.empty_like(q)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32) if with_lse else q
    block_sparse_kernel[(len(tile_block), batch * heads)](
        q, k, v, added, out, lse, order, starts, row_start, kept, tile_block, tile_first, heads, tokens, *q.stride()[:3],
        width**-0.5 * LOG2_E, WIDTH=width, HAS_BIAS=bias is not None, HAS_LSE=with_lse,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **shape,
    )  # fmt: skip
    return (out, lse) if with_lse else out


def aot_forms(major: int) -> list[Form]:
    """The forms that bench/kernels.py compiles without a device; the same for every compute capability."""
    types = {name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")} | {"bias_ptr": "*fp32", "lse_ptr": "*fp32"}
    tables = ("order_ptr", "starts_ptr", "row_start_ptr", "kept_ptr", "tile_block_ptr", "tile_first_ptr")
    strides = ("stride_b", "stride_h", "stride_n")
    types |= {name: "*i32" for name in tables} | {name: "i32" for name in ("heads", "tokens", *strides)} | {"scale": "fp32"}
    forms = []
    for width in (64, 128):
        for lse in (False, True):
            shape = tile_shape(width)
            constants = {"WIDTH": width, "BLOCK_M": shape["BLOCK_M"], "BLOCK_N": shape["BLOCK_N"], "HAS_BIAS": True, "HAS_LSE": lse}
            options = {"num_warps": shape["num_warps"], "num_stages": shape["num_stages"]}
            name = f"block_sparse d{width}{' lse' * lse}"
            forms.append(Form(name, block_sparse_kernel, types, constants | {"PRECISION": "tf32"}, options, strides))
    return forms
