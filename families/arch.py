"""The stack of a transformer as block patches meet it: every block in the order it runs, and which streams of tokens it hands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import NodeInputError
from .blocks import BlockKey, BlockLayout, block_layout

# Families whose blocks can be patched, and whose attention no node here reaches: blocks.py, which nodes on attention read, leaves them out.
# Facts of ComfyUI 0.3.64: AuraFlow numbers its joint and its single layers both from 0, text (with register tokens) first. Mochi hands
# text on beside the image. Stable Audio and HunyuanDiT read text in a second attention; HunyuanDiT and Hunyuan3D 2.1 join the outputs of
# early blocks to the inputs of late ones; the latter calls its patches "block", its stream "x", and takes a bare tensor back.

__all__ = ["ArchSpec", "arch_spec"]


@dataclass(frozen=True)
class ArchSpec:
    """layout: family, counts and where text stands; blocks: keys of patches_replace["dit"] in running order.

    stream: the argument that holds image tokens. bare: a block patch returns those tokens themselves, not a dictionary. long_skips: late
    blocks read what early ones gave, so a range of blocks can be left out only together with all behind it.
    """

    layout: BlockLayout
    blocks: tuple[BlockKey, ...]
    stream: str = "img"
    bare: bool = False
    long_skips: bool = False

    @property
    def family(self) -> str:
        return self.layout.family

    def joins(self, key: BlockKey) -> bool:
        """Whether this block sees text and image as one sequence under the name img."""
        return key[0] == "single_block"

    @property
    def text_first(self) -> bool:
        """Where a joint sequence starts with the text."""
        return self.layout.text == "first"

    @property
    def carries_text(self) -> bool:
        """Whether a block hands on changed text tokens; where not, the text is read from outside the stack."""
        return self.layout.text != "apart"


def arch_spec(transformer: Any) -> ArchSpec | None:
    """The stack of `transformer` (a model's `diffusion_model`), or None where its blocks cannot be patched one by one.

    A stack that starts with joint blocks is among those: the length of the text is read from the arguments of a block that has it apart.
    """
    try:
        layout = block_layout(transformer, "arch_spec")
    except NodeInputError:
        return _patched_only(transformer)
    return _spec(layout)


def _spec(layout: BlockLayout, **facts: Any) -> ArchSpec | None:
    if not layout.counts.get("double"):
        return None
    blocks = tuple((f"{kind}_block", i) for kind in ("double", "single") for i in range(layout.counts.get(kind, 0)))
    return ArchSpec(layout, blocks, **facts)


def _patched_only(transformer: Any) -> ArchSpec | None:
    """The families that are not in blocks.py."""

    def has(*names: str) -> bool:
        return all(hasattr(transformer, name) for name in names)

    def layout(family: str, text: str, **blocks: Any) -> BlockLayout:
        return BlockLayout(family, {kind: len(members) for kind, members in blocks.items() if len(members)}, text)

    if has("double_layers", "single_layers", "register_tokens"):
        return _spec(layout("AuraFlow", "first", double=transformer.double_layers, single=transformer.single_layers))
    if has("blocks", "t5_y_embedder", "t5_yproj"):
        return _spec(layout("Mochi", "last", double=transformer.blocks))
    if has("transformer", "preprocess_conv", "postprocess_conv"):
        return _spec(layout("Stable Audio", "apart", double=transformer.transformer.layers))
    if has("blocks", "mlp_t5", "extra_embedder"):
        return _spec(layout("HunyuanDiT", "apart", double=transformer.blocks), long_skips=True)
    if has("blocks", "x_embedder", "t_embedder", "depth") and any(hasattr(block, "skip_linear") for block in transformer.blocks):
        found = layout("Hunyuan3D 2.1", "apart", double=transformer.blocks)
        return ArchSpec(found, tuple(("block", i) for i in range(len(transformer.blocks))), "x", bare=True, long_skips=True)
    return None
