"""A product of 8-bit integers with the scales, the bias and the change of dtype behind it.

    y[m, n] = x_scale[m]·w_scale[n]·Σ_k x[m, k]·w[n, k] + bias[n]

x (m, k) and w (n, k) int8, x_scale (m, 1) and w_scale (n,) float32, bias (n,) or None, y (m, n) in the dtype asked for. Sums are exact:
int32 holds 127²·k up to k = 133 000.

    reference   float64
    torch       torch's int8 product, on a CPU in chunks of rows that are scaled while they lie in the cache. A CPU without instructions for
                it (VNNI) takes that of float32, which is many times as fast there as torch's loop over integers and the same numbers:
                sums are exact up to k = 1040, where they could reach 2^24, and to a float32's rounding beyond
    Triton      the same with the scales as its epilogue: int32 sums never leave the registers, where torch writes and reads 4·m·n bytes
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

__all__ = [
    "CHUNK", "CPU_MULTIPLIES_BYTES", "aot_forms", "int8_gemm_scaled", "multiplicand", "reference", "scaled_product", "torch_path", "unfit",
]  # fmt: skip

CHUNK = 128  # rows whose int32 sums stay in the second-level cache: 1.5 MiB at 3072 outputs
GROUP = 8  # tiles of rows that take a tile of weights one after the other: the weights are read from the second-level cache
# Whether the processor has VNNI. Without it oneDNN adds pairs of byte products in 16 bits, where large ones end at 32767.
CPU_MULTIPLIES_BYTES = getattr(torch.cpu, "_is_vnni_supported", lambda: True)()
SMALL = 64  # rows up to which half of a tile's 128 would be empty


def reference(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    sums = x.double() @ weight.double().t()
    out = sums * x_scale.view(-1, 1).double() * w_scale.double()
    return (out if bias is None else out + bias.double()).to(dtype)


def multiplicand(weight: torch.Tensor) -> torch.Tensor:
    """Codes (n, k) int8 as the product of this device takes them, for several calls of scaled_product."""
    return weight if weight.device.type != "cpu" or CPU_MULTIPLIES_BYTES else weight.float()


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (m, k) int8, weight (n, k) of `multiplicand` → sums (m, n)."""
    if weight.is_floating_point():
        return x.float() @ weight.t()
    if x.device.type != "cpu" and (weight.shape[0] % 8 or weight.shape[1] % 8):  # what CUDA's product asks for
        return x.double() @ weight.double().t()
    if x.device.type != "cpu" and len(x) <= 16:
        return torch._int_mm(torch.nn.functional.pad(x, (0, 0, 0, 17 - len(x))), weight.t())[: len(x)]
    return torch._int_mm(x, weight.t())


def torch_path(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    added = None if bias is None else bias.float()
    rows, weight = CHUNK if x.device.type == "cpu" else max(1, x.shape[0]), multiplicand(weight)
    for part, scale, into in zip(x.split(rows), x_scale.view(-1, 1).split(rows), out.split(rows)):
        scaled_product(part, scale, weight, w_scale, added, into)
    return out


def scaled_product(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor
) -> None:
    """torch_path of few rows, written into (m, n) of any floating dtype. weight: of `multiplicand`; x_scale (m, 1); bias float32."""
    wide = into if into.dtype == torch.float32 else torch.empty(into.shape, dtype=torch.float32, device=x.device)
    wide.copy_(_product(x, weight)).mul_(w_scale)  # a copy and a product, each of one dtype, are faster than a mixed product
    if bias is None:
        wide.mul_(x_scale)
    else:
        torch.addcmul(bias, wide, x_scale, out=wide)
    if wide is not into:
        into.copy_(wide)


def tile_shape(rows: int, inner: int, major: int) -> dict[str, int]:
    """Tiles of a device of compute capability `major`.

    From 9 on: 128 × 256 × 128 feeds the warp-group product; three stages are 144 KiB of shared memory. Before: 128 × 128 × 64, four stages
    of 16 KiB fit the 99 KiB that the smallest device gives a program. So too where the tile does not divide the inner axis: masks beside
    the large tile's sums would not fit the registers. Few rows: half as many, so that the tile is not mostly empty.
    """
    if rows <= SMALL:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    if major >= 9 and inner % 128 == 0:
        return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}


def unfit(x: torch.Tensor) -> str:
    """Why the kernel cannot be used for these tensors; an empty string where it can."""
    if triton is None:
        return "is not installed"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 8:
        return "is compiled for compute capability 8.0 and later"
    return ""


if triton is not None:

    @triton.jit
    def int8_gemm_kernel(
        x_ptr, weight_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, rows, columns, inner,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr,
        WHOLE_K: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
        group = program // (GROUP_M * tiles_n)
        height = min(tiles_m - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + program % (GROUP_M * tiles_n) % height
        tile_n = program % (GROUP_M * tiles_n) // height
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # Rows beyond the end wrap round: they are read twice and never written, which is cheaper than a mask in the loop.
        x_place = x_ptr + (row % rows).to(tl.int64)[:, None] * inner + k[None, :]
        w_place = weight_ptr + (column % columns).to(tl.int64)[None, :] * inner + k[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for first in range(0, inner, BLOCK_K):
            if WHOLE_K:
                x, w = tl.load(x_place), tl.load(w_place)
            else:
                there = first + k < inner
                x = tl.load(x_place, mask=there[None, :], other=0)
                w = tl.load(w_place, mask=there[:, None], other=0)
            total = tl.dot(x, w, total, out_dtype=tl.int32)
            x_place += BLOCK_K
            w_place += BLOCK_K
        x_scale = tl.load(x_scale_ptr + row, mask=row < rows, other=0.0)
        w_scale = tl.load(w_scale_ptr + column, mask=column < columns, other=0.0)
        out = total.to(tl.float32) * w_scale[None, :] * x_scale[:, None]
        if HAS_BIAS:
            out += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        place = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(place, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


def launch(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    (rows, inner), columns = x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    shape = tile_shape(rows, inner, torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8)
    programs = triton.cdiv(rows, shape["BLOCK_M"]) * triton.cdiv(columns, shape["BLOCK_N"])
    int8_gemm_kernel[(programs,)](
        x.contiguous(), weight.contiguous(), x_scale.contiguous(), w_scale.contiguous(), out if bias is None else bias.contiguous(), out,
        rows, columns, inner, GROUP_M=GROUP, HAS_BIAS=bias is not None, WHOLE_K=inner % shape["BLOCK_K"] == 0, **shape,
    )  # fmt: skip
    return out


@torch.library.custom_op(
    "rectiflow::int8_gemm_scaled", mutates_args=(),
    schema="(Tensor x, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor",
)  # fmt: skip
def _operator(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    run = launch if x.is_cuda else torch_path
    return run(x, x_scale, weight, w_scale, bias, dtype)


@_operator.register_fake
def _(x, x_scale, weight, w_scale, bias, dtype):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


def int8_gemm_scaled(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """x (m, k), x_scale (m, 1) or (m,), weight (n, k), w_scale (n,), bias (n,) or None → (m, n) in `dtype`.

    Args:
        backend: auto (Triton on CUDA where it is installed, else torch), torch or triton.

    Raises: ValueError for codes that are not int8 or do not fit, or a backend that is not there.
    """
    if x.dtype != torch.int8 or weight.dtype != torch.int8 or x.ndim != 2 or x.shape[1:] != weight.shape[1:]:
        given = f"{x.dtype} {tuple(x.shape)} and {weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"int8_gemm_scaled: {given}; int8 (m, k) and (n, k) are needed")
    if takes_triton("int8_gemm_scaled", backend, x.is_cuda, lambda: unfit(x)):
        return (_operator if x.is_cuda else launch)(x, x_scale, weight, w_scale, bias, dtype)
    return torch_path(x, x_scale, weight, w_scale, bias, dtype)


def aot_forms(major: int) -> list[Form]:
    """The forms that bench/kernels.py compiles without a device, for compute capability `major`."""
    types = {"x_ptr": "*i8", "weight_ptr": "*i8", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= {name: "i32" for name in ("rows", "columns", "inner")}
    forms = []
    for name, rows, inner in (("m ≤ 64", SMALL, 3072), ("m > 64", 4096, 3072), ("m > 64, any k", 4096, 3000)):
        shape = tile_shape(rows, inner, major)
        whole = inner % shape["BLOCK_K"] == 0
        options = {key: shape.pop(key) for key in ("num_warps", "num_stages")}
        constants = shape | {"GROUP_M": GROUP, "HAS_BIAS": True, "WHOLE_K": whole}
        forms.append(Form(f"int8_gemm_scaled {name}", int8_gemm_kernel, types, constants, options, ("columns", "inner") if whole else ()))
    return forms
