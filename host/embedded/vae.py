"""VAE: a latent codec between IMAGE batches (b, h, w, 3) in 0…1 and latents (b, c, h/f, w/f).

The codec is found by its keys: AutoencoderKL (SD3's and Flux's with 16 channels, SD's with 4), TAESD, the tiny model's linear
codec, or no codec at all ("pixel space").
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import input_error
from . import model_management
from .checkpoint_names import describe, refusal
from .ldm.autoencoder_kl import AutoencoderKL
from .ldm.taesd import TAESD
from .model_detection import autoencoder_params, strip_prefix
from .model_patcher import ModelPatcher
from .utils import ProgressBar, get_tiled_scale_steps, state_dict_prefix_replace, tiled_scale
from .weights import fill

__all__ = ["VAE", "Codec", "find_codec"]

_PREFIXES = ("first_stage_model.", "vae.")
_CODECS = "AutoencoderKL with 2-D convolutions and TAESD, in the layout their authors published, and the tiny model's codec"


@dataclass(frozen=True)
class Codec:
    """A codec module and what its wrapper must know. encode_bytes and decode_bytes: (shape, dtype) → bytes of activations."""

    module: torch.nn.Module
    ratio: int
    latent_channels: int
    encode_bytes: Callable[[tuple[int, ...], torch.dtype], float]
    decode_bytes: Callable[[tuple[int, ...], torch.dtype], float]
    crop: int
    encodes: bool = True
    decodes: bool = True
    unit_range: bool = False  # works on 0…1 instead of −1…1
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


class _PixelSpace(torch.nn.Module):
    """For models that draw pixels: the latent is the picture, in −1…1."""

    def __init__(self):
        super().__init__()
        self.pixel_space_vae = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z


def _activations(maps: float, ratio: int = 1) -> Callable[[tuple[int, ...], torch.dtype], float]:
    """Bytes of `maps` feature maps at pixel resolution, for a (b, c, h, w) whose places are `ratio` pixels wide; one batch entry."""
    return lambda shape, dtype: maps * ratio * ratio * shape[-2] * shape[-1] * dtype.itemsize


_KL_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def _autoencoder_kl(weights: dict[str, torch.Tensor]) -> Codec:
    params = autoencoder_params(weights)
    module = fill(AutoencoderKL, params, weights=weights, what="AutoencoderKL", may_miss=_KL_PARTS)
    ratio = 2 ** (len(params.widths) - 1)
    halves = {half: f"{half}.conv_in.weight" in weights for half in ("encoder", "decoder")}
    # Measured peaks of the published autoencoder (128 channels at full size), as ComfyUI uses them.
    return Codec(
        module, ratio, params.z_channels, _activations(1767), _activations(2178, ratio), ratio,
        encodes=halves["encoder"], decodes=halves["decoder"],
    )  # fmt: skip


def _taesd(weights: dict[str, torch.Tensor]) -> Codec:
    decoder, encoder = weights.get("taesd_decoder.1.weight"), weights.get("taesd_encoder.0.weight")
    channels = decoder.shape[1] if decoder is not None else weights["taesd_encoder.14.weight"].shape[0]
    weights = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)} | weights  # files for one model leave them out
    module = fill(TAESD, channels, weights=weights, what="TAESD", may_miss=("taesd_encoder.", "taesd_decoder."))
    maps = 64 * 4  # at full size four maps of 64 channels live at once
    return Codec(
        module, 8, channels, _activations(maps), _activations(maps, 8), 8, encodes=encoder is not None, decodes=decoder is not None
    )  # fmt: skip


def _tiny(weights: dict[str, torch.Tensor]) -> Codec:
    from ...tiny.codec import CELL, LinearCodec
    from ...tiny.vae import PATCH

    module = LinearCodec(*(weights[f"codec.{name}"].clone() for name in ("basis", "scale", "mean")))
    maps = 3 * 3
    return Codec(
        module, CELL, module.basis.shape[1], _activations(maps), _activations(maps, CELL), PATCH, dtypes=(torch.float32,)
    )  # fmt: skip


def find_codec(state_dict: Mapping[str, torch.Tensor]) -> Codec:
    """Build the codec that a state dict holds.

    Raises: ValueError naming what was found where it is none of ours, or lacks weights.
    """
    prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in state_dict)), "")
    weights = strip_prefix(state_dict, prefix)
    found = describe(weights)
    if "TAESD decoder" in found or "TAESD encoder" in found:  # one half, as its authors publish it
        half = "taesd_decoder." if "decoder" in found else "taesd_encoder."
        weights = state_dict_prefix_replace(weights, {"": half}, filter_keys=True)
        found = "a TAESD codec"
    if "diffusers" in found:
        remedy = "Fetch the file in its original layout, often called ae.safetensors or vae.safetensors."
        raise refusal("This VAE file", weights, "a VAE", _CODECS, remedy)
    if "TAESD codec" in found:
        return _taesd(weights)
    if "AutoencoderKL codec" in found:
        return _autoencoder_kl(weights)
    if "tiny model" in found and "codec.basis" in weights:
        return _tiny(weights)
    if set(weights) == {"pixel_space_vae"}:
        return Codec(_PixelSpace(), 1, 3, _activations(1), _activations(1), 1, dtypes=(torch.float32,))
    raise refusal("This VAE file", weights, "a VAE", _CODECS)


class VAE:
    """A codec on its device, with batches as large as memory allows.

    Args:
        sd: the codec's state dict, with or without the prefix it has in a checkpoint; an empty one makes a VAE that says so when used.
        device: where it runs; the host's choice when None.
        dtype: what it computes in; the host's choice when None.
    """

    def __init__(self, sd: Mapping[str, torch.Tensor] | None = None, device: torch.device | None = None, config: Any = None,
                 dtype: torch.dtype | None = None, metadata: dict[str, str] | None = None):  # fmt: skip
        if config is not None:
            raise ValueError("VAE: a YAML configuration is not supported; the codec is read from its weights.")
        self.first_stage_model: torch.nn.Module | None = None
        self.patcher: ModelPatcher | None = None
        self.device = device or model_management.vae_device()
        self.output_device = model_management.intermediate_device()
        self.output_channels = 3
        self.latent_dim = 2
        self.disable_offload = False
        self.not_video = True
        self.crop_input = True
        self.extra_1d_channel = None
        self.downscale_index_formula = self.upscale_index_formula = None
        self.downscale_ratio = self.upscale_ratio = 8
        self.latent_channels = 4
        if not sd:
            return
        with torch.inference_mode(False):  # weights born in inference mode could never take part in a gradient
            self.codec = find_codec(sd)
            self.vae_dtype = dtype or model_management.vae_dtype(self.device, self.codec.dtypes)
            self.first_stage_model = self.codec.module.eval().to(self.vae_dtype)
        self.working_dtypes = list(self.codec.dtypes)
        self.downscale_ratio = self.upscale_ratio = self.codec.ratio
        self.latent_channels = self.codec.latent_channels
        self.memory_used_encode, self.memory_used_decode = self.codec.encode_bytes, self.codec.decode_bytes
        offload = model_management.vae_offload_device()
        self.patcher = ModelPatcher(self.first_stage_model, load_device=self.device, offload_device=offload)
        logging.debug("VAE: %s in %s on %s", type(self.first_stage_model).__name__, self.vae_dtype, self.device)

    def process_input(self, image: torch.Tensor) -> torch.Tensor:
        return image * 2.0 - 1.0

    def process_output(self, image: torch.Tensor) -> torch.Tensor:
        return ((image + 1.0) / 2.0).clamp(min=0.0, max=1.0)

    def throw_exception_if_invalid(self) -> None:
        if self.first_stage_model is None:
            raise ValueError("VAE: the checkpoint that this VAE comes from holds no latent codec. Link a Load VAE node instead.")

    def spacial_compression_encode(self) -> int:  # spelled as ComfyUI spells it
        return self.downscale_ratio

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio

    def temporal_compression_decode(self) -> None:
        return None

    def get_sd(self) -> dict[str, torch.Tensor]:
        self.throw_exception_if_invalid()
        return self.first_stage_model.state_dict()

    # Encoding

    def vae_encode_crop_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The centred part of (…, h, w, c) whose sides are multiples of what one token needs."""
        step = self.codec.crop
        for axis in (-3, -2):
            size = pixels.shape[axis]
            kept = size // step * step
            if kept == 0:
                allowed = f"pictures of at least {step}×{step} pixels"
                raise input_error("VAE Encode", "pixels", tuple(pixels.shape), allowed, "Scale the picture up.")
            pixels = pixels.narrow(axis, (size - kept) // 2, kept)
        return pixels

    def _pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """IMAGE (b, h, w, ≥ 3) or video (b, t, h, w, ≥ 3) → cropped (b·t, 3, h, w), still in 0…1."""
        self.throw_exception_if_invalid()
        if not self.codec.encodes:
            raise ValueError("VAE Encode: this file holds only the decoder of its codec. Load the whole codec, or its encoder beside it.")
        if pixels.ndim not in (4, 5) or pixels.shape[-1] < 3:
            raise input_error("VAE Encode", "pixels", tuple(pixels.shape), "a batch (b, h, w, 3) of colour pictures", "Link an IMAGE.")
        cropped = self.vae_encode_crop_pixels(pixels)[..., :3]
        return cropped.reshape(-1, *cropped.shape[-3:]).movedim(-1, 1)

    def _encode_batch(self, pixels: torch.Tensor) -> torch.Tensor:
        prepared = self.process_input(pixels).to(self.vae_dtype).to(self.device)
        return self.first_stage_model.encode(prepared).to(self.output_device).float()

    def _unfold(self, samples: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Latents of folded frames (b·t, c, h, w) → (b, c, t, h, w) where `like` is a video."""
        if like.ndim == 4:
            return samples
        return samples.reshape(like.shape[0], -1, *samples.shape[1:]).movedim(1, 2)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """IMAGE (b, h, w, 3) in 0…1 → latents (b, c, h/f, w/f), fp32; a video (b, t, h, w, 3) → (b, c, t, h/f, w/f)."""
        pixels = self._pixels(pixel_samples)
        samples = self._in_batches(pixels, self._encode_batch, self.memory_used_encode, "encoding")
        return self._unfold(self._encode_tiles(pixels) if samples is None else samples, pixel_samples)

    def encode_tiled(
        self, pixel_samples: torch.Tensor, tile_x: int | None = None, tile_y: int | None = None, overlap: int | None = None,
        tile_t: int | None = None, overlap_t: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As encode, tile by tile; sizes in pixels. tile_t and overlap_t are for video codecs, which none here is."""
        pixels = self._pixels(pixel_samples)
        self._load(self.memory_used_encode(pixels.shape, self.vae_dtype))
        return self._unfold(self._encode_tiles(pixels, tile_x or 512, tile_y or 512, 64 if overlap is None else overlap), pixel_samples)

    def _encode_tiles(self, pixels: torch.Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64) -> torch.Tensor:
        return self._tiles(pixels, self._encode_batch, tile_x, tile_y, overlap, 1 / self.downscale_ratio, self.latent_channels)

    # Decoding

    def _latents(self, samples: torch.Tensor) -> torch.Tensor:
        """Latents (b, c, h, w) or (b, c, t, h, w) → (b·t, c, h, w)."""
        self.throw_exception_if_invalid()
        if not self.codec.decodes:
            raise ValueError("VAE Decode: this file holds only the encoder of its codec. Load the whole codec, or its decoder beside it.")
        if samples.ndim not in (4, 5) or samples.shape[1] != self.latent_channels:
            allowed = f"latents (b, {self.latent_channels}, h, w)"
            remedy = "Decode with the VAE of the model that made the latents."
            raise input_error("VAE Decode", "samples", tuple(samples.shape), allowed, remedy)
        return samples if samples.ndim == 4 else samples.movedim(2, 1).flatten(0, 1)

    def _decode_batch(self, samples: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.decode(samples.to(self.vae_dtype).to(self.device)).to(self.output_device).float()

    def _picture(self, decoded: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        image = self.process_output(decoded).movedim(1, -1)
        return image if like.ndim == 4 else image.unflatten(0, (like.shape[0], -1))

    def decode(self, samples_in: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        """Latents (b, c, h, w) → IMAGE (b, f·h, f·w, 3) in 0…1, fp32; latents (b, c, t, h, w) → (b, t, f·h, f·w, 3)."""
        samples = self._latents(samples_in)
        decoded = self._in_batches(samples, self._decode_batch, self.memory_used_decode, "decoding")
        return self._picture(self._decode_tiles(samples) if decoded is None else decoded, samples_in)

    def decode_tiled(
        self, samples: torch.Tensor, tile_x: int | None = None, tile_y: int | None = None, overlap: int | None = None,
        tile_t: int | None = None, overlap_t: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As decode, tile by tile; sizes in latent cells."""
        folded = self._latents(samples)
        self._load(self.memory_used_decode(folded.shape, self.vae_dtype))
        return self._picture(self._decode_tiles(folded, tile_x or 64, tile_y or 64, 16 if overlap is None else overlap), samples)

    def _decode_tiles(self, samples: torch.Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16) -> torch.Tensor:
        return self._tiles(samples, self._decode_batch, tile_x, tile_y, overlap, self.upscale_ratio, self.output_channels)

    # Both

    def _load(self, memory_used: float) -> None:
        model_management.load_models_gpu([self.patcher], memory_required=memory_used)

    def _in_batches(
        self, inputs: torch.Tensor, run: Callable, bytes_of: Callable[[tuple[int, ...], torch.dtype], float], what: str
    ) -> torch.Tensor | None:
        """Results of `run` for as many entries at a time as memory holds; None where not even one fits."""
        each = bytes_of(inputs.shape, self.vae_dtype)
        try:
            self._load(each)
            size = max(1, int(model_management.get_free_memory(self.device) / max(1, each)))
            results = []
            for part in inputs.split(size):
                model_management.throw_exception_if_processing_interrupted()
                results.append(run(part))
            return torch.cat(results)
        except model_management.OOM_EXCEPTION:
            # The caller goes on outside of this block: while it lasts, the exception holds every tensor of the failed call.
            logging.warning("VAE: not enough memory for %s at once (%.1f GiB estimated); going on in tiles", what, each / 1024**3)
        model_management.soft_empty_cache()
        return None

    def _tiles(self, inputs, run, tile_x: int, tile_y: int, overlap: int, scale: float, channels: int) -> torch.Tensor:
        """The mean of three tilings (wide, tall, square), whose seams lie in different places."""
        shapes = ((tile_x // 2, tile_y * 2), (tile_x * 2, tile_y // 2), (tile_x, tile_y))
        smallest = min(min(shape) for shape in shapes)
        if not 0 <= overlap < smallest:
            raise input_error(
                "VAE tiles", "overlap", overlap, f"0 to {smallest - 1}, less than half a tile", "Choose larger tiles or less overlap."
            )  # fmt: skip
        height, width = inputs.shape[-2:]
        steps = inputs.shape[0] * sum(get_tiled_scale_steps(width, height, *shape, overlap) for shape in shapes)
        bar = ProgressBar(steps)
        parts = (tiled_scale(inputs, run, *shape, overlap, scale, channels, self.output_device, bar) for shape in shapes)
        return sum(parts) / len(shapes)
