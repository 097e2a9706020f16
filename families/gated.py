"""The modules of a block whose outputs are gated and added to its tokens: attention and MLP of each stream.

A block of these families is x += gate·module(…), module by module, with gates that are made from the time embedding alone. Whoever has the
modules' outputs can finish a block without running it. Facts: Flux's double blocks add an attention's projection and an MLP per stream, its
single blocks one joint projection of both; SD3's blocks likewise per stream, those of SD3.5 medium with a second attention of the image,
and the last block hands on no text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import NodeInputError, input_error
from .arch import ArchSpec
from .blocks import BlockKey

__all__ = ["GatedStream", "gated_modules"]

Gates = Callable[[torch.Tensor], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class GatedStream:
    """name: the block argument that holds the tokens. modules: in the order in which their outputs are added. gates: of a block's vec
    (b, d), one a module, each broadcastable to (b, n, d)."""

    name: str
    modules: tuple[nn.Module, ...]
    gates: Gates


def gated_modules(transformer: Any, arch: ArchSpec | None, where: str) -> dict[BlockKey, tuple[GatedStream, ...]]:
    """The gated modules of every block of `transformer`.

    Raises: NodeInputError for a family whose blocks are built otherwise.
    """
    family = type(transformer).__name__ if arch is None else arch.family
    try:
        if family == "Flux":
            double, single = transformer.double_blocks, transformer.single_blocks
            return {key: _flux_double(double[key[1]]) if key[0] == "double_block" else _flux_single(single[key[1]]) for key in arch.blocks}
        if family == "SD3":
            return {key: _joint(transformer.joint_blocks[key[1]]) for key in arch.blocks}
    except AttributeError:  # a relative of the family with other modules, such as Chroma
        family = type(transformer).__name__
    raise _refused(family, where)


def _refused(family: str, where: str) -> NodeInputError:
    remedy = "Set granularity to last_block or block_delta where the blocks have patches, else to output."
    return input_error(where, "granularity", f"modules, with a model of {family}", "modules with Flux and SD3", remedy)


def _flux_double(block: Any) -> tuple[GatedStream, ...]:
    return (
        GatedStream("img", (block.img_attn.proj, block.img_mlp), _flux_gates(block.img_mod)),
        GatedStream("txt", (block.txt_attn.proj, block.txt_mlp), _flux_gates(block.txt_mod)),
    )


def _flux_single(block: Any) -> tuple[GatedStream, ...]:
    return (GatedStream("img", (block.linear2,), _flux_gates(block.modulation)),)


def _flux_gates(modulation: nn.Module) -> Gates:
    """Hosts give a modulation as records with a gate (None in a second place that is not used), or as a flat tuple of threes."""

    def gates(vec: torch.Tensor) -> Sequence[torch.Tensor]:
        made = modulation(vec)
        return made[2::3] if isinstance(made[0], torch.Tensor) else [part.gate for part in made if part is not None]

    return gates


def _joint(block: Any) -> tuple[GatedStream, ...]:
    streams = (("img", block.x_block), ("txt", block.context_block))
    return tuple(_joint_stream(name, half) for name, half in streams if not half.pre_only)


def _joint_stream(name: str, half: Any) -> GatedStream:
    second = bool(half.x_block_self_attn)
    if getattr(half, "scale_mod_only", False):
        raise AttributeError("scale_mod_only")

    def gates(vec: torch.Tensor) -> Sequence[torch.Tensor]:
        made = half.adaLN_modulation(vec).unsqueeze(1).chunk(9 if second else 6, dim=-1)
        return (made[2], made[8], made[5]) if second else (made[2], made[5])

    return GatedStream(name, (half.attn.proj, *((half.attn2.proj,) if second else ()), half.mlp), gates)
