"""Modulation by time: the input of a family's first block after it, and the layers that make it in every block.

The modulated input of a family's first block: image tokens, normalised, shifted and scaled by the time embedding.

It is what a block's attention reads, so it changes with the latent and with sigma; "Timestep Embedding Tells", arXiv 2411.19108, decides
by it before any block has run. Read through the block's own modules, from the arguments that a block patch is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import input_error
from .blocks import block_layout

__all__ = ["modulated_input", "modulation_groups"]

Pair = tuple[torch.Tensor, torch.Tensor]  # shift, scale, each broadcastable to (b, n, d)


def modulated_input(transformer: Any, where: str) -> Callable[[dict], torch.Tensor]:
    """A function of the first block's arguments: (b, n, d).

    Raises: NodeInputError for a transformer that no family here describes.
    """
    family = block_layout(transformer, where).family
    if family in ("Flux", "HunyuanVideo"):
        block = transformer.double_blocks[0]
        return lambda args: _modulated(block.img_norm1(args["img"]), _flux(block, args["vec"]))
    if family == "SD3":
        block = transformer.joint_blocks[0].x_block
        return lambda args: _modulated(block.norm1(args["img"]), _first_two(block.adaLN_modulation(args["vec"]), args["img"]))
    if family == "Qwen-Image":
        block = transformer.transformer_blocks[0]
        return lambda args: _modulated(block.img_norm1(args["img"]), _first_two(block.img_mod(args["vec"]), args["img"]))
    if family == "Wan":
        block = transformer.blocks[0]
        return lambda args: _modulated(block.norm1(args["img"]), _wan(block, args["vec"], args["img"]))
    block = transformer.transformer_blocks[0]  # LTX-Video
    return lambda args: _modulated(_rms(args["img"]), _ltx(block, args["vec"]))


def _modulated(normed: torch.Tensor, pair: Pair) -> torch.Tensor:
    shift, scale = pair
    return torch.addcmul(shift.to(normed), normed, 1 + scale.to(normed))


def _rms(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


def _flux(block: Any, vec: Any) -> Pair:
    """Chroma hands the block its modulations in place of the embedding; hosts give a modulation as a record or as a flat tuple."""
    made = vec[0] if isinstance(vec, (tuple, list)) else block.img_mod(vec)
    return (made[0].shift, made[0].scale) if hasattr(made[0], "shift") else (made[0], made[1])


def _first_two(made: torch.Tensor, img: torch.Tensor) -> Pair:
    """made (b, 6·d or more), shift and scale first."""
    width = img.shape[-1]
    return made[:, None, :width], made[:, None, width : 2 * width]


def _wan(block: Any, e: torch.Tensor, img: torch.Tensor) -> Pair:
    """e (b, 6, d), or (b, frames, 6, d) where every latent frame has a time of its own; frames hold equal numbers of tokens."""
    table = block.modulation.to(e)
    if e.ndim == 3:
        return tuple((table + e)[:, :2].split(1, dim=1))
    return tuple(part.repeat_interleave(img.shape[1] // part.shape[1], dim=1) for part in (table.unsqueeze(0) + e).unbind(2)[:2])


def _ltx(block: Any, time: torch.Tensor) -> Pair:
    """time (b, 1 or n, 6·d)."""
    table = block.scale_shift_table.to(time)
    return (table + time.unflatten(-1, table.shape)).unbind(2)[:2]


_LAYER = re.compile(r"(?:^|\.)(?:(?:img_mod|txt_mod|modulation)\.lin|(?:img_mod|txt_mod|adaLN_modulation)\.1)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def modulation_groups(modules: Mapping[str, Any], where: str) -> list[tuple[str, ...]]:
    """The linear layers of blocks that make modulation from the time embedding, in groups of two and more of equal part and shape.

    Facts of ComfyUI 0.3.64: Flux and HunyuanVideo call them `img_mod.lin`, `txt_mod.lin` and `modulation.lin`, Qwen-Image `img_mod.1` and
    `txt_mod.1`, SD3 and Lumina 2 `adaLN_modulation.1`. Wan and LTX-Video have one layer for all blocks already, Chroma none in its blocks.

    Args:
        modules: of the network, by name.
    Raises: NodeInputError for a network without such groups, by the name of its class.
    """
    found: dict[tuple, list[str]] = {}
    for name, layer in modules.items():
        if _LAYER.search(name) and _NUMBER.search(name) and hasattr(layer, "out_features"):
            found.setdefault((_NUMBER.sub("*", name, count=1), layer.out_features, layer.in_features), []).append(name)
    groups = [tuple(names) for names in found.values() if len(names) > 1]
    if not groups:
        allowed = "a model whose blocks make their own modulation: Flux, SD3, Qwen-Image, HunyuanVideo, Lumina 2"
        raise input_error(where, "model", type(modules[""]).__name__, allowed, "Use one of these; others share one layer, or have none.")
    return groups
