"""The linear codec behind the VAE protocol that stock nodes use (VAEDecode, VAEEncode, VAEEncodeForInpaint, tiled forms).

A node's IMAGE is (b, h, w, 3) in 0…1; the codec works on (b, 3, h, w) in −1…1. Attribute names are the host's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import input_error
from .codec import CELL, LinearCodec
from .placement import ALONE, Placement

__all__ = ["TinyVAE"]

PATCH = 2 * CELL  # the transformer reads 2×2 latent cells as one token, so a picture's sides are multiples of 8


class TinyVAE:
    """A VAE object of 16 latent channels and 4 pixels a latent cell."""

    def __init__(self, codec: LinearCodec, placement: Placement = ALONE):
        self.first_stage_model = codec
        self.placement = placement
        self.patcher = placement.patcher
        self.output_device = placement.output_device
        self.vae_dtype = codec.basis.dtype
        self.working_dtypes = [torch.float32]
        self.latent_channels = codec.basis.shape[1]
        self.latent_dim = 2
        self.output_channels = 3
        self.downscale_ratio = CELL
        self.upscale_ratio = CELL
        self.downscale_index_formula = None
        self.upscale_index_formula = None
        self.extra_1d_channel = None
        self.crop_input = True
        self.not_video = True
        self.disable_offload = False

    @property
    def device(self) -> torch.device:
        return self.first_stage_model.basis.device

    def process_input(self, image: Tensor) -> Tensor:
        return image * 2.0 - 1.0

    def process_output(self, rgb: Tensor) -> Tensor:
        return ((rgb + 1.0) / 2.0).clamp(0.0, 1.0)

    def memory_used_encode(self, shape, dtype: torch.dtype) -> int:
        """Bytes of one encoding of pixels (b, 3, h, w): the cells, their difference to the mean and the result."""
        return 3 * shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize

    def memory_used_decode(self, shape, dtype: torch.dtype) -> int:
        """Bytes of one decoding of latents (b, 16, h, w)."""
        return 3 * shape[0] * 3 * CELL * CELL * shape[2] * shape[3] * dtype.itemsize

    def throw_exception_if_invalid(self) -> None:
        """Part of the protocol; this codec ships with the pack and is always there."""

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """The centred part of (b, h, w, c) whose sides are multiples of 8."""
        height, width = (side // PATCH * PATCH for side in pixels.shape[1:3])
        if height == 0 or width == 0:
            allowed = f"pictures of at least {PATCH}×{PATCH} pixels"
            raise input_error("VAE Encode", "pixels", tuple(pixels.shape), allowed, "Scale the picture up.")
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        return pixels[:, top : top + height, left : left + width, :]

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """IMAGE (b, h, w, ≥3) → latents (b, 16, h/4, w/4), fp32. Sides are first cropped to multiples of 8, centred."""
        if pixel_samples.ndim != 4 or pixel_samples.shape[-1] < 3:
            allowed = "a batch (b, h, w, 3) of colour pictures"
            raise input_error("VAE Encode", "pixels", tuple(pixel_samples.shape), allowed, "Link an IMAGE.")
        self.placement.load(self.patcher)
        pixels = self.vae_encode_crop_pixels(pixel_samples)[..., :3].movedim(-1, 1)
        latent = self.first_stage_model.encode(self.process_input(pixels.to(self.device, self.vae_dtype)))
        return latent.to(self.output_device, torch.float32).contiguous()

    def decode(self, samples_in: Tensor, vae_options: dict | None = None) -> Tensor:
        """Latents (b, 16, h, w) → IMAGE (b, 4h, 4w, 3) in 0…1, fp32."""
        if samples_in.ndim != 4 or samples_in.shape[1] != self.latent_channels:
            raise input_error(
                "VAE Decode",
                "samples",
                tuple(samples_in.shape),
                f"latents (b, {self.latent_channels}, h, w) of the tiny model",
                "Decode with the VAE of the model that made the latents.",
            )
        self.placement.load(self.patcher)
        rgb = self.first_stage_model.decode(samples_in.to(self.device, self.vae_dtype))
        return self.process_output(rgb).to(self.output_device, torch.float32).movedim(1, -1).contiguous()

    def encode_tiled(self, pixel_samples: Tensor, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None) -> Tensor:
        """Same as encode: a cell is coded on its own, so tiles of any size and overlap give the whole picture's result."""
        return self.encode(pixel_samples)

    def decode_tiled(self, samples: Tensor, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None) -> Tensor:
        """Same as decode, for the reason given at encode_tiled."""
        return self.decode(samples)

    def spacial_compression_encode(self) -> int:  # spelled as the host spells it
        return self.downscale_ratio

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio

    def temporal_compression_decode(self) -> None:
        return None

    def get_sd(self) -> dict[str, Tensor]:
        return self.first_stage_model.state_dict()
