"""What the kernels are tested with: small odd shapes, some channels far out, a row of zeros."""

from __future__ import annotations

import torch
from rectiflow.accel.quant.packing import pack
from rectiflow.kernels.norm_rope_write import QKNorm
from rectiflow.kernels.quantise_tokens import Turn


def tokens(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """(rows, width): normal, a channel of 30 σ, and with more than two rows one of zeros."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x[:, width // 3] *= 30
    if rows > 2:
        x[1] = 0
    return x


def gemm_inputs(m: int, k: int, n: int) -> tuple[torch.Tensor, ...]:
    """x (m, k), its scale (m, 1), weight (n, k), its scale (n,), bias (n,)."""
    generator = torch.Generator().manual_seed(m + k + n)
    x, weight = (torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for shape in ((m, k), (n, k)))
    x_scale, w_scale = torch.rand(m, 1, generator=generator) / 127, torch.rand(n, generator=generator) / 127
    return x, x_scale, weight, w_scale, torch.randn(n, generator=generator)


def coded(rows: int, columns: int, bits: int, groups: int, row_books: bool) -> tuple[torch.Tensor, ...]:
    """packed codes, book, scale (rows, 1), and scales of `groups` groups with one of zero, one subnormal and negative ones, or None."""
    generator = torch.Generator().manual_seed(columns + bits)
    packed = pack(torch.randint(0, 1 << bits, (rows, columns), generator=generator), bits)
    book = torch.randint(-127, 128, (rows, 1 << bits) if row_books else (1 << bits,), generator=generator).to(torch.int8)
    scale = torch.rand(rows, 1, generator=generator) / 127
    if not groups:
        return packed, book, scale, None
    found = torch.randn(rows, groups, generator=generator)
    found[0, :2] = torch.tensor([0.0, 2**-8])
    return packed, book, scale, found.to(torch.float8_e4m3fn)


def square_factor() -> torch.Tensor:
    """16 × 16, orthogonal, entries ±1/4: the factor of the core's rotation of 256."""
    regular = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    return torch.kron(regular, regular)


def orthogonal(side: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(side, side, generator=torch.Generator().manual_seed(side)))[0]


def turns(device: str = "cpu") -> list[tuple[int, Turn]]:
    """(width, turn): none, smoothing and signs with a matrix, and the square of a factor."""
    smooth, signs = (0.5 + tokens(1, 96)[0].abs()).to(device), tokens(1, 96, 1)[0].sign().to(device)
    return [
        (530, Turn()), (96, Turn(smooth, signs)), (96, Turn(smooth, signs, orthogonal(32).to(device))),
        (512, Turn(matrix=square_factor().to(device), squared=True)),
    ]  # fmt: skip


def attention_inputs(device: str, dtype: torch.dtype) -> list[tuple]:
    """((q, k, v), place, rotations, norm, text, (cache_k, cache_v)) with heads of a power of two and not, with and without each step."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for case in ((2, 37, 16, 2, True, True), (3, 9, 12, 1, True, False), (1, 5, 20, 0, False, False)):
        heads, count, width, streams, turned, shared = case
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        q, k, v = draw(2, count, 3, heads, width).permute(2, 0, 3, 1, 4).to(device, dtype)  # as a block's qkv lies in memory
        place = torch.stack([torch.randperm(count + 6, generator=generator)[:count].sort().values for _ in range(1 if shared else 2)])
        angles = 9 * draw(len(place), count, width // 2)
        rotations = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=-1).unflatten(-1, (2, 2))
        norm = QKNorm(*(1 + 0.2 * draw(2, streams, width)).to(device, dtype)) if streams else None
        caches = tuple(draw(2, heads, count + 6, width).to(device, dtype) for _ in range(2))
        found.append(((q, k, v), place.to(device), rotations.to(device) if turned else None, norm, 4, caches))
    return found
