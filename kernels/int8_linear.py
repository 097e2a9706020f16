"""A linear layer on 8-bit integers: weights with a scale a row, activations with a scale a token, sums in int32.

    y[m, n] = s_x[m]·s_w[n]·Σ_k x_q[m, k]·w_q[n, k] + bias[n]

Two forms on a CPU. Whole: torch's int8 product in chunks of rows, whose scaling is done while they lie in the cache; the weight's codes are
all it keeps. Prepared: oneDNN does the product, the weight's scale and the change to floating point in one pass over codes laid out its
way, a second copy; it takes unsigned activations, so that codes are moved up by its zero point of 128. On other devices the product is
torch's own with the scales behind it.

Activations of fewer bits are the same product of smaller codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Int8Weight", "int8_linear", "int8_linear_reference", "prepare_int8"]

SHIFT = 128  # unsigned codes of signed ones
CHUNK = 128  # rows whose int32 sums stay in the second-level cache: 1.5 MiB at 3072 outputs
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


def _token_scales(x: torch.Tensor, top: int) -> torch.Tensor:
    return (x.abs().amax(1, keepdim=True).float() / top).clamp_min(TINY)  # (m, 1)


def int8_linear_reference(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None, bits: int = 8) -> torch.Tensor:
    """x (m, k) floating → (m, n) in x's dtype; the product is exact."""
    top = (1 << (bits - 1)) - 1
    scale = _token_scales(x, top)
    codes = (x.float() / scale).round().clamp(-top, top)
    sums = codes.double() @ weight.codes.double().t()
    out = sums.float() * scale * weight.scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _int8_onednn(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None, top: int) -> torch.Tensor:
    scale = _token_scales(x, top)
    codes = torch.addcdiv(x.new_full((), SHIFT, dtype=torch.float32), x.float(), scale).round_().clamp_(SHIFT - top, SHIFT + top)
    zeros = torch.zeros(weight.scale.shape[0], dtype=torch.int64)
    out = torch.ops.onednn.qlinear_pointwise(
        codes.to(torch.uint8), 1.0, SHIFT, weight.packed, weight.scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )  # (m, n) float32
    out = out.mul_(scale) if bias is None else torch.addcmul(bias.float(), out, scale)
    return out.to(x.dtype)


def _product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """codes (m, k), weight (n, k), both int8 → exact sums (m, n)."""
    if codes.device.type != "cpu" and (weight.shape[0] % 8 or weight.shape[1] % 8):  # what CUDA's product asks for
        return codes.double() @ weight.double().t()
    if codes.device.type != "cpu" and len(codes) <= 16:
        return torch._int_mm(torch.nn.functional.pad(codes, (0, 0, 0, 17 - len(codes))), weight.t())[: len(codes)]
    return torch._int_mm(codes, weight.t())


def _int8_whole(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None, top: int) -> torch.Tensor:
    out = x.new_empty(x.shape[0], weight.codes.shape[0])
    added = None if bias is None else bias.float()
    rows = CHUNK if x.device.type == "cpu" else max(1, x.shape[0])
    for part, into in zip(x.split(rows), out.split(rows)):
        scale = _token_scales(part, top)
        codes = (part.float() / scale).round_().clamp_(-top, top).to(torch.int8)
        scaled = torch.mul(_product(codes, weight.codes), weight.scale)
        into.copy_(scaled.mul_(scale) if added is None else torch.addcmul(added, scaled, scale))
    return out


def int8_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None, bits: int = 8) -> torch.Tensor:
    """x (…, k) floating → (…, n) in x's dtype; bits of the activations, 2 to 8."""
    rows = x.reshape(-1, x.shape[-1])
    run = _int8_onednn if weight.packed is not None else _int8_whole
    return run(rows, weight, bias, (1 << (bits - 1)) - 1).view(*x.shape[:-1], weight.codes.shape[0])
