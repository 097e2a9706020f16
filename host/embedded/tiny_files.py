"""The tiny model's parts out of its one file, for the loaders that read any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import model_management
from .latent_formats import LatentFormat
from .model_patcher import ModelPatcher

__all__ = ["is_tiny", "tiny_clip", "tiny_latent_format", "tiny_network"]

_TEXT, _STYLE = "text.embedding", "style.embedding"
_PARTS = ("text.", "style.", "codec.")


def is_tiny(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether a checkpoint is one of the tiny model's: a Flux whose latents are those of the linear codec beside it."""
    return "codec.basis" in state_dict and "img_in.weight" in state_dict


def tiny_network(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer's weights alone."""
    return {key: tensor for key, tensor in state_dict.items() if not key.startswith(_PARTS)}


def tiny_latent_format(state_dict: Mapping[str, torch.Tensor]) -> LatentFormat:
    """The codec's output is the model's own space; the preview is exact."""
    from ...tiny.codec import CELL, LinearCodec

    codec = LinearCodec(*(state_dict[f"codec.{name}"].float() for name in ("basis", "scale", "mean")))
    latent_format = LatentFormat()
    latent_format.latent_channels = codec.basis.shape[1]
    latent_format.spacial_downscale_ratio = CELL
    latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = codec.preview_factors()
    return latent_format


def tiny_clip(state_dict: Mapping[str, torch.Tensor], load_device: torch.device | None = None):
    """The CLIP object of a file that holds text.embedding and style.embedding, or None where it does not.

    load_device: where the encoder runs; the host's choice when None.
    """
    if _TEXT not in state_dict or _STYLE not in state_dict:
        return None
    from ...tiny.clip import TinyCLIP, TinyTextEncoder
    from ...tiny.placement import Placement
    from ...tiny.text import Vocabulary

    vocabulary = Vocabulary.load()
    rows = state_dict[_TEXT].shape[0]
    if rows != len(vocabulary.tokens):
        raise ValueError(
            f"Tiny text encoder: the table has {rows} rows, but the vocabulary that ships with Rectiflow has {len(vocabulary.tokens)} "
            "words. Use the file that ships with this version."
        )
    with torch.inference_mode(False):
        encoder = TinyTextEncoder(state_dict[_TEXT].float().clone(), state_dict[_STYLE].float().clone())
    device = load_device or model_management.text_encoder_device()
    patcher = ModelPatcher(encoder, load_device=device, offload_device=model_management.text_encoder_offload_device())
    placement = Placement(patcher, lambda given: model_management.load_models_gpu([given]), model_management.intermediate_device())
    return TinyCLIP(encoder, vocabulary, placement)
