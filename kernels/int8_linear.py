"""A linear layer on 8-bit integers: weights with a scale a row, activations with a scale a token, sums in int32.

    y[m, n] = s_x[m]·s_w[n]·Σ_k x_q[m, k]·w_q[n, k] + bias[n]

On a CPU oneDNN does the product with the weight's scale and the change to floating point in one pass; it takes unsigned activations, so
that codes are moved up by its zero point of 128. The token's scale and the bias are one more pass. On other devices the product is torch's
own int8 matrix product with the scales behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Int8Weight", "int8_linear", "int8_linear_reference", "prepare_int8"]

SHIFT = 128  # unsigned codes of signed ones
TOP = 127
TINY = 1e-12


@dataclass(frozen=True)
class Int8Weight:
    """codes (n, k) int8, scale (n,) float32; packed: the codes as oneDNN wants them, or None where another path takes them."""

    codes: torch.Tensor
    scale: torch.Tensor
    packed: torch.Tensor | None = None


def _onednn(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


def prepare_int8(codes: torch.Tensor, scale: torch.Tensor) -> Int8Weight:
    """codes (n, k) int8 and scale (n,) float32, made ready for the device they are on; done once a weight."""
    packed = torch.ops.onednn.qlinear_prepack(codes, None) if _onednn(codes.device) else None
    return Int8Weight(codes, scale, packed)


def _token_scales(x: torch.Tensor) -> torch.Tensor:
    return (x.abs().amax(1, keepdim=True).float() / TOP).clamp_min(TINY)  # (m, 1)


def int8_linear_reference(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (m, k) floating → (m, n) in x's dtype; the product is exact."""
    scale = _token_scales(x)
    codes = (x.float() / scale).round().clamp(-TOP, TOP)
    sums = codes.double() @ weight.codes.double().t()
    out = sums.float() * scale * weight.scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _int8_onednn(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    scale = _token_scales(x)
    codes = torch.addcdiv(x.new_full((), SHIFT, dtype=torch.float32), x.float(), scale).round_().clamp_(SHIFT - TOP, SHIFT + TOP)
    zeros = torch.zeros(weight.scale.shape[0], dtype=torch.int64)
    out = torch.ops.onednn.qlinear_pointwise(
        codes.to(torch.uint8), 1.0, SHIFT, weight.packed, weight.scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )  # (m, n) float32
    out = out.mul_(scale) if bias is None else torch.addcmul(bias.float(), out, scale)
    return out.to(x.dtype)


def _int8_torch(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    scale = _token_scales(x)
    codes = (x.float() / scale).round_().clamp_(-TOP, TOP).to(torch.int8)
    out = torch._int_mm(codes, weight.codes.t()).float().mul_(scale).mul_(weight.scale)
    return (out if bias is None else out.add_(bias.float())).to(x.dtype)


def int8_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (…, k) floating → (…, n) in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    run = _int8_onednn if weight.packed is not None else _int8_torch
    return run(rows, weight, bias).view(*x.shape[:-1], -1)
