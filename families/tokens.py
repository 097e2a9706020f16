"""Where a forward over part of the image tokens enters and leaves each family, and how its tokens lie on the picture.

Facts of ComfyUI 0.3.64: Flux, Chroma, SD3, Qwen-Image and Wan hand whole token sequences to block patches, so tokens are taken out in the
first block and put back in the last; rotations, where they are an argument (`pe`), are taken block by block. SD3 adds positions before
its first block. NextDiT (Lumina 2) has no block patches: its tokens and rotations come from `patchify_and_embed` and end in `unpatchify`,
which object patches reach. ControlNet residuals are added behind the blocks: Flux and Chroma read "input" after double and "output" after
single blocks, SD3 "output", Qwen-Image "input".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import input_error
from .arch import arch_spec
from .blocks import BlockKey

__all__ = ["SUPPORTED", "TokenSpec", "attends_twice", "attention_spec", "is_nextdit", "token_spec"]

SUPPORTED = "Flux, Chroma, SD3, Lumina 2 (NextDiT), Qwen-Image, Wan"
_CONTROL = MappingProxyType({
    "Flux": MappingProxyType({"input": "double_block", "output": "single_block"}),
    "SD3": MappingProxyType({"output": "double_block"}),
    "Qwen-Image": MappingProxyType({"input": "double_block"}),
})  # fmt: skip
_FULL_LENGTH_PARTS = ("vace_blocks", "control_adapter", "audio_injector", "casual_audio_encoder", "motion_encoder", "face_adapter")


@dataclass(frozen=True)
class TokenSpec:
    """One transformer.

    patch: latent cells of a token along each of the last axes of a latent; axes before them have one token a cell.
    blocks: keys of the blocks in running order; empty where only the embedder and the end can be reached.
    layers: attentions over image tokens in one forward. kv_repeat: equal heads that keys and values come in.
    text_inside: whether text stands beside the image in those attentions; text_last: behind it. control: residual list → kind of block
    it follows.
    """

    family: str
    patch: tuple[int, ...]
    blocks: tuple[BlockKey, ...]
    layers: int
    kv_repeat: int = 1
    text_inside: bool = True
    control: Mapping[str, str] = field(default_factory=dict)
    text_last: bool = False


def _patch(transformer: Any) -> tuple[int, ...]:
    size = transformer.patch_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _refused(where: str, got: str, reason: str) -> Exception:
    return input_error(where, "model", got, f"{SUPPORTED}; {reason}", "Use one of these, or a cache node, which works with every model.")


def attention_spec(transformer: Any, where: str) -> TokenSpec:
    """The spec for nodes that change attention over all tokens: the families of `token_spec`, and HunyuanVideo.

    Raises: NodeInputError for a family whose attention is not known.
    """
    arch = arch_spec(transformer)
    if arch is not None and arch.family == "HunyuanVideo":
        return TokenSpec(arch.family, _patch(transformer), arch.blocks, len(arch.blocks), text_last=True)
    return token_spec(transformer, where)


def is_nextdit(transformer: Any) -> bool:
    """Whether it is Lumina 2's class or a kin of it."""
    return all(hasattr(transformer, part) for part in ("patchify_and_embed", "unpatchify", "layers", "noise_refiner"))


def attends_twice(transformer: Any, key: BlockKey) -> bool:
    """Whether a block of SD3 has a second attention of the image alone."""
    blocks = getattr(transformer, "joint_blocks", ())
    return bool(blocks) and bool(getattr(getattr(blocks[key[1]], "x_block", None), "x_block_self_attn", False))


def token_spec(transformer: Any, where: str) -> TokenSpec:
    """The spec of `transformer` (a model's `diffusion_model`).

    Raises: NodeInputError for a family whose tokens cannot be reached, naming what would work.
    """
    name = type(transformer).__name__
    if is_nextdit(transformer):
        attention = transformer.layers[0].attention
        repeat = attention.n_local_heads // attention.n_local_kv_heads
        return TokenSpec("NextDiT", _patch(transformer), (), len(transformer.layers), repeat)
    arch = arch_spec(transformer)
    if arch is None:
        raise _refused(where, name, "the blocks of this model have no patches")
    if arch.family not in ("Flux", "SD3", "Qwen-Image", "Wan"):
        raise _refused(where, f"{name} ({arch.family})", "this family ties its modulation or masks to the full number of tokens")
    if not hasattr(transformer, "patch_size"):
        raise _refused(where, name, "the tokens of this model are points, not a picture's grid")
    if any(hasattr(transformer, part) for part in _FULL_LENGTH_PARTS):
        raise _refused(where, name, "this variant adds full-length tokens between its blocks")
    twice = len(getattr(transformer, "x_block_self_attn_layers", None) or ())
    if arch.family == "SD3" and not twice:
        twice = sum(attends_twice(transformer, key) for key in arch.blocks)
    control = _CONTROL.get(arch.family, {})
    return TokenSpec(arch.family, _patch(transformer), arch.blocks, len(arch.blocks) + twice, 1, arch.carries_text, control)
