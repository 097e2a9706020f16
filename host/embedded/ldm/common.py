"""What the transformers share: time embedding, rotary positions, patches, modulation, and how block hooks are called."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .ops import Linear

__all__ = [
    "EmbedND", "TimestepEmbedder", "apply_rope", "call_block", "finite_in_half", "modulate", "pad_to_patch_size", "patchify", "rope",
    "timestep_embedding", "unpatchify",
]  # fmt: skip


def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000, time_factor: float = 1.0) -> torch.Tensor:
    """[cos(t·w), sin(t·w)] with w from 1 down to 1/max_period (Vaswani et al. 2017), `dim` even.

    t (b,), times `time_factor` in its own dtype, since half-precision guidance was scaled so when models were trained on it;
    returns (b, dim) in t's dtype.
    """
    half = dim // 2
    t = time_factor * t
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(t.dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256 → hidden: Linear, SiLU, Linear under the checkpoint names mlp.0 and mlp.2."""

    FREQUENCIES = 256

    def __init__(self, hidden_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        self.mlp = nn.Sequential(Linear(self.FREQUENCIES, hidden_size, **made), nn.SiLU(), Linear(hidden_size, hidden_size, **made))

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.mlp(timestep_embedding(t, self.FREQUENCIES).to(dtype))


# Rotary positions (Su et al. 2021), one group of channel pairs per position axis --------------------------------------------


def rope(pos: torch.Tensor, dim: int, theta: float) -> torch.Tensor:
    """Rotation matrices of positions (b, n) for `dim` channels: (b, n, dim/2, 2, 2) = [[cos, −sin], [sin, cos]], fp32.

    Angles are pos · theta^(−2i/dim), in fp64 where the device has it. The first column of each matrix lies contiguous in
    memory, so that `apply_rope` can read it as a complex number.
    """
    wide = torch.float32 if pos.device.type == "mps" else torch.float64
    scale = torch.linspace(0, (dim - 2) / dim, steps=dim // 2, dtype=wide, device=pos.device)
    angles = pos.to(wide).unsqueeze(-1) * (1.0 / theta**scale)  # (b, n, dim/2)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.stack((cos, sin, -sin, cos), dim=-1).unflatten(-1, (2, 2)).transpose(-1, -2)


class EmbedND(nn.Module):
    """Token ids (b, n, axes) → rotations (b, 1, n, head_dim/2, 2, 2); the channels are split among the axes.

    Nothing is kept between calls: measured on two CPU cores, the table costs 1 % of the smallest model's step or less, so
    every step may have other ids. Ids that a batch shares (stride 0) are turned into one table.
    """

    def __init__(self, dim: int, theta: float, axes_dim: tuple[int, ...] | list[int]):
        super().__init__()
        self.dim = dim
        self.theta = theta
        self.axes_dim = list(axes_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        batch = ids.shape[0]
        shared = batch > 1 and ids.stride(0) == 0
        used = ids[:1] if shared else ids
        # Joined along the pair axis of the transposed matrices, which keeps the memory order that rope() chose.
        tables = [rope(used[..., axis], dim, self.theta).transpose(-1, -2) for axis, dim in enumerate(self.axes_dim)]
        table = torch.cat(tables, dim=-3).transpose(-1, -2).unsqueeze(1)
        return table.expand(batch, *table.shape[1:]) if shared else table


def _as_complex(pe: torch.Tensor) -> torch.Tensor | None:
    """The rotations as complex numbers (…, d/2), where they still lie in memory as rope() wrote them."""
    if pe.dtype != torch.float32 or pe.device.type not in ("cpu", "cuda") or pe.stride()[-2:] != (1, 2):
        return None
    return torch.view_as_complex(pe[..., 0])


def apply_rope(x: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channel pairs: out = pe @ (x[2i], x[2i+1]), computed in pe's dtype, returned in x's.

    x (…, d) and pe (…, d/2, 2, 2) with broadcasting axes in front. A table from rope() is applied as one complex product,
    which is 3 to 6 times faster on a CPU; any other, such as one that a node gathered or cast, as a matrix product. So is every one
    under torch.compile: it fuses the matrix product, and loses the conjugate in a complex product's gradient.
    """
    rotations = None if torch.compiler.is_compiling() else _as_complex(pe)
    wide = x.to(pe.dtype)
    if rotations is not None and wide.stride(-1) == 1 and all(stride % 2 == 0 for stride in wide.stride()[:-1]):
        turned = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * rotations)
    else:
        pairs = wide.unflatten(-1, (-1, 1, 2))
        turned = pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]
    return turned.flatten(-2).to(x.dtype)


# Patches --------------------------------------------------------------------------------------------------------------------


def pad_to_patch_size(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(b, c, h, w) grown at the right and bottom to multiples of `patch_size`, with what stands at the opposite side."""
    right, below = (-x.shape[-1]) % patch_size, (-x.shape[-2]) % patch_size
    return F.pad(x, (0, right, 0, below), mode="circular") if right or below else x


def patchify(x: torch.Tensor, patch_size: int, channels_last: bool = False) -> torch.Tensor:
    """(b, c, h, w) → tokens (b, h/p·w/p, p²·c); a token's channels are ordered (c, row, column), or (row, column, c)."""
    b, c, h, w = x.shape
    p = patch_size
    cells = x.reshape(b, c, h // p, p, w // p, p)
    order = (0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5)
    return cells.permute(order).reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: torch.Tensor, patch_size: int, height: int, width: int, channels_last: bool = False) -> torch.Tensor:
    """The inverse of patchify: tokens of a `height` × `width` grid → (b, c, height·p, width·p)."""
    b, n, channels = tokens.shape
    p = patch_size
    c = channels // (p * p)
    if channels_last:
        cells = tokens.reshape(b, height, width, p, p, c).permute(0, 5, 1, 3, 2, 4)
    else:
        cells = tokens.reshape(b, height, width, c, p, p).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(b, c, height * p, width * p)


# Blocks ---------------------------------------------------------------------------------------------------------------------


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x · (1 + scale) + shift (Peebles & Xie 2022), all broadcastable to (b, n, d)."""
    return torch.addcmul(shift, x, 1 + scale)


def finite_in_half(x: torch.Tensor) -> torch.Tensor:
    """Replace what overflowed in fp16; other dtypes have room."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x


def call_block(replace: dict, key: tuple[str, int], block: Callable[[dict], dict], args: dict) -> dict:
    """Run a block, or what a node put in its place: patch(args, {"original_block": block}) → dict."""
    patch = replace.get(key)
    return block(args) if patch is None else patch(args, {"original_block": block})
