"""A small decoupled transformer as a host's MODEL: the class contract of families/decoupled.py, with a per-token modulated decoder."""

from __future__ import annotations

import torch
from rectiflow.families.decoupled import ENCODER
from rectiflow.tests.accel.region_toys import toy
from torch import nn
from torch.nn import functional as F

WIDTH, CHANNELS = 32, 16


class Block(nn.Module):
    """h (b, n, d), c (b, 1 or n, d): attention and MLP, each shifted, scaled and gated by c."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        q, k, v = self.qkv(F.rms_norm(h, (WIDTH,)) * (1 + scale1) + shift1).chunk(3, dim=-1)
        h = h + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v))
        return h + gate2 * self.mlp(F.rms_norm(h, (WIDTH,)) * (1 + scale2) + shift2)


class DecoupledToy(nn.Module):
    """Velocity of latents (b, 16, h, w), a token a cell; y (b, 12). encoder_runs counts."""

    def __init__(self, encoder: int = 2, decoder: int = 1, speed: float = 2.0):
        super().__init__()
        self.s_embedder, self.x_embedder = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.y_embedder, self.t_embedder = nn.Linear(12, WIDTH), nn.Linear(8, WIDTH)
        self.encoder_blocks = nn.ModuleList(Block() for _ in range(encoder))
        self.decoder_blocks = nn.ModuleList(Block() for _ in range(decoder))
        self.final = nn.Linear(WIDTH, CHANNELS)
        self.dtype, self.speed, self.encoder_runs = torch.float32, speed, 0
        draw = torch.Generator().manual_seed(7)
        for tensor in self.parameters():
            tensor.requires_grad_(False).copy_(torch.randn(tensor.shape, generator=draw) * 0.6 * tensor.shape[-1] ** -0.5)

    def forward(self, x, timestep, context=None, y=None, transformer_options=None, **kwargs):
        height, width = x.shape[-2:]
        timestep = timestep / 1000  # as an SD3's sampling gives it
        tokens = x.flatten(2).transpose(1, 2)  # (b, h·w, 16)
        # Time moves s unevenly, fastest about sigma 0.6: what a searched schedule can use.
        phase = self.speed * torch.tanh(12 * (timestep[:, None] - 0.6)) + 0.2 * timestep[:, None]
        t = self.t_embedder(torch.cat([torch.sin(phase * 2**k) for k in range(-2, 2)] + [torch.cos(phase * 2**k) for k in range(-2, 2)], 1))
        c = F.silu(t + self.y_embedder(y))[:, None]

        def encode(args: dict) -> dict:
            self.encoder_runs += 1
            s = args["img"]
            for block in self.encoder_blocks:
                s = block(s, args["vec"])
            return {"img": F.silu(t[:, None] + s)}

        replace = (transformer_options or {}).get("patches_replace", {}).get("dit", {})
        args = {"img": self.s_embedder(tokens), "vec": c, "transformer_options": transformer_options}
        s = (replace[ENCODER](args, {"original_block": encode}) if ENCODER in replace else encode(args))["img"]
        h = self.x_embedder(tokens)
        for block in self.decoder_blocks:
            h = block(h, s)
        return self.final(F.rms_norm(h, (WIDTH,)) * (1 + s)).transpose(1, 2).unflatten(2, (height, width))


def decoupled_model(**sizes):
    """(MODEL, its network)."""
    model = toy("sd3")
    network = DecoupledToy(**sizes)
    model.model.diffusion_model = network
    return model, network
