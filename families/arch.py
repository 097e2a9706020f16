"""The stack of a transformer as block patches meet it: every block in the order it runs, and which streams of tokens it hands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import NodeInputError
from .blocks import BlockKey, BlockLayout, block_layout

__all__ = ["ArchSpec", "arch_spec"]


@dataclass(frozen=True)
class ArchSpec:
    """layout: family, counts and where text stands; blocks: keys of patches_replace["dit"] in running order."""

    layout: BlockLayout
    blocks: tuple[BlockKey, ...]

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
        return None
    if not layout.counts.get("double"):
        return None
    blocks = tuple((f"{kind}_block", i) for kind in ("double", "single") for i in range(layout.counts.get(kind, 0)))
    return ArchSpec(layout, blocks)
