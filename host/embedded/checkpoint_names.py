"""What a state dict is, in words: every layout that people have in their model folders, told apart by telltale keys.

Only some of them run here. The names serve the refusal of the others: a user learns what the file is, not only what it is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SUPPORTED", "describe", "network_prefix", "refusal"]

SUPPORTED = (
    "Flux, SD3/SD3.5 and Lumina-Image-2 transformers in the layout their authors published (with or without the prefix "
    "model.diffusion_model.), AutoencoderKL and TAESD codecs, and Rectiflow's tiny model; as .safetensors"
)

NETWORK_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.")


@dataclass(frozen=True)
class _Layout:
    """`name` fits where every pattern is found. A pattern is matched at the start of a key, or anywhere after a leading '*'."""

    name: str
    patterns: tuple[str, ...]


def _layouts(*rows: tuple[str, ...]) -> tuple[_Layout, ...]:
    return tuple(_Layout(name, patterns) for name, *patterns in rows)


# Order matters: the first fit wins, so variants stand before what they vary.
_PATCHES = _layouts(
    ("a LoRA (load it with a LoRA node)", "*.lora_A."),
    ("a LoRA (load it with a LoRA node)", "*.lora_B."),
    ("a LoRA (load it with a LoRA node)", "*lora_down."),
    ("a LoRA (load it with a LoRA node)", "*lora_up."),
    ("a LoHa adapter", "*hada_w1_a"),
    ("a LoKr adapter", "*lokr_w1"),
    ("a textual-inversion embedding", "emb_params"),
    ("a ControlNet for Flux or SD3", "controlnet_blocks.0."),
    ("a ControlNet for Flux or SD3", "controlnet_x_embedder."),
    ("a ControlNet", "control_model."),
    ("a ControlNet", "input_hint_block.0."),
    ("a 4-bit bitsandbytes model", "*.weight.quant_state.bitsandbytes__"),
    ("a Nunchaku (SVDQuant) model", "*.qweight", "*.smooth"),
    ("a GPTQ or AWQ quantised model", "*.qweight", "*.qzeros"),
)

_NETWORKS = _layouts(
    ("an SD3 transformer", "joint_blocks.0.context_block.attn.qkv.weight"),
    ("a HunyuanVideo transformer", "txt_in.individual_token_refiner.blocks.0."),
    ("a Chroma transformer", "distilled_guidance_layer.", "double_blocks.0."),
    ("a Flux 2 transformer", "double_stream_modulation_img.lin.weight"),
    ("a Hunyuan3D transformer", "latent_in.weight", "double_blocks.0."),
    ("a Flux transformer", "double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"),
    ("a Z-Image transformer", "cap_pad_token", "noise_refiner.0."),
    ("a Lumina-Image-2 transformer", "cap_embedder.1.weight", "noise_refiner.0."),
    ("a Lumina-Next transformer", "cap_embedder.1.weight", "layers.0.attention."),
    ("an OmniGen2 transformer", "time_caption_embed.caption_embedder.0.weight", "ref_image_refiner.0."),
    ("a Qwen-Image transformer", "txt_norm.weight", "transformer_blocks.0.img_mod."),
    ("a Wan video transformer", "head.modulation", "blocks.0.cross_attn."),
    ("an AuraFlow transformer", "double_layers.0.attn.w1q.weight"),
    ("a HiDream transformer", "caption_projection.0.linear.weight"),
    ("a Hunyuan-DiT transformer", "mlp_t5.0.weight"),
    ("a Mochi transformer", "t5_yproj.weight"),
    ("a PixArt transformer", "t_block.1.weight", "y_embedder."),
    ("an LTX-Video transformer", "adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj."),
    ("a Cosmos transformer", "x_embedder.proj.1.weight", "blocks.0."),
    ("a Cosmos transformer", "blocks.block0.blocks.0.block.attn."),
    ("an ACE-Step transformer", "genre_embedder.weight"),
    ("a Stable Audio transformer", "transformer.rotary_pos_emb.inv_freq"),
    ("a Stable Cascade network", "clf.1.weight"),
)

_DIFFUSERS = _layouts(
    ("a Qwen-Image transformer", "txt_norm.weight", "transformer_blocks.0.attn.add_q_proj."),
    ("a Flux transformer in diffusers' layout", "single_transformer_blocks.0.", "x_embedder.weight"),
    ("an SD3 transformer in diffusers' layout", "transformer_blocks.0.attn.add_q_proj.", "pos_embed.proj.weight"),
    ("a Lumina-Image-2 transformer in diffusers' layout", "time_caption_embed.", "noise_refiner.0."),
    ("a PixArt transformer in diffusers' layout", "adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"),
    ("a UNet in diffusers' layout", "down_blocks.0.resnets.0.", "time_embedding."),
    ("an AutoencoderKL in diffusers' layout", "decoder.up_blocks.0.resnets.0."),
    ("a TAESD in diffusers' layout", "decoder.layers.0.", "encoder.layers.0."),
)

_CODECS = _layouts(
    ("a TAESD codec", "taesd_decoder.1.weight"),
    ("a TAESD codec", "taesd_encoder.0.weight"),
    ("a Wan video codec", "decoder.middle.0.residual.0.gamma"),
    ("an LTX-Video codec", "decoder.last_scale_shift_table"),
    ("a video codec", "decoder.mid.block_1.mix_factor"),
    ("an AutoencoderKL codec", "decoder.conv_in.weight", "decoder.mid.attn_1."),
    ("an AutoencoderKL codec", "encoder.conv_in.weight", "encoder.mid.attn_1."),
    ("a Stable Cascade codec", "vquantizer.codebook.weight"),
    ("a TAESD decoder", "1.weight", "3.conv.0.weight", "19.weight"),
    ("a TAESD encoder", "0.weight", "1.conv.0.weight", "14.weight"),
)

_TEXT = _layouts(
    ("the text encoder of Rectiflow's tiny model", "text.embedding", "style.embedding"),
    ("a CLIP-G text encoder", "text_model.encoder.layers.30."),
    ("a CLIP-H text encoder", "text_model.encoder.layers.22."),
    ("a CLIP-L text encoder", "text_model.encoder.layers.0."),
    ("a CLIP text encoder in OpenCLIP's layout", "transformer.resblocks.0.attn.in_proj_weight"),
    ("a T5-XXL text encoder", "encoder.block.23.layer.1.DenseReluDense."),
    ("a T5 text encoder", "encoder.block.0.layer.0.SelfAttention.k.weight"),
    ("a Gemma 3 text encoder", "model.layers.0.post_feedforward_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"),
    ("a Gemma 2 text encoder", "model.layers.0.post_feedforward_layernorm.weight"),
    ("a Qwen 2.5 text encoder", "model.layers.0.self_attn.k_proj.bias"),
    ("a Llama text encoder", "model.layers.0.post_attention_layernorm.weight"),
    ("a CLIP vision encoder", "vision_model.encoder.layers.0."),
    ("a CLIP vision encoder", "visual.transformer.resblocks.0."),
)

_OTHERS = _layouts(
    ("the codec of Rectiflow's tiny model", "codec.basis", "codec.scale", "codec.mean"),
    ("an upscaling model", "conv_first.weight"),
    ("an upscaling model", "model.1.sub.0.RDB1."),
)

_TEXT_PREFIX = re.compile(
    r"^(cond_stage_model|conditioner\.embedders\.\d|text_encoders?)\.(model\.|transformer\.)?"
    r"((clip_[a-z]|t5xxl|gemma2_2b|[a-z0-9_]+)\.(transformer\.))?|^(transformer\.)(?=text_model|encoder\.block|model\.layers)"
)


def network_prefix(keys: Mapping[str, Any]) -> str:
    """What stands before the transformer's own names in a checkpoint: one of NETWORK_PREFIXES, or nothing."""
    counts = {prefix: sum(key.startswith(prefix) for key in keys) for prefix in NETWORK_PREFIXES}
    likely = max(counts, key=counts.get)
    return likely if counts[likely] > 5 else ""


def _fits(layout: _Layout, keys: list[str]) -> bool:
    for pattern in layout.patterns:
        if not any((pattern[1:] in key) if pattern.startswith("*") else key.startswith(pattern) for key in keys):
            return False
    return True


def _first(layouts: tuple[_Layout, ...], keys: list[str]) -> str | None:
    return next((layout.name for layout in layouts if _fits(layout, keys)), None)


def _unet(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The UNets of Stable Diffusion, told apart by the width of their text states."""
    if "input_blocks.0.0.weight" not in shapes:
        return None
    widths = {shape[1] for key, shape in shapes.items() if key.endswith("transformer_blocks.0.attn2.to_k.weight") and len(shape) == 2}
    known = {768: "an SD1.5 UNet", 1024: "an SD2 UNet", 2048: "an SDXL UNet", 1280: "an SDXL refiner UNet"}
    return next((known[width] for width in known if width in widths), "a diffusion UNet")


def describe(state_dict: Mapping[str, Any]) -> str:
    """One phrase for what the file holds: "a Flux transformer", "an SDXL UNet with an AutoencoderKL codec", … Unknown layouts are
    described by their first keys."""
    keys = list(state_dict)
    if not keys:
        return "a file without tensors"
    patch = _first(_PATCHES, keys)
    if patch is not None:
        return patch
    prefix = network_prefix(state_dict)
    own = {key[len(prefix) :]: tuple(state_dict[key].shape) for key in keys if key.startswith(prefix)}
    network = _first(_NETWORKS, list(own)) or _unet(own) or _first(_DIFFUSERS, list(own))
    codec_prefix = next((p for p in ("first_stage_model.", "vae.") if any(key.startswith(p) for key in keys)), "")
    codec = _first(_CODECS, [key[len(codec_prefix) :] for key in keys if key.startswith(codec_prefix)])
    text = _first(_TEXT, [_TEXT_PREFIX.sub("", key) for key in keys])
    found = [part for part in (network, codec, text, _first(_OTHERS, keys)) if part is not None]
    if found:
        return " with ".join(found)
    shown = ", ".join(repr(key) for key in sorted(keys)[:3])
    return f"an unknown layout of {len(keys)} tensors ({shown}{', …' if len(keys) > 3 else ''})"


def refusal(what: str, state_dict: Mapping[str, Any], wanted: str, supported: str = SUPPORTED, remedy: str | None = None) -> ValueError:
    """The error for a file that cannot be used: what it is, what was wanted, what this host reads, what to do.

    what: the file as the user knows it; wanted: "a diffusion model", "a VAE", ….
    """
    remedy = remedy or "Choose another file, or run this graph in ComfyUI."
    return ValueError(f"{what} is {describe(state_dict)}; {wanted} was expected. Supported: {supported}. {remedy}")
