"""The convolutional autoencoder of latent diffusion (Rombach et al. 2022) under its original checkpoint names.

SD3's and Flux's have 16 latent channels and no quantisation convolutions; SD's and SDXL's have 4 and the two 1×1 convolutions.
Encoding gives the mean of the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attention_pytorch
from .ops import Conv2d, GroupNorm

__all__ = ["AutoencoderKL", "AutoencoderParams"]

_GROUPS = 32


@dataclass(frozen=True)
class AutoencoderParams:
    """Channels of each level, finest first; `res_blocks` a level in the encoder, one more in the decoder."""

    z_channels: int
    widths: tuple[int, ...]
    res_blocks: int
    picture_channels: int = 3
    quant_conv: bool = False


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(_GROUPS, channels, eps=1e-6)


def _conv3(n_in: int, n_out: int, **kwargs) -> Conv2d:
    return Conv2d(n_in, n_out, 3, **{"padding": 1, **kwargs})


class ResnetBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(n_in), _conv3(n_in, n_out)
        self.norm2, self.conv2 = _norm(n_out), _conv3(n_out, n_out)
        self.nin_shortcut = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Attention of one head over all places."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).contiguous() for layer in (self.q, self.k, self.v))  # (b, h·w, c)
        attended = attention_pytorch(q, k, v, heads=1)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve by a strided convolution that is padded at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv3(channels, channels, stride=2, padding=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks of one size, then the change of size, under the checkpoint's names."""

    def __init__(self, n_in: int, n_out: int, blocks: int, downsample: bool = False, upsample: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(n_in if i == 0 else n_out, n_out) for i in range(blocks))
        if downsample:
            self.downsample = Downsample(n_out)
        if upsample:
            self.upsample = Upsample(n_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, params: AutoencoderParams):
        super().__init__()
        widths, last = params.widths, len(params.widths) - 1
        self.conv_in = _conv3(params.picture_channels, widths[0])
        self.down = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], width, params.res_blocks, downsample=i != last) for i, width in enumerate(widths)
        )
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], 2 * params.z_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))


class Decoder(nn.Module):
    def __init__(self, params: AutoencoderParams):
        super().__init__()
        widths, last = params.widths, len(params.widths) - 1
        self.conv_in = _conv3(params.z_channels, widths[-1])
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList(
            _Level(widths[min(i + 1, last)], width, params.res_blocks + 1, upsample=i != 0) for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3(widths[0], params.picture_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class AutoencoderKL(nn.Module):
    def __init__(self, params: AutoencoderParams):
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)
        z = params.z_channels
        self.quant_conv = Conv2d(2 * z, 2 * z, 1) if params.quant_conv else nn.Identity()
        self.post_quant_conv = Conv2d(z, z, 1) if params.quant_conv else nn.Identity()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) in −1…1 → (b, z, h/f, w/f), the posterior's mean."""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(b, z, h, w) → (b, 3, f·h, f·w), about −1…1."""
        return self.decoder(self.post_quant_conv(z))
