"""Where the double blocks of a family keep their text: the modules between the text that enters a block and the text that leaves it.

    z = norm1(txt)·(1 + scale) + shift      read by the projections of q, k and v
    txt ← txt + gate·proj(attention)
    txt ← txt + gate'·mlp(norm2(txt)·(1 + scale') + shift')

with shift, scale and gate of both halves made by one modulation from the time embedding, six parts in this order; norm1 has no weights of
its own, so that another block's modulation makes of it what that block reads. Facts of ComfyUI 0.3.64.
Chroma's blocks are handed their modulation and have none of their own; Wan, LTX-Video and Lumina 2 have no text stream of its own weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["TEXT_FAMILIES", "TextParts"]


@dataclass(frozen=True)
class TextParts:
    """stream: as StackBlock.gives names the text. The others: modules below a block, by what they do in the equations above."""

    holder: str
    stream: str
    modulation: str
    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    mlp: str


_FLUX = TextParts("double_blocks", "txt", "txt_mod", "txt_norm1", ("txt_attn.qkv",), "txt_attn.proj", "txt_norm2", "txt_mlp")
TEXT_FAMILIES = MappingProxyType({
    "Flux": _FLUX,
    "HunyuanVideo": _FLUX,
    "SD3": TextParts(
        "joint_blocks", "context", "context_block.adaLN_modulation", "context_block.norm1", ("context_block.attn.qkv",),
        "context_block.attn.proj", "context_block.norm2", "context_block.mlp",
    ),
    "Qwen-Image": TextParts(
        "transformer_blocks", "encoder_hidden_states", "txt_mod", "txt_norm1", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.to_add_out", "txt_norm2", "txt_mlp",
    ),
})  # fmt: skip
