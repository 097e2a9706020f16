"""Tokens to 8-bit codes at each token's own range, with what stands between a layer's input and its codes in the same pass.

    z = act(x),  or the adaptive norm  LN(x)·(1 + gain) + shift
    u = (z·smooth·signs)·R                                          R orthogonal in groups of channels: G, or F⊗F of its factor F
    scale[m] = max_k |u[m, k]|/(2^(bits−1) − 1),   codes[m, k] = round(u[m, k]/scale[m])

x (m, k) floating, smooth and signs (k,), R's matrix (s, s): groups of s channels take u·G; `squared` ones are s² channels, which as an
s × s square take Fᵀ u F: 2·s products a channel in place of s². shift and gain (b or 1, k), each sample's rows one after the other. codes
(m, k) int8, scale (m, 1) float32. Every step is optional; without any this is the quantiser of activations alone.

    reference   step by step in float64
    torch       in chunks of rows, so that what stands between two steps stays in the cache
    Triton      a program has a few whole rows, because the scale belongs to a row. It walks their groups twice, for the range and for the
                codes: the second walk finds the rows in the cache, so that x is read once from memory and codes are all that is written,
                and a row of any length needs the registers of one group
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .backend import takes_triton
from .form import Form

try:
    import triton
    import triton.language as tl
except ImportError:  # said by `unfit`; the torch path needs nothing of it
    triton = None

__all__ = ["ACTIVATIONS", "NOTHING", "Modulation", "Turn", "aot_forms", "quantise_tokens", "reference", "torch_path", "unfit"]

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")
CHUNK = 128  # rows of a CPU's chunk: 1.5 MiB of float32 at 3072 channels, the second-level cache
TINY = 1e-12  # least scale: a token of zeros gets codes of zeros
SIDES = (16, 32, 64, 128)  # of a matrix in the kernel: a product of tensor cores takes 16 at least; 256 would not fit the registers
ROWS = 16  # of a program: the least that a product takes; more would leave multiprocessors idle at 4096 tokens
SQUARED_ROWS = 4  # of a program with F⊗F, whose product has rows·s: 4·16 is one tile of a warp each
PLAIN_TILE = 512  # channels that are walked at a time where no group says: 16 × 512 are 64 values a thread of 4 warps


@dataclass(frozen=True, eq=False)
class Turn:
    """smooth and signs (k,) or None; matrix (s, s) float32 or None, G itself or with `squared` the factor F of F⊗F."""

    smooth: torch.Tensor | None = None
    signs: torch.Tensor | None = None
    matrix: torch.Tensor | None = None
    squared: bool = False

    @property
    def empty(self) -> bool:
        return self.smooth is None and self.signs is None and self.matrix is None

    @property
    def group(self) -> int:
        """Channels that a group of the rotation has, 1 without one."""
        side = 1 if self.matrix is None else self.matrix.shape[0]
        return side**2 if self.squared else side

    def apply(self, u: torch.Tensor) -> torch.Tensor:
        """u (…, k) → (u·smooth·signs)·R, in u's dtype."""
        for factor in (self.smooth, self.signs):
            if factor is not None:
                u = u * factor.to(u.dtype)
        if self.matrix is None:
            return u
        matrix, side = self.matrix.to(u.dtype), self.matrix.shape[0]
        if not self.squared:
            return (u.unflatten(-1, (-1, side)) @ matrix).flatten(-2)
        first = u.reshape(-1, side) @ matrix
        return (matrix.t() @ first.view(-1, side, side)).view(u.shape)


NOTHING = Turn()


@dataclass(frozen=True, eq=False)
class Modulation:
    """LN(x)·(1 + gain) + shift: shift and gain (b or 1, k), eps of the norm, which has no weights of its own."""

    shift: torch.Tensor
    gain: torch.Tensor
    eps: float = 1e-6


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    return x if activation == "none" else F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _prepared(x: torch.Tensor, turn: Turn, activation: str, modulation: Modulation | None) -> torch.Tensor:
    """u (m, k) in x's dtype."""
    if modulation is None:
        return turn.apply(_activated(x, activation))
    samples = x.view(modulation.shift.shape[0], -1, x.shape[1])
    normal = F.layer_norm(samples, x.shape[1:], eps=modulation.eps)
    shift, gain = (part[:, None].to(x.dtype) for part in (modulation.shift, modulation.gain))
    return turn.apply(torch.addcmul(shift, normal, 1 + gain).view(x.shape))


def _codes(u: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    held = u.abs()
    scale = (held.amax(1, keepdim=True).float() / top).clamp_min(TINY)
    held = torch.div(u, scale, out=held) if u.dtype == torch.float32 else u.float().div_(scale)
    return held.round_().to(torch.int8), scale  # none is beyond top: the scale is the largest over it


def reference(
    x: torch.Tensor, bits: int = 8, turn: Turn = NOTHING, activation: str = "none", modulation: Modulation | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _codes(_prepared(x.double(), turn, activation, modulation).float(), (1 << (bits - 1)) - 1)


def torch_path(
    x: torch.Tensor, bits: int = 8, turn: Turn = NOTHING, activation: str = "none", modulation: Modulation | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    top = (1 << (bits - 1)) - 1
    if activation == "none" and modulation is None and turn.empty:
        return _codes(x, top)
    codes, scale = torch.empty(x.shape, dtype=torch.int8, device=x.device), torch.empty(x.shape[0], 1, device=x.device)
    samples = 1 if modulation is None else len(modulation.shift)
    rows_at_once = CHUNK if x.device.type == "cpu" else max(1, x.shape[0])
    for sample in range(samples):
        of_sample = [part.unflatten(0, (samples, -1))[sample].split(rows_at_once) for part in (x, codes, scale)]
        own = modulation and Modulation(modulation.shift[sample, None], modulation.gain[sample, None], modulation.eps)
        for rows, into, scale_into in zip(*of_sample):
            found = _codes(_prepared(rows.float(), turn, activation, own), top)
            into.copy_(found[0])
            scale_into.copy_(found[1])
    return codes, scale


def unfit(x: torch.Tensor, turn: Turn) -> str:
    """Why the kernel cannot be used for these tensors; an empty string where it can."""
    if triton is None:
        return "is not installed"
    if turn.matrix is not None and turn.matrix.shape[0] not in ((16,) if turn.squared else SIDES):
        return f"rotates by matrices of {', '.join(map(str, SIDES))}, or by the square of one of 16, not {tuple(turn.matrix.shape)}"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"does not take {x.dtype}"
    return ""


if triton is not None:

    @triton.jit
    def _rounded(x):
        """To the nearest integer, ties to even: in float32 an addend of 1.5·2²³ leaves no place behind the point."""
        return (x + 12582912.0) - 12582912.0

    @triton.jit
    def _act(x, ACTIVATION: tl.constexpr):
        if ACTIVATION == 1:
            x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        if ACTIVATION == 2:  # tanh(y) = 1 − 2/(exp(2y) + 1), right at both ends
            inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            x = x - x / (tl.exp(inner) + 1.0)
        if ACTIVATION == 3:
            x = x / (1.0 + tl.exp(-x))
        return x

    @triton.jit
    def _tile(
        x_ptr, smooth_ptr, signs_ptr, shift_ptr, gain_ptr, matrix, row, sample, inside, first, width, mean, scatter,
        ROWS: tl.constexpr, SIDE: tl.constexpr, SQUARED: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
        HAS_SMOOTH: tl.constexpr, HAS_SIGNS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """u of a group of channels, (ROWS, TILE) float32."""
        column = first + tl.arange(0, TILE)
        there = inside[:, None] & (column < width)[None, :]
        u = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=there, other=0.0).to(tl.float32)
        if NORM:
            place = sample[:, None] * width + column[None, :]
            gain = tl.load(gain_ptr + place, mask=there, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + place, mask=there, other=0.0).to(tl.float32)
            u = tl.where(there, (u - mean[:, None]) * scatter[:, None] * (1.0 + gain) + shift, 0.0)
        u = _act(u, ACTIVATION)
        if HAS_SMOOTH:
            u = u * tl.load(smooth_ptr + column, mask=column < width, other=0.0)[None, :]
        if HAS_SIGNS:
            u = u * tl.load(signs_ptr + column, mask=column < width, other=0.0)[None, :]
        if SIDE > 0 and not SQUARED:
            u = tl.dot(u, matrix, input_precision=PRECISION)
        if SIDE > 0 and SQUARED:
            u = tl.dot(tl.reshape(u, (ROWS * SIDE, SIDE)), matrix, input_precision=PRECISION)
            u = tl.permute(tl.reshape(u, (ROWS, SIDE, SIDE)), (0, 2, 1))
            u = tl.dot(tl.reshape(u, (ROWS * SIDE, SIDE)), matrix, input_precision=PRECISION)
            u = tl.reshape(tl.permute(tl.reshape(u, (ROWS, SIDE, SIDE)), (0, 2, 1)), (ROWS, TILE))
        return u

    @triton.jit
    def quantise_kernel(
        x_ptr, codes_ptr, scale_ptr, smooth_ptr, signs_ptr, matrix_ptr, shift_ptr, gain_ptr, rows, width, sample_rows, top, eps,
        ROWS: tl.constexpr, SIDE: tl.constexpr, SQUARED: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
        HAS_SMOOTH: tl.constexpr, HAS_SIGNS: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        sample = row // sample_rows
        x_ptr += tl.program_id(0).to(tl.int64) * ROWS * width  # from here on 32-bit offsets reach every row of the program
        codes_ptr += tl.program_id(0).to(tl.int64) * ROWS * width
        row = tl.arange(0, ROWS)
        matrix = 0.0
        if SIDE > 0:
            side = tl.arange(0, SIDE)
            matrix = tl.load(matrix_ptr + side[:, None] * SIDE + side[None, :])
        mean = tl.zeros((ROWS,), tl.float32)
        scatter = tl.zeros((ROWS,), tl.float32)
        if NORM:
            for first in range(0, width, TILE):
                column = first + tl.arange(0, TILE)
                there = inside[:, None] & (column < width)[None, :]
                x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=there, other=0.0).to(tl.float32)
                mean += tl.sum(x, axis=1)
            mean = mean / width
            for first in range(0, width, TILE):
                column = first + tl.arange(0, TILE)
                there = inside[:, None] & (column < width)[None, :]
                x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=there, other=0.0).to(tl.float32)
                x = tl.where(there, x - mean[:, None], 0.0)
                scatter += tl.sum(x * x, axis=1)
            scatter = 1.0 / tl.sqrt(scatter / width + eps)
        peak = tl.zeros((ROWS,), tl.float32)
        for first in range(0, width, TILE):
            u = _tile(
                x_ptr, smooth_ptr, signs_ptr, shift_ptr, gain_ptr, matrix, row, sample, inside, first, width, mean, scatter,
                ROWS, SIDE, SQUARED, TILE, ACTIVATION, NORM, HAS_SMOOTH, HAS_SIGNS, PRECISION,
            )  # fmt: skip
            peak = tl.maximum(peak, tl.max(tl.abs(u), axis=1))
        scale = tl.maximum(tl.div_rn(peak, tl.zeros((ROWS,), tl.float32) + top), 1e-12)
        tl.store(scale_ptr + tl.program_id(0) * ROWS + row, scale, mask=inside)
        for first in range(0, width, TILE):
            u = _tile(
                x_ptr, smooth_ptr, signs_ptr, shift_ptr, gain_ptr, matrix, row, sample, inside, first, width, mean, scatter,
                ROWS, SIDE, SQUARED, TILE, ACTIVATION, NORM, HAS_SMOOTH, HAS_SIGNS, PRECISION,
            )  # fmt: skip
            u = _rounded(tl.div_rn(u, tl.broadcast_to(scale[:, None], (ROWS, TILE))))
            u = tl.minimum(tl.maximum(u, -top), top)
            column = first + tl.arange(0, TILE)
            place = codes_ptr + row[:, None] * width + column[None, :]
            tl.store(place, u.to(tl.int8), mask=inside[:, None] & (column < width)[None, :])


def _shape(turn: Turn) -> dict[str, int]:
    """ROWS, TILE and the rotation's constants."""
    if turn.matrix is None:
        return {"ROWS": ROWS, "TILE": PLAIN_TILE, "SIDE": 0, "SQUARED": False}
    return {"ROWS": SQUARED_ROWS if turn.squared else ROWS, "TILE": turn.group, "SIDE": turn.matrix.shape[0], "SQUARED": turn.squared}


def _constants(turn: Turn, activation: str, norm: bool, exact: bool) -> dict[str, int | bool | str]:
    steps = {"ACTIVATION": ACTIVATIONS.index(activation), "NORM": norm}
    steps |= {"HAS_SMOOTH": turn.smooth is not None, "HAS_SIGNS": turn.signs is not None}
    return _shape(turn) | steps | {"PRECISION": "ieee" if exact else "tf32"}


def launch(
    x: torch.Tensor, bits: int, turn: Turn, activation: str = "none", modulation: Modulation | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    rows, width = x.shape
    codes, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if not codes.numel():
        return codes, scale.fill_(TINY)
    flat = [scale if part is None else part.float().contiguous() for part in (turn.smooth, turn.signs, turn.matrix)]
    shift, gain, samples = (scale, scale, 1) if modulation is None else (modulation.shift, modulation.gain, len(modulation.shift))
    constants = _constants(turn, activation, modulation is not None, x.dtype == torch.float32)
    quantise_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
        x, codes, scale, *flat, shift.contiguous(), gain.contiguous(), rows, width, rows // samples, float((1 << (bits - 1)) - 1),
        modulation.eps if modulation else 0.0, **constants, num_warps=4,
    )  # fmt: skip
    return codes, scale


@torch.library.custom_op(
    "rectiflow::quantise_tokens", mutates_args=(),
    schema="(Tensor x, int bits, Tensor? smooth, Tensor? signs, Tensor? matrix, bool squared, str activation, Tensor? shift, Tensor? gain, "
    "float eps) -> (Tensor, Tensor)",
)  # fmt: skip
def _operator(x, bits, smooth, signs, matrix, squared, activation, shift, gain, eps):
    modulation = None if shift is None else Modulation(shift, gain, eps)
    run = launch if x.is_cuda else torch_path
    return run(x, bits, Turn(smooth, signs, matrix, squared), activation, modulation)


@_operator.register_fake
def _(x, bits, smooth, signs, matrix, squared, activation, shift, gain, eps):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def quantise_tokens(
    x: torch.Tensor, bits: int = 8, turn: Turn = NOTHING, activation: str = "none", modulation: Modulation | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x (m, k) floating → (codes int8 (m, k), scale float32 (m, 1)); the codes are those of `bits` bits, 2 to 8, symmetric.

    Args:
        turn: smoothing and rotation before the codes. activation: one of ACTIVATIONS, before them. modulation: an adaptive norm in its
            place, rows of each sample one after the other.
        backend: auto (Triton on CUDA where it is installed and the rotation is one it has, else torch), torch or triton.

    Raises: ValueError for a rotation or a modulation that does not fit x, or a backend that is not there.
    """
    if x.ndim != 2 or not 2 <= bits <= 8 or activation not in ACTIVATIONS or activation != "none" and modulation is not None:
        given = f"{tuple(x.shape)}, {bits} bits, activation '{activation}'{' with a modulation' * (modulation is not None)}"
        raise ValueError(f"quantise_tokens: {given}; (m, k), 2 to 8 bits and one of {', '.join(ACTIVATIONS)} or a modulation are needed")
    if x.shape[1] % turn.group or modulation is not None and x.shape[0] % len(modulation.shift):
        raise ValueError(f"quantise_tokens: groups of {turn.group} channels or the modulation's samples do not divide {tuple(x.shape)}")
    if not takes_triton("quantise_tokens", backend, x.is_cuda, lambda: unfit(x, turn)):
        return torch_path(x, bits, turn, activation, modulation)
    if not x.is_cuda:
        return launch(x, bits, turn, activation, modulation)
    shift, gain, eps = (modulation.shift, modulation.gain, modulation.eps) if modulation else (None, None, 0.0)
    return _operator(x, bits, turn.smooth, turn.signs, turn.matrix, turn.squared, activation, shift, gain, eps)


def aot_forms(major: int) -> list[Form]:
    """The forms that bench/kernels.py compiles without a device; the same for every compute capability."""
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8", "shift_ptr": "*bf16", "gain_ptr": "*bf16"}
    types |= {name: "*fp32" for name in ("scale_ptr", "smooth_ptr", "signs_ptr", "matrix_ptr")}
    types |= {name: "i32" for name in ("rows", "width", "sample_rows")} | {"top": "fp32", "eps": "fp32"}
    signs, block, factor = torch.empty(0), torch.empty(128, 128), torch.empty(16, 16)
    cases = {
        "quantise": (Turn(), "none", False),
        "hadamard_quant 256": (Turn(matrix=factor, squared=True), "none", False),
        "hadamard_quant 128": (Turn(signs, signs, block), "none", False),
        "gelu_quant": (Turn(), "gelu_tanh", False),
        "silu_quant": (Turn(), "silu", False),
        "gelu_hadamard_quant 256": (Turn(signs, None, factor, True), "gelu_tanh", False),
        "modulate_hadamard_quant 256": (Turn(matrix=factor, squared=True), "none", True),
    }
    options = {"num_warps": 4, "num_stages": 3}
    return [Form(name, quantise_kernel, types, _constants(*case, exact=False), options, ("width",)) for name, case in cases.items()]
