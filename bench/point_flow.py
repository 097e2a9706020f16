"""DiT-3D (Mo et al., arXiv 2307.01831) as a flow: clouds of points → voxels → patches → transformer → voxels → a velocity a point.

    plain    a cell's value is the mean of its points' coordinates, empty cells are 0; the grid is the cloud's own box, x − mean over twice
             the largest norm; the velocity of a point is the grid's answer, trilinear, at its place
    ours     a fixed box (3.2 of unit variance), a channel that says which cells are empty, and a small head that sees each point itself:
             the own box hangs on one outlier, and read back from a grid whose empty cells count as 0, points lose a quarter of their size

Blocks are DiT's: adaLN-Zero, 4× MLP, sin-cos positions by axis. x (b, 3, n) may have any n; the order of its points does not matter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOX = 3.2


def own_places(x: Tensor, side: int) -> Tensor:
    """(b, 3, n) → places (b, 3, n) in 0…side − 1 of each cloud's own box."""
    centred = x - x.mean(2, keepdim=True)
    largest = centred.norm(dim=1, keepdim=True).amax(2, keepdim=True)
    return ((centred / (2.0 * largest) + 0.5) * side).clamp(0.0, side - 1.0)


def fixed_places(x: Tensor, side: int) -> Tensor:
    """The same in the box −3.2…3.2, whatever the cloud."""
    return ((x / (2.0 * BOX) + 0.5) * (side - 1.0)).clamp(0.0, side - 1.0)


def voxelise(features: Tensor, places: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """features (b, c, n) at places (b, 3, n) → means (b, c, side, side, side) and which cells have any (b, 1, side, side, side)."""
    b, c, n = features.shape
    cells = places.round().long()
    flat = (cells[:, 0] * side + cells[:, 1]) * side + cells[:, 2] + torch.arange(b)[:, None] * side**3
    rows = features.transpose(1, 2).reshape(b * n, c)
    sums = rows.new_zeros(b * side**3, c).index_add(0, flat.flatten(), rows)
    counts = rows.new_zeros(b * side**3).index_add(0, flat.flatten(), rows.new_ones(b * n))
    grid = (sums / counts.clamp(min=1.0)[:, None]).view(b, side, side, side, c).movedim(-1, 1)
    return grid, (counts > 0).to(grid).view(b, 1, side, side, side)


def devoxelise(grid: Tensor, places: Tensor) -> Tensor:
    """grid (b, c, side, side, side) at places (b, 3, n), trilinear → (b, c, n)."""
    spots = (2.0 * places / (grid.shape[-1] - 1.0) - 1.0).flip(1).transpose(1, 2)[:, None, None]  # grid_sample reads z, y, x
    return F.grid_sample(grid, spots, mode="bilinear", padding_mode="border", align_corners=True)[:, :, 0, 0]


def sinusoid(values: Tensor, width: int) -> Tensor:
    rates = torch.exp(-math.log(10000.0) * torch.arange(width // 2) / (width // 2))
    angles = values[..., None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mod = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.mod.weight)
        nn.init.zeros_(self.mod.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.mod(c)[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1.0 + scale_a) + shift_a
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=-1))
        x = x + gate_a * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate_m * self.mlp(F.layer_norm(x, x.shape[-1:]) * (1.0 + scale_m) + shift_m)


class PointFlow(nn.Module):
    """The network, as the trainer wants it. A condition is the number of a class, None the empty one.

    Args:
        side: cells of the grid. patch: cells of a token's side. ours: see the head of this file.
    """

    def __init__(self, classes: int, side: int = 16, patch: int = 4, width: int = 96, depth: int = 4, heads: int = 4, ours: bool = False):
        super().__init__()
        self.side, self.patch, self.ours, self.classes = side, patch, ours, classes
        self.x_embedder = nn.Conv3d(4 if ours else 3, width, patch, patch)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_mod, self.final = nn.Linear(width, 2 * width), nn.Linear(width, patch**3 * 3)
        self.head = nn.Sequential(nn.Linear(6 + width, width), nn.SiLU(), nn.Linear(width, 3)) if ours else None
        for layer in (self.final_mod, self.final, *([self.head[-1]] if ours else [])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        axes = [sinusoid(torch.arange(side // patch).float(), width // 3)] * 3
        x, y, z = torch.meshgrid(*[torch.arange(side // patch)] * 3, indexing="ij")
        self.positions = torch.cat([axis[place.flatten()] for axis, place in zip(axes, (x, y, z))], dim=-1)  # (tokens, width)

    def describe(self) -> dict[str, Any]:
        return {"model": "point_flow", "parameters": sum(value.numel() for value in self.parameters()), "ours": self.ours}

    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def velocity(self, x: Tensor, sigma: Tensor, cond: list[Any]) -> Tensor:
        places = (fixed_places if self.ours else own_places)(x, self.side)
        grid, full = voxelise(x, places, self.side)
        tokens = self.x_embedder(torch.cat((grid, full), dim=1) if self.ours else grid).flatten(2).transpose(1, 2) + self.positions
        labels = torch.tensor([self.classes if each is None else each for each in cond])
        c = F.silu(self.t_embedder(sinusoid(1000.0 * sigma, 256)) + self.y_embedder(labels))
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_mod(c)[:, None].chunk(2, dim=-1)
        out = self.final(F.layer_norm(tokens, tokens.shape[-1:]) * (1.0 + scale) + shift)
        n, p = self.side // self.patch, self.patch
        cells = out.view(-1, n, n, n, p, p, p, 3).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, 3, self.side, self.side, self.side)
        answer = devoxelise(cells, places)
        if self.head is None:
            return answer
        seen = torch.cat((x, answer, c[:, :, None].expand(-1, -1, x.shape[2])), dim=1)
        return answer + self.head(seen.transpose(1, 2)).transpose(1, 2)
