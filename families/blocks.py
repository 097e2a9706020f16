"""Where the blocks of each family stand: how a node names them, how many there are, and whose tokens come first in their attention.

Read from the transformer's own attributes, so that small models and fine-tunes of a family are recognised by what they are made of.
Facts: Flux and Chroma join text before image in double and single blocks; HunyuanVideo the other way round; SD3 and Qwen-Image have
joint blocks only, text first, which the host numbers as double blocks; Wan and LTX-Video attend over image tokens alone and read the
text in a second attention of the same block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..errors import input_error

__all__ = ["BlockKey", "BlockLayout", "block_layout", "block_text", "parse_blocks"]

BlockKey = tuple[str, int]  # as patches_replace["dit"] names a block: ("double_block", 3)


@dataclass(frozen=True)
class BlockLayout:
    """family: its name for messages; counts: kind of block → how many; text: where text tokens stand in a block's first attention,
    "first", "last" or "apart" (not in it)."""

    family: str
    counts: Mapping[str, int]
    text: str

    def every(self) -> tuple[BlockKey, ...]:
        """The keys of all blocks."""
        return tuple((f"{kind}_block", number) for kind, count in self.counts.items() for number in range(count))

    def __str__(self) -> str:
        return ", ".join(f"{kind}:0-{count - 1}" for kind, count in self.counts.items())


def _counts(**blocks: Any) -> Mapping[str, int]:
    return MappingProxyType({kind: len(members) for kind, members in blocks.items() if len(members)})


def _has(transformer: Any, *names: str) -> bool:
    return all(hasattr(transformer, name) for name in names)


def block_layout(transformer: Any, where: str) -> BlockLayout:
    """The layout of `transformer` (a model's `diffusion_model`).

    Raises: NodeInputError for a transformer whose blocks the host does not offer, or that no family here describes.
    """
    if _has(transformer, "double_blocks", "single_blocks"):
        blocks = _counts(double=transformer.double_blocks, single=transformer.single_blocks)
        if hasattr(getattr(transformer, "txt_in", None), "individual_token_refiner"):
            return BlockLayout("HunyuanVideo", blocks, "last")
        return BlockLayout("Flux", blocks, "first")
    if _has(transformer, "joint_blocks"):
        return BlockLayout("SD3", _counts(double=transformer.joint_blocks), "first")
    if _has(transformer, "transformer_blocks", "img_in", "txt_in"):
        return BlockLayout("Qwen-Image", _counts(double=transformer.transformer_blocks), "first")
    if _has(transformer, "transformer_blocks", "patchify_proj"):
        return BlockLayout("LTX-Video", _counts(double=transformer.transformer_blocks), "apart")
    if _has(transformer, "blocks", "patch_embedding", "head"):
        return BlockLayout("Wan", _counts(double=transformer.blocks), "apart")
    allowed = "Flux, Chroma, SD3, Qwen-Image, HunyuanVideo, Wan, LTX-Video"
    raise input_error(where, "model", type(transformer).__name__, allowed, "Use a model whose blocks can be reached.")


_RANGE = re.compile(r"(double|single)(?::(\d+)(?:(-)(\d*))?)?")


def parse_blocks(text: str, layout: BlockLayout, where: str, input_name: str = "blocks") -> tuple[BlockKey, ...]:
    """"single:20-37, double:0-3, single:5, double, single:20-" → block keys in the order in which they run.

    A kind alone means all its blocks, an open end means up to the last one.

    Raises: NodeInputError for a part that is no range, or a block that the model does not have.
    """
    allowed = f"ranges within {layout}"
    chosen: set[BlockKey] = set()
    for part in (part.strip() for part in text.split(",")):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise input_error(where, input_name, text, allowed, "Write ranges like single:20-37, separated by commas.")
        kind, first, dash, last = match.groups()
        count = layout.counts.get(kind, 0)
        start = int(first or 0)
        end = int(last) if last else count - 1 if dash or first is None else start
        if not 0 <= start <= end < count:
            has = f"This {layout.family} model has {layout}; its later half is a good start."
            raise input_error(where, input_name, part, allowed, has)
        chosen.update((f"{kind}_block", number) for number in range(start, end + 1))
    return tuple(sorted(chosen))


def block_text(blocks: Sequence[BlockKey]) -> str:
    """Block keys, in the order in which they run and without gaps within a kind, as `parse_blocks` reads them: "double:1-2, single:0-4"."""
    numbers: dict[str, list[int]] = {}
    for kind, number in blocks:
        numbers.setdefault(kind.removesuffix("_block"), []).append(number)
    return ", ".join(f"{kind}:{found[0]}" + (f"-{found[-1]}" if len(found) > 1 else "") for kind, found in numbers.items())
