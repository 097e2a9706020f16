"""Where the MLP over image tokens stands in each block, and what it multiplies.

Facts of ComfyUI 0.3.64: Flux's and Chroma's double blocks, SD3's and Qwen-Image's call a module over the image's tokens alone, Wan's blocks
likewise; NextDiT's (Lumina 2) over text and image together; Flux's and Chroma's single blocks have no such module: one layer makes
[q | k | v | hidden] of text and image, and one reads [heads | hidden], so that the MLP is rows of the first and columns of the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .blocks import BlockKey, BlockLayout, parse_blocks
from .cost import forward_cost, numbers_of
from .stack import stack_of
from .tokens import TokenSpec

__all__ = ["MlpSite", "block_flops", "chosen_sites", "mlp_sites"]

_MODULES = MappingProxyType({
    "Flux": "img_mlp", "SD3": "x_block.mlp", "Qwen-Image": "img_mlp", "Wan": "ffn", "Lumina 2": "feed_forward",
})  # fmt: skip


@dataclass(frozen=True)
class MlpSite:
    """One MLP. key, kind of tokens: "image", "joint" (text in front), or "fused" with attention's layers. path: of the module below the
    network, of the block where it is fused. weights: numbers of the matrices that each token goes through."""

    key: BlockKey
    kind: str
    path: str
    weights: int


def mlp_sites(transformer: Any, where: str) -> tuple[MlpSite, ...]:
    """Those of every block of `transformer` (a model's `diffusion_model`), in running order.

    Raises: NodeInputError for a family whose blocks cannot be reached.
    """
    stack = stack_of(transformer, where)
    return tuple(site for block in stack.blocks for site in _sites(transformer, stack.family, block))


def _sites(transformer: Any, family: str, block: Any) -> Iterator[MlpSite]:
    module = transformer.get_submodule(block.path)
    if block.kind == "single":
        weights = module.mlp_hidden_dim * (module.linear1.in_features + module.linear2.out_features)
        yield MlpSite(block.key, "fused", block.path, weights)
        return
    name = _MODULES.get(family)
    if name is None:
        return
    part = module.get_submodule(name)
    layers = (layer for layer in part.modules() if getattr(getattr(layer, "weight", None), "ndim", 0) > 1)
    kind = "joint" if family == "Lumina 2" else "image"
    yield MlpSite(block.key, kind, f"{block.path}.{name}", sum(numbers_of(layer, layer.weight) for layer in layers))


def chosen_sites(transformer: Any, blocks: str, where: str) -> tuple[MlpSite, ...]:
    """Those of the blocks that `blocks` names, as parse_blocks reads it; "all" or nothing for every block.

    Raises: NodeInputError for a range that the model does not have.
    """
    sites = mlp_sites(transformer, where)
    if blocks.strip() in ("", "all"):
        return sites
    stack = stack_of(transformer, where)
    counts = {group[0].kind: len(group) for group in stack.groups()}
    wanted = parse_blocks(blocks, BlockLayout(stack.family, counts, "first"), where)
    return tuple(site for site in sites if site.key in wanted)


def block_flops(transformer: Any, spec: TokenSpec, key: BlockKey, image: int, text: int = 0) -> tuple[float, float]:
    """(attention with its projections, MLPs) of one block, in FLOPs; the modulation, which goes by samples, is in neither."""
    cost = forward_cost(transformer, spec, [key])
    vectors = 2.0 * cost.weights["vector"]
    own = [site for site in mlp_sites(transformer, "cost") if site.key == key]
    mlp = sum(2.0 * site.weights * (image if site.kind == "image" else image + text) for site in own)
    return cost.linear(image, text) - vectors - mlp + cost.attention(image, text), mlp
