"""Loaders: from a file to MODEL, CLIP and VAE. A file of another layout is refused by the name of what it is.

Real text encoders (CLIP, T5, Gemma) are not here: their tokenizers' vocabularies are in no safetensors file. The tiny model's is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch

from . import model_management
from .checkpoint_names import SUPPORTED, describe, network_prefix, refusal
from .latent_formats import LatentFormat
from .ldm.flux import FluxParams
from .lora_files import load_lora_for_models
from .model_base import MODEL_CLASSES, ModelConfig
from .model_detection import build_network, flux_config, model_config_from_unet, strip_prefix, with_dtypes
from .model_patcher import ModelPatcher
from .tiny_files import is_tiny, tiny_clip, tiny_latent_format, tiny_network
from .utils import calculate_parameters, load_torch_file, weight_dtype
from .vae import VAE
from .weights import load_into, without_fp8_scales

__all__ = [
    "CLIPType", "VAE", "build_flux_model", "load_checkpoint", "load_checkpoint_guess_config", "load_clip", "load_diffusion_model",
    "load_diffusion_model_state_dict", "load_lora_for_models", "load_state_dict_guess_config", "load_vae",
]  # fmt: skip

StateDict = Mapping[str, torch.Tensor]
# Tensors that checkpoints carry beside the weights: buffers of training, tables that the code computes.
_NOT_WEIGHTS = ("model_ema.", "betas", "alphas_", "sqrt_", "log_one_minus", "posterior_", "v_pred", "ztsnr", "logvar")


class CLIPType(Enum):
    """What a text encoder is for; the numbers are ComfyUI's."""

    STABLE_DIFFUSION = 1
    STABLE_CASCADE = 2
    SD3 = 3
    STABLE_AUDIO = 4
    HUNYUAN_DIT = 5
    FLUX = 6
    MOCHI = 7
    LTXV = 8
    HUNYUAN_VIDEO = 9
    PIXART = 10
    COSMOS = 11
    LUMINA2 = 12
    WAN = 13
    HIDREAM = 14
    CHROMA = 15
    ACE = 16
    OMNIGEN2 = 17
    QWEN_IMAGE = 18
    HUNYUAN_IMAGE = 19


# Diffusion models -----------------------------------------------------------------------------------------------------------


def _is_fp8(dtype: torch.dtype | None) -> bool:
    return dtype is not None and dtype.itemsize == 1 and dtype.is_floating_point


def _storage_dtype(config: ModelConfig, weights: StateDict, device: torch.device) -> torch.dtype:
    """The dtype to keep the weights in: the host's choice, but fp8 files stay fp8 where wider weights would not fit."""
    stored = weight_dtype(weights)
    chosen = model_management.unet_dtype(device=device, supported_dtypes=config.supported_inference_dtypes, weight_dtype=stored)
    if _is_fp8(stored) and model_management.supports_cast(device, stored):
        if calculate_parameters(weights) * chosen.itemsize > model_management.get_free_memory(device):
            return stored
    return chosen


def _patcher(config: ModelConfig, weights: StateDict, dtype: torch.dtype | None, strict: bool = False) -> ModelPatcher:
    device = model_management.get_torch_device()
    with torch.inference_mode(False):  # weights born in inference mode could never take part in a gradient
        wide = next(iter(config.supported_inference_dtypes))
        weights = without_fp8_scales(weights, torch.float32 if model_management.cpu_mode() else wide)
        dtype = dtype or _storage_dtype(config, weights, device)
        manual_cast = model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
        config = with_dtypes(config, dtype, manual_cast)
        network = build_network(config, dtype)
        load_into(network, weights, type(network).__name__, dtype, may_ignore=_NOT_WEIGHTS, strict=strict)
        model = MODEL_CLASSES[config.image_model](config, network).eval()
    return ModelPatcher(model, load_device=device, offload_device=model_management.unet_offload_device())


def build_flux_model(
    state_dict: StateDict, sizes: Mapping[str, Any] | None = None, latent_format: LatentFormat | None = None,
    dtype: torch.dtype | None = None,
) -> ModelPatcher:  # fmt: skip
    """A Flux transformer of any size as a MODEL.

    Args:
        state_dict: Flux checkpoint keys without a prefix; left as it is.
        sizes: the fields of FluxParams; read from the shapes when None.
        latent_format: how the codec's latents are scaled; Flux's own when None.
        dtype: of the weights; the host's choice when None.

    Raises: ValueError naming the keys that are missing or unknown, and sizes that contradict each other.
    """
    if sizes is None:
        config = model_config_from_unet(state_dict, "", latent_format)
        if config is None or config.image_model != "flux":
            raise refusal("This state dict", state_dict, "a Flux transformer", "Flux in its published layout")
    else:
        known = set(FluxParams.__dataclass_fields__)
        wrong = sorted(known.symmetric_difference(sizes))
        if wrong:
            raise ValueError(f"build_flux_model: the sizes must be {', '.join(sorted(known))}; missing or unknown: {', '.join(wrong)}.")
        config = flux_config(FluxParams(**sizes), latent_format)
    return _patcher(config, state_dict, dtype, strict=True)


def load_diffusion_model_state_dict(sd: StateDict, model_options: Mapping[str, Any] | None = None) -> ModelPatcher | None:
    """MODEL from a state dict with or without the prefix of checkpoints; None where it holds no transformer of ours.

    model_options: "dtype" for the weights; "fp8_optimizations" asks for fp8 products, which this host does not have.
    """
    options = model_options or {}
    if options.get("fp8_optimizations"):
        logging.warning("fp8 products are not available on this host: the weights are kept in fp8 and multiplied in the compute dtype")
    latent_format = None
    if is_tiny(sd):
        latent_format, sd = tiny_latent_format(sd), tiny_network(sd)
    prefix = network_prefix(sd)
    config = model_config_from_unet(sd, prefix, latent_format)
    if config is None:
        return None
    channels = config.unet_config.get("out_channels", config.unet_config["in_channels"])
    if channels != config.latent_format.latent_channels:
        raise ValueError(
            f"{config.image_model}: this transformer has {channels} latent channels; checkpoints of this family have "
            f"{config.latent_format.latent_channels}. Load it with build_flux_model and its own latent format."
        )
    return _patcher(config, strip_prefix(sd, prefix), options.get("dtype"))


def load_diffusion_model(unet_path: str | os.PathLike, model_options: Mapping[str, Any] | None = None) -> ModelPatcher:
    """MODEL from a file.

    Raises: ValueError naming the file, what it holds and what is supported.
    """
    sd = load_torch_file(unet_path)
    try:
        model = load_diffusion_model_state_dict(sd, model_options)
    except ValueError as error:
        raise ValueError(f"{os.fspath(unet_path)}: {error}") from error
    if model is None:
        raise refusal(os.fspath(unet_path), sd, "a diffusion model")
    return model


# Codecs and text encoders ---------------------------------------------------------------------------------------------------


def load_vae(vae_path: str | os.PathLike) -> VAE:
    """VAE from a file of its own.

    Raises: ValueError naming the file, what it holds and what is supported.
    """
    sd = load_torch_file(vae_path)
    try:
        return VAE(sd=sd)
    except ValueError as error:
        raise ValueError(f"{os.fspath(vae_path)}: {error}") from error


def load_clip(
    ckpt_paths: Sequence[str | os.PathLike], embedding_directory: Any = None, clip_type: CLIPType = CLIPType.STABLE_DIFFUSION,
    model_options: Mapping[str, Any] | None = None,
):  # fmt: skip
    """CLIP from the tiny model's text encoder file.

    embedding_directory and clip_type are for encoders that this host does not have. model_options: "load_device".

    Raises: ValueError naming each other file and what it holds.
    """
    files = {os.fspath(path): load_torch_file(path) for path in ckpt_paths}
    clip = tiny_clip(next(iter(files.values())), (model_options or {}).get("load_device")) if len(files) == 1 else None
    if clip is not None:
        return clip
    found = "; ".join(f"{path} is {describe(sd)}" for path, sd in files.items())
    raise ValueError(
        f"{found}. Supported on this host: the text encoder of Rectiflow's tiny model, alone, since a CLIP, T5 or Gemma encoder needs its "
        "tokenizer's vocabulary, which these files do not carry. Run this graph in ComfyUI."
    )


# Checkpoints ----------------------------------------------------------------------------------------------------------------


def _codec_of(sd: StateDict) -> VAE:
    """The checkpoint's VAE; one that says that there is none when it is used, where it holds none."""
    if is_tiny(sd):
        return VAE(sd=sd)
    prefix = next((prefix for prefix in ("first_stage_model.", "vae.") if any(key.startswith(prefix) for key in sd)), None)
    return VAE(sd={} if prefix is None else strip_prefix(sd, prefix))


def load_state_dict_guess_config(
    sd: StateDict, output_vae: bool = True, output_clip: bool = True, output_clipvision: bool = False, embedding_directory: Any = None,
    output_model: bool = True, model_options: Mapping[str, Any] | None = None, te_model_options: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> tuple | None:  # fmt: skip
    """(MODEL, CLIP, VAE, None) from a checkpoint; None where it holds no model of ours.

    CLIP is None where the checkpoint has no text encoder that this host can run; a line in the log says what it has.
    """
    model = load_diffusion_model_state_dict(sd, model_options) if output_model else None
    if output_model and model is None:
        return None
    clip = tiny_clip(sd) if output_clip else None
    if output_clip and clip is None:
        logging.warning("Load Checkpoint: the file is %s; this host has no text encoder for it, so its CLIP output is empty", describe(sd))
    return model, clip, _codec_of(sd) if output_vae else None, None


def load_checkpoint_guess_config(
    ckpt_path: str | os.PathLike, output_vae: bool = True, output_clip: bool = True, output_clipvision: bool = False,
    embedding_directory: Any = None, output_model: bool = True, model_options: Mapping[str, Any] | None = None,
    te_model_options: Mapping[str, Any] | None = None,
) -> tuple:  # fmt: skip
    """(MODEL, CLIP, VAE, None) from a file.

    Raises: ValueError naming the file, what it holds and what is supported.
    """
    sd = load_torch_file(ckpt_path)
    try:
        loaded = load_state_dict_guess_config(
            sd, output_vae, output_clip, output_clipvision, embedding_directory, output_model, model_options, te_model_options
        )
    except ValueError as error:
        raise ValueError(f"{os.fspath(ckpt_path)}: {error}") from error
    if loaded is None:
        raise refusal(os.fspath(ckpt_path), sd, "a checkpoint with a diffusion model", SUPPORTED)
    return loaded


def load_checkpoint(ckpt_path: str | os.PathLike) -> tuple:
    """(MODEL, CLIP, VAE) from a file; see load_checkpoint_guess_config."""
    return load_checkpoint_guess_config(ckpt_path)[:3]
