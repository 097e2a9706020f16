"""The tiny model as diffusers' FluxTransformer2DModel, so that caches built on diffusers are measured on the same weights.

Two layouts of one network: the checkpoint keeps a block's q, k and v (and a single block's MLP) in one matrix, diffusers in one each; and
the last modulation's halves stand the other way round (shift, scale here; scale, shift there). Everything else is a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from diffusers import FluxTransformer2DModel

__all__ = ["DiffusersFlux", "diffusers_state", "diffusers_twin"]

PATCH = 2  # a token is a patch of 2 × 2 latent cells

_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_FUSED = {  # one matrix there, its rows in this order here
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def diffusers_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Flux checkpoint's tensors under diffusers' names, float32.

    Raises: KeyError for a tensor that a Flux checkpoint does not have.
    """
    hidden = state["img_in.weight"].shape[0]
    named: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        module, kind = name.rsplit(".", 1)
        kind, tensor = ("weight" if kind == "scale" else kind), tensor.float()
        block = _BLOCK.fullmatch(module)
        if module == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            named[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
        elif block is None:
            named[f"{_OUTSIDE[module]}.{kind}"] = tensor
        else:
            stack, number, inner = block.groups()
            prefix = f"transformer_blocks.{number}" if stack == "double" else f"single_transformer_blocks.{number}"
            if inner in _FUSED:
                parts = _FUSED[inner]
                sizes = [hidden] * 3 + [tensor.shape[0] - 3 * hidden] * (len(parts) - 3)
                named |= {f"{prefix}.{part}.{kind}": rows for part, rows in zip(parts, tensor.split(sizes), strict=True)}
            else:
                named[f"{prefix}.{(_DOUBLE if stack == 'double' else _SINGLE)[inner]}.{kind}"] = tensor
    return named


def diffusers_twin(state: Mapping[str, torch.Tensor], axes: tuple[int, ...]) -> FluxTransformer2DModel:
    """The network of a Flux checkpoint without guidance embedding; sizes are read from the tensors. axes: RoPE widths, one head in sum."""
    blocks = [(match[1], int(match[2])) for match in map(_BLOCK.match, state) if match]
    count = {stack: 1 + max(number for kind, number in blocks if kind == stack) for stack in ("double", "single")}
    head = sum(axes)
    twin = FluxTransformer2DModel(
        patch_size=1,
        in_channels=state["img_in.weight"].shape[1],
        num_layers=count["double"],
        num_single_layers=count["single"],
        attention_head_dim=head,
        num_attention_heads=state["img_in.weight"].shape[0] // head,
        joint_attention_dim=state["txt_in.weight"].shape[1],
        pooled_projection_dim=state["vector_in.in_layer.weight"].shape[1],
        guidance_embeds=False,
        axes_dims_rope=tuple(axes),
    )
    twin.load_state_dict(diffusers_state(state), strict=True)
    return twin.eval().requires_grad_(False)


class DiffusersFlux:
    """Calls the twin as a pipeline of diffusers does: packed tokens, and one call a condition under the cache context of its name."""

    def __init__(self, transformer: FluxTransformer2DModel):
        self.transformer = transformer

    def velocity(self, x: torch.Tensor, sigma: float, text: torch.Tensor, pooled: torch.Tensor, branch: str | None = None) -> torch.Tensor:
        """x: (b, c, h, w); text: (b, n, d); pooled: (b, e); branch: cache context, None outside one. Returns v, (b, c, h, w)."""
        b, c, h, w = x.shape
        rows, columns = h // PATCH, w // PATCH
        tokens = x.view(b, c, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * PATCH * PATCH)
        image_ids = torch.zeros(rows, columns, 3)
        image_ids[..., 1] = torch.arange(rows)[:, None]
        image_ids[..., 2] = torch.arange(columns)[None, :]
        arguments = {
            "hidden_states": tokens,
            "timestep": torch.full((b,), sigma),
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "txt_ids": torch.zeros(text.shape[1], 3),
            "img_ids": image_ids.reshape(-1, 3),
            "return_dict": False,
        }
        if branch is None:
            out = self.transformer(**arguments)[0]
        else:
            with self.transformer.cache_context(branch):
                out = self.transformer(**arguments)[0]
        return out.view(b, rows, columns, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
