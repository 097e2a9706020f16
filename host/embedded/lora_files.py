"""From a LoRA file to weight patches: which names trainers give the weights of our models, and which pairs of tensors belong together.

Names are those of the checkpoints (diffusion_model.…, kohya's lora_unet_…) and of diffusers (transformer.…, also with
underscores), whose separate q, k and v are slices of our joint projections.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .lora import LoRAAdapter
from .model_base import SD3, Flux

__all__ = ["load_lora_for_models", "lora_patches", "network_keys"]

Target = Any  # a weight's name, or (name, (axis, start, length)) for a part of it

_PAIRS = (
    (".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"), ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"), (".lora_B", ".lora_A"), (".lora_B.default.weight", ".lora_A.default.weight"),
)  # fmt: skip

# diffusers' name inside a block → ours inside a block; {q}, {k}, {v} of one projection share a row
_FLUX_DOUBLE = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2", "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}  # fmt: skip
_FLUX_SINGLE = {"proj_out": "linear2", "norm.linear": "modulation.lin"}
_FLUX_REST = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer", "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer", "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer", "proj_out": "final_layer.linear",
}  # fmt: skip
_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2", "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}  # fmt: skip
_SD3_REST = {
    "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2", "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}  # fmt: skip


def _slices(names: tuple[str, ...], ours: str, width: int) -> Iterator[tuple[str, Target]]:
    for place, name in enumerate(names):
        yield name, (ours, (0, place * width, width))


def _flux_names(hidden: int, depth: int, single: int, mlp: int) -> Iterator[tuple[str, Target]]:
    for i in range(depth):
        theirs, ours = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        yield from _slices(tuple(f"{theirs}attn.to_{part}" for part in "qkv"), f"{ours}img_attn.qkv", hidden)
        yield from _slices(tuple(f"{theirs}attn.add_{part}_proj" for part in "qkv"), f"{ours}txt_attn.qkv", hidden)
        yield from ((theirs + name, ours + target) for name, target in _FLUX_DOUBLE.items())
    for i in range(single):
        theirs, ours = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        yield from _slices(tuple(f"{theirs}attn.to_{part}" for part in "qkv"), f"{ours}linear1", hidden)
        yield f"{theirs}proj_mlp", (f"{ours}linear1", (0, 3 * hidden, mlp))
        yield from ((theirs + name, ours + target) for name, target in _FLUX_SINGLE.items())
    yield from _FLUX_REST.items()


def _sd3_names(hidden: int, depth: int) -> Iterator[tuple[str, Target]]:
    for i in range(depth):
        theirs, ours = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        yield from _slices(tuple(f"{theirs}attn.to_{part}" for part in "qkv"), f"{ours}x_block.attn.qkv", hidden)
        yield from _slices(tuple(f"{theirs}attn2.to_{part}" for part in "qkv"), f"{ours}x_block.attn2.qkv", hidden)
        yield from _slices(tuple(f"{theirs}attn.add_{part}_proj" for part in "qkv"), f"{ours}context_block.attn.qkv", hidden)
        yield from ((theirs + name, ours + target) for name, target in _SD3_BLOCK.items())
    yield from _SD3_REST.items()


def _diffusers_names(model: Any) -> Iterator[tuple[str, Target]]:
    params = getattr(model.diffusion_model, "params", None)
    if isinstance(model, Flux):
        mlp = int(params.hidden_size * params.mlp_ratio)
        yield from _flux_names(params.hidden_size, params.depth, params.depth_single_blocks, mlp)
    elif isinstance(model, SD3):
        yield from _sd3_names(params.hidden_size, params.depth)


def network_keys(model: Any) -> dict[str, Target]:
    """Every name that a LoRA file may use → the weight of `model` (a BaseModel), without its ".weight"."""
    names: dict[str, Target] = {}
    own = [key for key in model.state_dict() if key.startswith("diffusion_model.") and key.endswith(".weight")]
    for key in own:
        bare = key[len("diffusion_model.") : -len(".weight")]
        for name in (f"diffusion_model.{bare}", bare, f"transformer.{bare}", f"lora_unet_{bare.replace('.', '_')}"):
            names[name] = key
    present = set(own)
    for theirs, target in _diffusers_names(model):
        ours, *part = (target,) if isinstance(target, str) else target
        key = f"diffusion_model.{ours}.weight"
        if key in present:
            flat = theirs.replace(".", "_")
            for name in (f"transformer.{theirs}", theirs, f"lora_transformer_{flat}", f"lora_unet_{flat}", f"lycoris_{flat}"):
                names.setdefault(name, (key, *part) if part else key)
    return names


def lora_patches(lora: Mapping[str, torch.Tensor], names: Mapping[str, Target], used: set[str]) -> dict[Target, Any]:
    """The patches a file has for `names`; the tensors that were taken are added to `used`."""
    patches: dict[Target, Any] = {}
    for name, target in names.items():
        up_down = next(((name + up, name + down) for up, down in _PAIRS if name + up in lora and name + down in lora), None)
        if up_down is not None:
            extra = {part: f"{name}.{part}" for part in ("alpha", "dora_scale") if f"{name}.{part}" in lora}
            up, down = (lora[key] for key in up_down)
            alpha = float(lora[extra["alpha"]]) if "alpha" in extra else None
            keys = {*up_down, *extra.values()}
            patches[target] = LoRAAdapter(keys, (up, down, alpha, None, lora.get(extra.get("dora_scale", "")), None))
            used |= keys
        for suffix, kind in ((".diff", "weight"), (".diff_b", "bias")):
            if name + suffix in lora and isinstance(target, str):
                patches[target[: -len("weight")] + kind] = ("diff", (lora[name + suffix],))
                used.add(name + suffix)
    return patches


def load_lora_for_models(model: Any, clip: Any, lora: Mapping[str, torch.Tensor], strength_model: float, strength_clip: float) -> tuple:
    """Clones of MODEL and CLIP (each may be None) with the file's changes at the given strengths.

    Tensors that fit neither are named in the log.
    """
    used: set[str] = set()
    new_model = new_clip = None
    if model is not None:
        new_model = model.clone()
        new_model.add_patches(lora_patches(lora, network_keys(model.model), used), strength_model)
    if clip is not None:
        new_clip = clip.clone()
        weights = [key for key in clip.cond_stage_model.state_dict() if key.endswith(".weight")]
        names = {f"text_encoders.{key[: -len('.weight')]}": key for key in weights}
        new_clip.add_patches(lora_patches(lora, names, used), strength_clip)
    left = [key for key in lora if key not in used]
    if left:
        shown = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
        logging.warning("LoRA: %d of %d tensors fit no weight of this model: %s", len(left), len(lora), shown)
    return new_model, new_clip
