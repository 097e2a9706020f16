"""Which architecture a state dict is, and its sizes, read from the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from .checkpoint_names import network_prefix
from .latent_formats import SD3 as SD3Latent
from .latent_formats import Flux as FluxLatent
from .latent_formats import LatentFormat
from .ldm.autoencoder_kl import AutoencoderParams
from .ldm.flux import Flux, FluxParams
from .ldm.lumina2 import NextDiT, NextDiTParams
from .ldm.mmdit import MMDiT, MMDiTParams
from .model_base import ModelConfig, ModelType

__all__ = ["autoencoder_params", "build_network", "count_blocks", "flux_config", "model_config_from_unet", "strip_prefix"]

StateDict = Mapping[str, torch.Tensor]
_FLUX_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def strip_prefix(state_dict: StateDict, prefix: str) -> dict[str, torch.Tensor]:
    """The entries below `prefix`, without it; all of them for an empty one."""
    return {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}


def count_blocks(keys: Mapping[str, Any], prefix: str) -> int:
    """How many of `prefix`0., `prefix`1., … are there without a gap."""
    numbers = {key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)}
    return next(i for i in range(len(numbers) + 1) if str(i) not in numbers)


def _shape(state_dict: StateDict, key: str, family: str, dims: int = 2) -> tuple[int, ...]:
    if key not in state_dict:
        raise ValueError(f"{family}: the tensor '{key}' is missing, so this is not a whole model. Fetch the file again.")
    shape = tuple(state_dict[key].shape)
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"{family}: the tensor '{key}' has shape {list(shape)}; a model has {dims} sizes above 0 there.")
    return shape


# Flux -----------------------------------------------------------------------------------------------------------------------


def _flux_axes(head_dim: int) -> tuple[int, int, int]:
    """Flux gives 1/8 of a head to the first axis and the rest to rows and columns alike: 128 → 16, 56, 56."""
    if head_dim % 32:
        raise ValueError(f"Flux: heads of {head_dim} channels do not show how RoPE splits them; give axes_dim in the sizes.")
    return head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16


def flux_params(state_dict: StateDict) -> FluxParams:
    patch = 2  # every published Flux folds 2×2 latent cells into a token
    hidden, folded_in = _shape(state_dict, "img_in.weight", "Flux")
    head = _shape(state_dict, "double_blocks.0.img_attn.norm.key_norm.scale", "Flux", dims=1)[0]
    mlp_hidden = _shape(state_dict, "double_blocks.0.img_mlp.0.weight", "Flux")[0]
    return FluxParams(
        in_channels=folded_in // patch**2,
        out_channels=_shape(state_dict, "final_layer.linear.weight", "Flux")[0] // patch**2,
        vec_in_dim=_shape(state_dict, "vector_in.in_layer.weight", "Flux")[1],
        context_in_dim=_shape(state_dict, "txt_in.weight", "Flux")[1],
        hidden_size=hidden,
        mlp_ratio=mlp_hidden / hidden,
        num_heads=hidden // head,
        depth=count_blocks(state_dict, "double_blocks."),
        depth_single_blocks=count_blocks(state_dict, "single_blocks."),
        axes_dim=_flux_axes(head),
        theta=10000,
        patch_size=patch,
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in state_dict,
        guidance_embed="guidance_in.in_layer.weight" in state_dict,
    )


def flux_config(params: FluxParams, latent_format: LatentFormat | None = None) -> ModelConfig:
    """Flux with guidance samples with mu 1.15; without, as Schnell, with shift 1."""
    guided = params.guidance_embed
    return ModelConfig(
        image_model="flux",
        unet_config={"image_model": "flux", **asdict(params)},
        latent_format=latent_format or FluxLatent(),
        model_type=ModelType.FLUX if guided else ModelType.FLOW,
        sampling_settings={} if guided else {"multiplier": 1.0, "shift": 1.0},
        memory_usage_factor=3.1,
        supported_inference_dtypes=_FLUX_DTYPES,
    )


# SD3 ------------------------------------------------------------------------------------------------------------------------

_SD3_UNUSED = ("register", "context_processor.")  # parts of research variants that no published SD3 has


def mmdit_params(state_dict: StateDict) -> MMDiTParams:
    extra = next((key for key in state_dict if key.startswith(_SD3_UNUSED)), None)
    if extra is not None:
        raise ValueError(f"SD3: the tensor '{extra}' belongs to a variant that is not supported; SD3 and SD3.5 as published are.")
    hidden, channels, patch, _ = _shape(state_dict, "x_embedder.proj.weight", "SD3", dims=4)
    block = "joint_blocks.0.x_block."
    normed = f"{block}attn.ln_q.weight" in state_dict
    head = _shape(state_dict, f"{block}attn.ln_q.weight", "SD3", dims=1)[0] if normed else 64
    depth = count_blocks(state_dict, "joint_blocks.")
    positions = _shape(state_dict, "pos_embed", "SD3", dims=3)[1]
    if math.isqrt(positions) ** 2 != positions:
        raise ValueError(f"SD3: the position table has {positions} rows, which is not a square.")
    return MMDiTParams(
        in_channels=channels,
        out_channels=_shape(state_dict, "final_layer.linear.weight", "SD3")[0] // patch**2,
        patch_size=patch,
        hidden_size=hidden,
        num_heads=hidden // head,
        depth=depth,
        mlp_hidden=_shape(state_dict, f"{block}mlp.fc1.weight", "SD3")[0],
        context_in_dim=_shape(state_dict, "context_embedder.weight", "SD3")[1],
        vec_in_dim=_shape(state_dict, "y_embedder.mlp.0.weight", "SD3")[1],
        max_positions=math.isqrt(positions),
        qkv_bias=f"{block}attn.qkv.bias" in state_dict,
        qk_norm=normed,
        dual_attention=tuple(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in state_dict),
    )


def sd3_config(params: MMDiTParams, latent_format: LatentFormat | None = None) -> ModelConfig:
    return ModelConfig(
        image_model="sd3",
        unet_config={"image_model": "sd3", **asdict(params)},
        latent_format=latent_format or SD3Latent(),
        model_type=ModelType.FLOW,
        sampling_settings={"shift": 3.0},
        memory_usage_factor=1.2,
    )


# Lumina-Image 2 -------------------------------------------------------------------------------------------------------------


def nextdit_params(state_dict: StateDict) -> NextDiTParams:
    patch = 2
    dim, folded = _shape(state_dict, "x_embedder.weight", "Lumina-Image-2")
    normed = "layers.0.attention.q_norm.weight" in state_dict
    # 2B has heads of 96; a file without norms does not tell.
    head = _shape(state_dict, "layers.0.attention.q_norm.weight", "Lumina-Image-2", dims=1)[0] if normed else 96
    projected = _shape(state_dict, "layers.0.attention.qkv.weight", "Lumina-Image-2")[0]
    heads = dim // head
    if head % 6 or projected % head or projected // head <= heads or (projected // head - heads) % 2:
        raise ValueError(f"Lumina-Image-2: width {dim}, heads of {head} and {projected} projected channels do not fit together.")
    return NextDiTParams(
        in_channels=folded // patch**2,
        patch_size=patch,
        dim=dim,
        n_layers=count_blocks(state_dict, "layers."),
        n_refiner_layers=count_blocks(state_dict, "noise_refiner."),
        n_heads=heads,
        n_kv_heads=(projected // head - heads) // 2,
        ffn_hidden=_shape(state_dict, "layers.0.feed_forward.w1.weight", "Lumina-Image-2")[0],
        cap_feat_dim=_shape(state_dict, "cap_embedder.1.weight", "Lumina-Image-2")[1],
        axes_dims=(head // 3,) * 3,
        qk_norm=normed,
    )


def lumina2_config(params: NextDiTParams, latent_format: LatentFormat | None = None) -> ModelConfig:
    return ModelConfig(
        image_model="lumina2",
        unet_config={"image_model": "lumina2", **asdict(params)},
        latent_format=latent_format or FluxLatent(),
        model_type=ModelType.FLOW,
        sampling_settings={"multiplier": 1.0, "shift": 6.0},
        memory_usage_factor=1.2,
        supported_inference_dtypes=(torch.bfloat16, torch.float32),
    )


# Choice ---------------------------------------------------------------------------------------------------------------------

_FAMILIES = (
    ("joint_blocks.0.context_block.attn.qkv.weight", mmdit_params, sd3_config),
    ("double_blocks.0.img_attn.norm.key_norm.scale", flux_params, flux_config),
    ("cap_embedder.1.weight", nextdit_params, lumina2_config),
)
_NETWORKS = {"flux": (Flux, FluxParams), "sd3": (MMDiT, MMDiTParams), "lumina2": (NextDiT, NextDiTParams)}

# Keys that only relatives have, whose other parts look like the family's own.
_RELATIVES = (
    "distilled_guidance_layer.", "double_stream_modulation_img.", "txt_in.individual_token_refiner.", "latent_in.", "cap_pad_token",
    "x_pad_token", "byt5_in.", "layers.0.attention.wq.",
)  # fmt: skip


def model_config_from_unet(
    state_dict: StateDict, prefix: str | None = None, latent_format: LatentFormat | None = None
) -> ModelConfig | None:
    """The configuration of the transformer below `prefix` (looked for when None), or None where it is none of ours.

    Raises: ValueError where the layout is ours but the sizes contradict each other.
    """
    own = strip_prefix(state_dict, network_prefix(state_dict) if prefix is None else prefix)
    if any(key.startswith(_RELATIVES) for key in own):
        return None
    for telltale, params_from, config_from in _FAMILIES:
        if telltale in own:
            return config_from(params_from(own), latent_format)
    return None


def build_network(config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "meta") -> torch.nn.Module:
    """The transformer of a configuration, its weights not yet there."""
    network, params = _NETWORKS[config.image_model]
    sizes = {key: value for key, value in config.unet_config.items() if key not in ("image_model", "dtype")}
    return network(params(**sizes), dtype=dtype, device=device)


def with_dtypes(config: ModelConfig, dtype: torch.dtype, manual_cast: torch.dtype | None) -> ModelConfig:
    """The configuration with the dtype the weights are kept in and the one layers compute in."""
    return replace(config, unet_config={**config.unet_config, "dtype": dtype}, manual_cast_dtype=manual_cast)


def autoencoder_params(state_dict: StateDict) -> AutoencoderParams:
    """Sizes of an AutoencoderKL that holds its decoder, its encoder or both.

    Raises: ValueError for video codecs and for files with neither half.
    """
    half = next((name for name in ("decoder", "encoder") if f"{name}.conv_in.weight" in state_dict), None)
    if half is None:
        raise ValueError("AutoencoderKL: neither 'decoder.conv_in.weight' nor 'encoder.conv_in.weight' is there. Fetch the file again.")
    if state_dict[f"{half}.conv_in.weight"].ndim != 4:
        raise ValueError("AutoencoderKL: this is a video codec (3-D convolutions); only picture codecs are supported.")
    levels = "up" if half == "decoder" else "down"
    depth = count_blocks(state_dict, f"{half}.{levels}.")
    widths = tuple(_shape(state_dict, f"{half}.{levels}.{i}.block.0.conv2.weight", "AutoencoderKL", dims=4)[0] for i in range(depth))
    blocks = count_blocks(state_dict, f"{half}.{levels}.0.block.")
    outer = _shape(state_dict, f"{half}.conv_in.weight", "AutoencoderKL", dims=4)
    last = _shape(state_dict, f"{half}.conv_out.weight", "AutoencoderKL", dims=4)
    if not widths or any(width % 32 for width in widths):
        raise ValueError(f"AutoencoderKL: levels of {list(widths)} channels cannot be normalised in groups of 32.")
    return AutoencoderParams(
        z_channels=outer[1] if half == "decoder" else last[0] // 2,
        widths=widths,
        res_blocks=blocks - 1 if half == "decoder" else blocks,
        picture_channels=last[0] if half == "decoder" else outer[1],
        quant_conv="post_quant_conv.weight" in state_dict or "quant_conv.weight" in state_dict,
    )
