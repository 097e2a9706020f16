"""What bench/kernels.py times: each kernel at one shape, what it replaces beside it, and the ceilings of the machine.

Shapes are those of a small transformer on a CPU (1024 tokens, 768 → 3072) and of Flux on a device (4608 tokens, 3072 → 12288).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rectiflow.accel.quant.rotation import convrot
from rectiflow.accel.quant.stored import store
from rectiflow.accel.quant.uniform import int8_rows
from rectiflow.host.embedded.ldm.common import apply_rope, rope
from rectiflow.kernels.block_sparse_attention import BlockLayout, block_sparse_attention
from rectiflow.kernels.int8_gemm import int8_gemm_scaled
from rectiflow.kernels.int8_linear import Int8Weight, int8_linear, prepare_int8
from rectiflow.kernels.norm_rope_write import QKNorm, norm_rope_write
from rectiflow.kernels.quantise_tokens import Modulation, Turn, quantise_tokens
from rectiflow.kernels.token_gather import gather_tokens, write_tokens

__all__ = ["Case", "ceilings", "kernels"]


@dataclass(frozen=True)
class Case:
    """run: the call. nbytes: read and written at least. flops: of its product, whose `kind` names its ceiling. weight_bytes: kept."""

    name: str
    shape: str
    run: Callable[[], object]
    nbytes: int
    flops: int = 0
    kind: str = ""
    weight_bytes: int = 0


@dataclass(frozen=True)
class Sizes:
    rows: int
    inner: int
    columns: int
    heads: int
    head: int

    @classmethod
    def of(cls, device: str) -> Sizes:
        return cls(1024, 768, 3072, 12, 64) if device == "cpu" else cls(4608, 3072, 12288, 24, 128)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    @property
    def name(self) -> str:
        return f"{self.rows} × {self.inner} → {self.columns}"


def ceilings(device: str) -> list[Case]:
    """A copy that no cache holds, and the products of torch."""
    size = Sizes.of(device)
    big, into = torch.ones(2, 1 << (25 if device == "cpu" else 28), device=device)  # ones: zeros may be no memory at all
    shapes = (size.rows, size.inner), (size.columns, size.inner)
    found = [Case("copy", f"{big.nbytes >> 20} MiB", lambda: into.copy_(big), 2 * big.nbytes)]
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, w = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        moved = x.nbytes + w.nbytes + size.rows * size.columns * x.element_size()
        found.append(Case(f"linear {kind}", size.name, lambda x=x, w=w: F.linear(x, w), moved, size.flops, kind, w.nbytes))
    x, w = (torch.randint(-127, 128, shape, device=device, dtype=torch.int8) for shape in shapes)
    moved = x.nbytes + w.nbytes + 4 * size.rows * size.columns
    found.append(Case("torch._int_mm", size.name, lambda: torch._int_mm(x, w.t()), moved, size.flops, "int8", w.nbytes))
    return found


def kernels(device: str) -> list[Case]:
    return [*_integers(device), *_quantisers(device), *_decoders(device), *_tokens(device), *_attention(device)]


def _integers(device: str) -> list[Case]:
    size = Sizes.of(device)
    codes, scale = (part.to(device) for part in int8_rows(torch.randn(size.columns, size.inner)))
    bias = torch.randn(size.columns, device=device)
    whole = Int8Weight(codes, scale)
    weights = codes.nbytes + scale.nbytes
    found = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, own_bias = torch.randn(size.rows, size.inner, device=device).to(dtype), bias.to(dtype)
        quantised = quantise_tokens(x)
        out = size.rows * size.columns * x.element_size()
        product = lambda q=quantised, b=own_bias, d=dtype: int8_gemm_scaled(*q, codes, scale, b, d)  # noqa: E731
        linear = lambda x=x, b=own_bias: int8_linear(x, whole, b)  # noqa: E731
        moved = quantised[0].nbytes + weights + out
        found.append(Case(f"int8_gemm_scaled → {name}", size.name, product, moved, size.flops, "int8", weights))
        found.append(Case(f"int8_linear, {name}", size.name, linear, x.nbytes + weights + out, size.flops, "int8", weights))
        if device == "cpu":
            packed = prepare_int8(codes, scale)
            prepared = lambda x=x, b=own_bias, p=packed: int8_linear(x, p, b)  # noqa: E731
            kept = 2 * codes.nbytes + scale.nbytes
            found.append(Case(f"int8_linear prepared, {name}", size.name, prepared, x.nbytes + weights + out, size.flops, "int8", kept))
    return found


def _quantisers(device: str) -> list[Case]:
    size = Sizes.of(device)
    x = torch.randn(size.rows, size.inner, device=device).bfloat16()
    wide = torch.randn(size.rows, size.columns, device=device).bfloat16()
    rotation = convrot(size.inner).to(torch.device(device))
    turn, dense = rotation.turn(None), Turn(matrix=rotation.blocks[0][1])
    modulation = Modulation(*(torch.randn(2, 1, size.inner, device=device).bfloat16()))
    shape, wide_shape = f"{size.rows} × {size.inner}", f"{size.rows} × {size.columns}"
    moved, wide_moved = x.numel() * 3, wide.numel() * 3
    return [
        Case("quantise", shape, lambda: quantise_tokens(x), moved),
        Case("hadamard_quant 256", shape, lambda: quantise_tokens(x, 8, turn), moved),
        Case("hadamard_quant 256 by one matrix", shape, lambda: quantise_tokens(x, 8, dense), moved),
        Case("gelu_quant", wide_shape, lambda: quantise_tokens(wide, activation="gelu_tanh"), wide_moved),
        Case("gelu, then quantise", wide_shape, lambda: quantise_tokens(F.gelu(wide, approximate="tanh")), wide_moved),
        Case("silu_quant", wide_shape, lambda: quantise_tokens(wide, activation="silu"), wide_moved),
        Case("modulate_hadamard_quant 256", shape, lambda: quantise_tokens(x, 8, turn, modulation=modulation), moved),
    ]


def _decoders(device: str) -> list[Case]:
    size = Sizes.of(device)
    weight = torch.randn(size.columns, size.inner)
    found = []
    for bits, group in ((4, 0), (4, 32), (3, 32)):
        # The fit searches grids on every row: a strip of 64 tells all there is to a decoder's time
        strip = store(weight[:64], bits, group, "tlq")
        tensors = {name: part.to(device) for name, part in strip.tensors().items()}
        times = size.columns // 64
        repeated = {name: part if name == "tlq_codebook" and part.ndim == 1 else part.repeat(times, 1) for name, part in tensors.items()}
        stored = type(strip)(strip.layout, bits, size.inner, *(repeated.get(name) for name in
                             ("weight", "weight_scale", "tlq_codebook", "weight_s_rel")))  # fmt: skip
        name = f"tlq_decode {bits} bits {f'groups of {group}' if group else 'rows'} → int8"
        shape = f"{size.columns} × {size.inner}"
        found.append(Case(name, shape, stored.as_int8, stored.nbytes + weight.numel(), 0, "", stored.nbytes))
    return found


def _tokens(device: str) -> list[Case]:
    """A quarter of the tokens."""
    size = Sizes.of(device)
    active = size.rows // 4
    index = torch.stack([torch.randperm(size.rows, device=device)[:active].sort().values for _ in range(2)])
    x = torch.randn(2, size.rows, size.inner, device=device).bfloat16()
    caches = [torch.zeros(2, size.heads, size.rows, size.head, device=device).bfloat16() for _ in range(2)]
    rows = [torch.randn(2, size.heads, active, size.head, device=device).bfloat16() for _ in range(2)]
    shape, heads = f"2 × {active} of {size.rows} × {size.inner}", f"2 × {size.heads} × {active} of {size.rows} × {size.head}"
    return [
        Case("gather_tokens of two", shape, lambda: gather_tokens([x, x], index), 2 * 2 * x.nbytes // 4),
        Case("write_tokens of two", heads, lambda: write_tokens(caches, index, rows, 2), 2 * 2 * rows[0].nbytes),
    ]


def _attention(device: str) -> list[Case]:
    size = Sizes.of(device)
    active = size.rows // 4
    qkv = torch.randn(1, active, 3, size.heads, size.head, device=device).bfloat16().permute(2, 0, 3, 1, 4)
    caches = [torch.zeros(1, size.heads, size.rows, size.head, device=device).bfloat16() for _ in range(2)]
    place = torch.randperm(size.rows, device=device)[None, :active].sort().values
    rotations = rope(place.float(), size.head, 1e4)
    scale = torch.ones(2, 1, size.head, device=device).bfloat16()
    norm = QKNorm(*scale)

    def steps() -> None:
        q, k = (apply_rope(F.rms_norm(part, (size.head,), weight[0], 1e-6), rotations[:, None]) for part, weight in zip(qkv, scale))
        write_tokens(caches, place, (k, qkv[2]), 2, backend="torch")
        return q

    moved = 12 * active * size.heads * size.head
    shape = f"{active} of {size.rows} × {size.heads} × {size.head}"
    found = [
        Case("norm_rope_write", shape, lambda: norm_rope_write(*qkv, *caches, place, rotations, norm), moved),
        Case("norm, RoPE and write one by one", shape, steps, moved),
    ]
    if device == "cuda":  # on a CPU bench/attention.py measures it
        blocks = tuple(torch.arange(4096).view(16, 256))
        layout = BlockLayout(blocks, tuple(tuple(sorted({i, (i + 1) % 16, (i + 4) % 16, (i - 1) % 16})) for i in range(16)))
        q, k, v = torch.randn(3, 1, size.heads, 4096, size.head, device=device).bfloat16()
        flops = 4 * layout.pairs * size.heads * size.head
        shape = f"{size.heads} × 4096 × {size.head}, a quarter of the pairs"
        found.append(Case("block_sparse_attention", shape, lambda: block_sparse_attention(q, k, v, layout), 4 * q.nbytes, flops, "bf16"))
    return found
