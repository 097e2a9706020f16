"""Codes of 1 to 8 bits as a little-endian stream of bytes: eight codes of b bits are b bytes, the first code in the lowest bits."""

from __future__ import annotations

import torch

from ...kernels.tlq_decode import unpacked

__all__ = ["pack", "packed_width", "unpack"]

_LANE = 8  # codes that fill whole bytes together, whatever their width


def packed_width(count: int, bits: int) -> int:
    """Bytes a row of `count` codes takes."""
    return -(-count // _LANE) * bits


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits: 1 to 8 are allowed")


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes (…, k), integers from 0 to 2^bits − 1 → (…, packed_width(k, bits)) uint8. The row is filled up with zeros.

    Raises: ValueError for a width outside 1 to 8, and for codes that do not fit it.
    """
    _check(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    missing = -codes.shape[-1] % _LANE
    lanes = torch.nn.functional.pad(codes.to(torch.int64), (0, missing)).unflatten(-1, (-1, _LANE))
    words = (lanes << (bits * torch.arange(_LANE, device=codes.device))).sum(-1, keepdim=True)  # 8·bits ≤ 64; the top bit may be the sign
    return ((words >> (8 * torch.arange(bits, device=codes.device))) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row, uint8; inverse of `pack`.

    Raises: ValueError for rows that are not as long as `count` codes are.
    """
    _check(bits)
    if packed.shape[-1] != packed_width(count, bits):
        raise ValueError(f"rows of {packed.shape[-1]} bytes; {count} codes of {bits} bits take {packed_width(count, bits)}")
    return unpacked(packed, bits, count)
