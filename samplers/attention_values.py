"""Reading and replacing the values V and keys K of chosen blocks during one model call, through official extension points only.

A block is found by an entry of patches_replace["dit"], which hands it a copy of transformer_options with a tag in it; V is met in the
attention override, which sees that tag. Both are set on a copy of the call's own model_options, so that nothing is patched and nothing
has to be undone. An entry or an override that is already there is kept: ours runs first and hands on to it.

K and V are (b, heads, n, d) where attention is called with skip_reshape, else (b, n, …). The first attention of a block is meant: joint
attention in SD3, where a second one may follow, and self-attention in Wan and LTX-Video, where one to the text follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import input_error
from ..families.blocks import BlockKey

__all__ = ["ValueHook", "ValueVisit"]

Changed = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None  # V, K and V, or nothing

_TAG = "rectiflow_value_visit"
_TEXT_COUNTER: BlockKey = ("double_block", 0)  # the one block that is given image and text tokens apart in every family


@dataclass
class ValueVisit:
    """One attention of a chosen block.

    key: the block. v: its values, whole batch. axis: V's token axis. text: how many text tokens it holds, None when no block told.
    kinds: for each part of the batch which condition it is, 0 the positive one (the host's cond_or_uncond). k: its keys, as they meet
    the queries (RoPE applied), with the token axis of V. turn: 0 for the block's first attention, 1 for the second, which in SD3.5's
    dual-attention blocks is over image tokens alone.
    """

    key: BlockKey
    v: torch.Tensor
    axis: int
    text: int | None
    kinds: tuple[int, ...]
    k: torch.Tensor
    turn: int = 0

    def parts(self) -> list[tuple[int, slice]]:
        """(kind, its rows) of every condition in the batch."""
        rows = self.v.shape[0] // len(self.kinds)
        return [(kind, slice(place * rows, (place + 1) * rows)) for place, kind in enumerate(self.kinds)]


class ValueHook:
    """Lets `on_values(visit)` see the values of `blocks` in the calls that are made with `options(…)`: it returns a new V, a pair of new K
    and V, or None, which keeps both.

    turns: how many attentions of a block are seen; 2 only where the second one is not to the text. `missing()` names the blocks that no
    call reached, which a block skipped or replaced by another node's patch would be.
    """

    def __init__(self, blocks: tuple[BlockKey, ...], on_values: Callable[[ValueVisit], Changed], turns: int = 1):
        self.blocks = blocks
        self.on_values = on_values
        self.turns = turns
        self._text: int | None = None
        self._seen: set[BlockKey] = set()

    def missing(self) -> list[BlockKey]:
        return [key for key in self.blocks if key not in self._seen]

    def check(self, where: str) -> None:
        """Raises NodeInputError when a block was not reached."""
        missing = self.missing()
        if missing:
            got = ", ".join(f"{kind.removesuffix('_block')}:{number}" for kind, number in missing)
            remedy = "Leave out nodes that skip or replace these blocks, such as caches, or name other blocks."
            raise input_error(where, "blocks", f"{got}, which no attention was reached in", "blocks that run", remedy)

    def options(self, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """`model_options` for a call, with the hook in; the given dict and those in it stay as they are."""
        options = dict(model_options or {})
        transformer = options["transformer_options"] = dict(options.get("transformer_options", {}))
        replace = transformer["patches_replace"] = dict(transformer.get("patches_replace", {}))
        blocks = replace["dit"] = dict(replace.get("dit", {}))
        for key in {*self.blocks, _TEXT_COUNTER}:
            blocks[key] = self._tagging(key, blocks.get(key))
        transformer["optimized_attention_override"] = self._override(transformer.get("optimized_attention_override"))
        return options

    def _tagging(self, key: BlockKey, earlier: Callable | None) -> Callable:
        def block(args: dict, extra: dict) -> dict:
            if key == _TEXT_COUNTER and args.get("txt") is not None:
                self._text = args["txt"].shape[1]
            if key in self.blocks:
                options = dict(args.get("transformer_options") or {})
                options[_TAG] = [key] * self.turns
                args = {**args, "transformer_options": options}
            return extra["original_block"](args) if earlier is None else earlier(args, extra)

        return block

    def _override(self, earlier: Callable | None) -> Callable:
        def attention(func: Callable, *args, **kwargs):
            options = kwargs.get("transformer_options") or {}
            tag = options.get(_TAG)
            if tag and len(args) > 2:
                key = tag.pop()  # emptied: a further attention of the block is left alone
                turn = self.turns - 1 - len(tag)
                q, k, v, *rest = args
                kinds = tuple(options.get("cond_or_uncond") or (0,))
                text = 0 if turn else self._text
                changed = self.on_values(ValueVisit(key, v, 2 if kwargs.get("skip_reshape") else 1, text, kinds, k, turn))
                self._seen.add(key)
                if changed is not None:
                    k, v = changed if isinstance(changed, tuple) else (k, changed)
                args = (q, k, v, *rest)
            return func(*args, **kwargs) if earlier is None else earlier(func, *args, **kwargs)

        attention.rectiflow_passes_on = True  # it changes values and calls on: accel/attention/dispatch.py lets it go first
        return attention
