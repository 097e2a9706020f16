"""A linear layer on 8-bit integers: weights with a scale a row, activations with a scale a token, sums in int32.

    y[m, n] = s_x[m]·s_w[n]·Σ_k x_q[m, k]·w_q[n, k] + bias[n],     x_q, s_x = quantise_tokens(x, turn)

Two forms. Whole: quantise_tokens and int8_gemm_scaled one after the other, on any device, on a CPU a few rows at a time; the weight's codes
are all it keeps. Prepared, on a CPU: oneDNN does the product, the weight's scale and the change to floating point in one pass over codes
laid out its way, a second copy; it takes unsigned activations, so that codes are moved up by its zero point of 128. On a processor without
VNNI its sums would not be exact: there the prepared form is the whole one.

Activations of fewer bits are the same product of smaller codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .int8_gemm import CHUNK, CPU_MULTIPLIES_BYTES, int8_gemm_scaled, multiplicand, scaled_product
from .quantise_tokens import NOTHING, Turn, quantise_tokens

__all__ = ["Int8Weight", "int8_linear", "int8_linear_reference", "prepare_int8"]

SHIFT = 128  # unsigned codes of signed ones


@dataclass(frozen=True)
class Int8Weight:
    """codes (n, k) int8, scale (n,) float32; packed: the codes as oneDNN wants them, or None where another path takes them."""

    codes: torch.Tensor
    scale: torch.Tensor
    packed: torch.Tensor | None = None


def _onednn(device: torch.device) -> bool:
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return device.type == "cpu" and there and CPU_MULTIPLIES_BYTES


def prepare_int8(codes: torch.Tensor, scale: torch.Tensor) -> Int8Weight:
    """codes (n, k) int8 and scale (n,) float32, made ready for the device they are on; done once a weight."""
    packed = torch.ops.onednn.qlinear_prepack(codes, None) if _onednn(codes.device) else None
    return Int8Weight(codes, scale, packed)


def int8_linear_reference(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None, bits: int = 8) -> torch.Tensor:
    """x (m, k) floating → (m, n) in x's dtype; the product is exact."""
    top = (1 << (bits - 1)) - 1
    scale = (x.abs().amax(1, keepdim=True).float() / top).clamp_min(1e-12)  # (m, 1)
    codes = (x.float() / scale).round().clamp(-top, top)
    sums = codes.double() @ weight.codes.double().t()
    out = sums.float() * scale * weight.scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _int8_onednn(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None, bits: int, turn: Turn) -> torch.Tensor:
    codes, scale = quantise_tokens(x, bits, turn)
    zeros = torch.zeros(weight.scale.shape[0], dtype=torch.int64)
    moved = codes.view(torch.uint8) ^ SHIFT  # turning the top bit over adds 128 to a two's complement
    out = torch.ops.onednn.qlinear_pointwise(
        moved, 1.0, SHIFT, weight.packed, weight.scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )  # (m, n) float32
    out = out.mul_(scale) if bias is None else torch.addcmul(bias.float(), out, scale)
    return out.to(x.dtype)


def _int8_whole(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None, bits: int, turn: Turn) -> torch.Tensor:
    if x.device.type != "cpu":
        return int8_gemm_scaled(*quantise_tokens(x, bits, turn), weight.codes, weight.scale, bias, x.dtype)
    out, added = torch.empty(len(x), len(weight.codes), dtype=x.dtype), None if bias is None else bias.float()
    codes = multiplicand(weight.codes)
    for rows, into in zip(x.split(CHUNK), out.split(CHUNK)):  # tokens, codes and sums stay in the second-level cache from one to the next
        scaled_product(*quantise_tokens(rows, bits, turn), codes, weight.scale, added, into)
    return out


def int8_linear(
    x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None, bits: int = 8, turn: Turn = NOTHING
) -> torch.Tensor:
    """x (…, k) floating → (…, n) in x's dtype; bits of the activations, 2 to 8; `turn` is done to them first."""
    rows = x.reshape(-1, x.shape[-1])
    run = _int8_onednn if weight.packed is not None else _int8_whole
    return run(rows, weight, bias, bits, turn).view(*x.shape[:-1], weight.codes.shape[0])
