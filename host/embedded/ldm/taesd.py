"""TAESD (Ollin Boer Bohan, github.com/madebyollin/taesd): small codecs for the latents of SD, SDXL (4 channels), SD3, Flux (16)."""

from __future__ import annotations

import torch
from torch import nn

from .ops import Conv2d

__all__ = ["TAESD"]

_WIDTH = 64


def _conv(n_in: int, n_out: int, **kwargs) -> Conv2d:
    return Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Clamp(nn.Module):
    """Soft limit at ±3, so that an overshooting sampler cannot saturate the decoder."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(n_in, n_out), nn.ReLU(), _conv(n_out, n_out), nn.ReLU(), _conv(n_out, n_out))
        self.skip = Conv2d(n_in, n_out, 1, bias=False) if n_in != n_out else nn.Identity()
        self.fuse = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fuse(self.conv(x) + self.skip(x))


def _blocks(count: int) -> list[nn.Module]:
    return [Block(_WIDTH, _WIDTH) for _ in range(count)]


def _encoder(latent_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3, _WIDTH), *_blocks(1)]
    for _ in range(3):  # each halves the picture
        layers += [_conv(_WIDTH, _WIDTH, stride=2, bias=False), *_blocks(3)]
    return nn.Sequential(*layers, _conv(_WIDTH, latent_channels))


def _decoder(latent_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [Clamp(), _conv(latent_channels, _WIDTH), nn.ReLU()]
    for _ in range(3):
        layers += [*_blocks(3), nn.Upsample(scale_factor=2), _conv(_WIDTH, _WIDTH, bias=False)]
    return nn.Sequential(*layers, *_blocks(1), _conv(_WIDTH, 3))


class TAESD(nn.Module):
    """Encoder and decoder as plain sequences, keyed by place. The codec's own latents are (z − vae_shift) · vae_scale of the
    model's, where z is what the full autoencoder would give."""

    def __init__(self, latent_channels: int = 4):
        super().__init__()
        self.taesd_encoder = _encoder(latent_channels)
        self.taesd_decoder = _decoder(latent_channels)
        self.vae_scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.vae_shift = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) in −1…1, sides multiples of 8 → (b, c, h/8, w/8)."""
        return self.taesd_encoder(x * 0.5 + 0.5) / self.vae_scale + self.vae_shift

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) → (b, 3, 8h, 8w), about −1…1."""
        return self.taesd_decoder((z - self.vae_shift) * self.vae_scale) * 2 - 1
