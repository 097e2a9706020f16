"""What one forward of each family multiplies, read from the sizes of the modules themselves.

A linear layer or patch convolution of m numbers costs 2·m a token that it sees; which tokens those are is what this table of names knows:
the image's, the text's, both, or one vector a sample. An attention of width d over queries and keys costs 4·queries·keys·d. Norms,
rotations and activations are left out: they are a few per mille of the FLOPs, though not of the time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .blocks import BlockKey
from .stack import stack_of
from .tokens import TokenSpec, attends_twice

__all__ = ["AttentionCost", "ForwardCost", "forward_cost", "numbers_of", "token_kind"]

KINDS = ("image", "text", "joint", "vector")
_VECTOR = r"time_in|vector_in|guidance_in|t_embedder|y_embedder|time_text_embed|time_embedding|time_projection|.*adaLN_modulation|norm_out"
# First match decides. Facts of ComfyUI 0.3.64; names of the embedded host are the same.
_RULES: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType({
    "Flux": (
        (_VECTOR + r"|.*(img_mod|txt_mod|modulation)\.lin$|distilled_guidance_layer", "vector"), (r"single_blocks", "joint"),
        (r"txt_in|double_blocks\.\d+\.txt", "text"), (r"img_in|double_blocks\.\d+\.img|final_layer", "image"),
    ),
    "SD3": (
        (_VECTOR, "vector"), (r"context_embedder|joint_blocks\.\d+\.context_block", "text"),
        (r"x_embedder|joint_blocks\.\d+\.x_block|final_layer", "image"),
    ),
    "NextDiT": (
        (_VECTOR, "vector"), (r"layers", "joint"), (r"cap_embedder|context_refiner", "text"),
        (r"x_embedder|noise_refiner|final_layer", "image"),
    ),
    "Qwen-Image": (
        (_VECTOR + r"|.*(img_mod|txt_mod)", "vector"), (r"txt_in|transformer_blocks\.\d+\.(txt|attn\.(add_|to_add))", "text"),
        (r"img_in|transformer_blocks|proj_out", "image"),
    ),
    "Wan": (
        (_VECTOR, "vector"), (r"text_embedding|blocks\.\d+\.cross_attn\.[kv]$", "text"), (r"patch_embedding|blocks|head", "image"),
    ),
})  # fmt: skip
_CHROMA_VECTORS = 344  # Chroma's approximator makes all modulations at once, so many at any depth


@dataclass(frozen=True)
class AttentionCost:
    """count attentions of `width` channels in `heads` heads, over kind "image", "text", "joint", or "cross" (image queries, text keys)."""

    kind: str
    width: int
    heads: int
    count: int


@dataclass(frozen=True)
class ForwardCost:
    """weights: kind of token → numbers in the layers that it goes through. unknown: names of
    layers that no rule places."""

    weights: Mapping[str, int]
    attentions: tuple[AttentionCost, ...]
    unknown: tuple[str, ...] = ()

    def linear(self, image: float, text: float) -> float:
        """FLOPs of one sample's layers for so many tokens computed."""
        seen = {"image": image, "text": text, "joint": image + text, "vector": 1}
        return 2.0 * sum(count * seen[kind] for kind, count in self.weights.items())

    def attention(self, image: float, text: float, keys: float | None = None) -> float:
        """FLOPs of one sample's attentions; `keys`: image tokens that queries see, all of them where only `image` are computed."""
        keys = image if keys is None else keys
        pairs = {"image": image * keys, "text": text * text, "joint": (image + text) * (keys + text), "cross": image * text}
        return 4.0 * sum(pairs[part.kind] * part.width * part.count for part in self.attentions)


def forward_cost(transformer: Any, spec: TokenSpec, blocks: Sequence[BlockKey] | None = None) -> ForwardCost:
    """The cost of `transformer` (a model's `diffusion_model`), whose spec is token_spec's, or of some blocks of it alone."""
    weights, unknown = dict.fromkeys(KINDS, 0), []
    inside = None if blocks is None else tuple(f"{path}." for path in _paths(transformer, blocks))
    for name, module in transformer.named_modules():
        weight = getattr(module, "weight", None)
        if getattr(weight, "ndim", 0) < 2 or "Embedding" in type(module).__name__ or inside is not None and not name.startswith(inside):
            continue
        kind = token_kind(spec.family, name)
        if kind is None:
            unknown.append(name)
            continue
        times = _CHROMA_VECTORS if name.startswith("distilled_guidance_layer") else 1
        weights[kind] += numbers_of(module, weight) * times
    return ForwardCost(weights, tuple(_attentions(transformer, spec, blocks)), tuple(unknown))


def token_kind(family: str, name: str) -> str | None:
    """Which tokens a layer sees, one of KINDS, by its name below the network; None where no rule places it."""
    return next((kind for pattern, kind in _RULES[family] if re.match(pattern, name)), None)


def _paths(transformer: Any, blocks: Sequence[BlockKey]) -> list[str]:
    return [block.path for block in stack_of(transformer, "cost").blocks if block.key in blocks]


def numbers_of(module: Any, weight: Any) -> int:
    """Numbers of the layer's matrix; those of a packed one by its features."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features * module.out_features
    return math.prod(weight.shape)


def _attentions(transformer: Any, spec: TokenSpec, keys: Sequence[BlockKey] | None) -> Iterator[AttentionCost]:
    if spec.family == "NextDiT":
        attention = transformer.layers[0].attention
        heads, width = attention.n_local_heads, attention.n_local_heads * attention.head_dim
        for kind, layers in (("joint", "layers"), ("text", "context_refiner"), ("image", "noise_refiner")):
            yield AttentionCost(kind, width, heads, len(getattr(transformer, layers)))
        return
    blocks = len(spec.blocks if keys is None else keys)
    heads, width = _heads(transformer, spec.family)
    if spec.family == "Wan":
        yield AttentionCost("image", width, heads, blocks)
        yield AttentionCost("cross", width, heads, blocks)
        return
    yield AttentionCost("joint", width, heads, blocks)
    twice = spec.layers - blocks if keys is None else sum(attends_twice(transformer, key) for key in keys)
    if twice:
        yield AttentionCost("image", width, heads, twice)


def _heads(transformer: Any, family: str) -> tuple[int, int]:
    """(heads, channels of all heads), the channels from the layer behind the attention."""
    if family == "Flux":
        attention = transformer.double_blocks[0].img_attn
        return attention.num_heads, attention.proj.weight.shape[-1]
    if family == "SD3":
        attention = transformer.joint_blocks[0].x_block.attn
        return attention.num_heads, attention.proj.weight.shape[-1]
    if family == "Qwen-Image":
        attention = transformer.transformer_blocks[0].attn
        return attention.heads, attention.to_q.weight.shape[0]
    attention = transformer.blocks[0].self_attn
    return attention.num_heads, attention.q.weight.shape[0]
