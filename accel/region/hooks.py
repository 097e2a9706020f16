"""One model call over part of the image tokens: which rows enter, what else has their length, and how they come back to full length.

Families with block patches: tokens are taken in the first block, rotations and masks in every block, ControlNet residuals before the
call, and the last block's output is filled up with zeros, which the caller overwrites. NextDiT: the same at `patchify_and_embed` and
`unpatchify` (embed.py). Every block gets a tag in a copy of the options, by which the attention knows whose keys and values it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...families.blocks import BlockKey
from ...families.tokens import TokenSpec
from ...kernels.token_gather import gather_tokens, scatter_tokens
from .kv_cache import KVStore, RowPlan, all_rows, keep_rows

__all__ = ["LAYER", "LayerTag", "PartialCall", "Unfit"]

LAYER = "rectiflow_ras_layer"


class Unfit(Exception):
    """This call cannot be made over part of the tokens; the reason is for the report. Raised before the network has run."""


@dataclass
class LayerTag:
    """Which block an attention belongs to (None: to none that matters), and how many attentions of it have run."""

    name: Any
    calls: int = 0


@dataclass
class PartialCall:
    """One call. index: (1 or rows of a condition, a), sorted, or None for a dense call that only stores keys and values.

    tokens: of the picture. keys: one a condition in the batch. store: None without K/V cache.
    """

    spec: TokenSpec
    tokens: int
    keys: Sequence[Hashable]
    index: torch.Tensor | None
    store: KVStore | None
    rows: int = 0  # image rows in the running forward, tokens of reference pictures among them
    extra: int = 0  # those that are not of the picture
    text: int = 0
    _taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _whole: torch.Tensor | None = None
    _joint: torch.Tensor | None = None

    # Tokens

    def enter(self, text: int, rows: int, batch: int) -> None:
        """The whole sequence as it comes: text rows that stand before `rows` image rows.

        Raises: Unfit for a sequence that has other tokens before the picture's, or fewer.
        """
        self.text, self.extra = text, rows - self.tokens
        if self.extra < 0 or self.extra and not self.spec.text_inside:
            raise Unfit(f"{rows} image tokens where the latent has {self.tokens}")
        self.rows = rows
        if self.index is None:
            return
        index = self.index
        if index.shape[0] > 1:
            index = index.repeat(batch // index.shape[0], 1)
        behind = torch.arange(self.tokens, rows, device=index.device).expand(index.shape[0], -1)
        self._whole = torch.cat((index, behind), dim=1)
        before = torch.arange(text, device=index.device).expand(index.shape[0], -1)
        self._joint = torch.cat((before, self._whole + text), dim=1)
        self.rows = self._whole.shape[1]

    def take_image(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._whole is None else gather_tokens(x, self._whole)

    def take_joint(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Rows of a tensor over text and image."""
        return x if self._joint is None else gather_tokens(x, self._joint, dim)

    def put_image(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._whole is None else scatter_tokens(x, self._whole, self.tokens + self.extra)

    def put_joint(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._joint is None else scatter_tokens(x, self._joint, self.text + self.tokens + self.extra)

    # Rotations and masks

    def rotations(self, pe: Any) -> Any:
        """pe of the rows in the forward. Its token axis is 1 or 2, by its length; the layout in memory of a stack of matrices is kept."""
        if self._joint is None or not isinstance(pe, torch.Tensor):
            return pe
        known = self._taken.get(id(pe))
        if known is not None:
            return known[1]
        total = self.text + self.tokens + self.extra
        axis = next((axis for axis in (1, 2) if pe.ndim > axis and pe.shape[axis] == total), None)
        if axis is None:
            raise Unfit(f"rotations of shape {tuple(pe.shape)} for {total} tokens")
        # Matrices lie in memory as they were written; reading them transposed would slow every layer.
        turned = pe.ndim > axis + 2 and pe.stride(-1) > pe.stride(-2)
        source = pe.transpose(-1, -2) if turned else pe
        shared = source[:1] if source.shape[0] > 1 and source.stride(0) == 0 and self._joint.shape[0] == 1 else source
        rows = gather_tokens(shared, self._joint, axis)
        rows = rows.transpose(-1, -2) if turned else rows
        self._taken[id(pe)] = (pe, rows)  # the first keeps the id from being used again
        return rows

    def key_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Key columns of a mask over keys (…, n), where keys of tokens left out are dropped."""
        if mask is None or self._joint is None or self.store is not None:
            return mask
        return gather_tokens(mask, self._joint, mask.ndim - 1)

    def mask(self, mask: Any) -> Any:
        """Query rows of an attention mask (…, n, n); key columns stay while keys of all tokens are there."""
        total = self.text + self.tokens + self.extra
        if self._joint is None or not isinstance(mask, torch.Tensor) or mask.ndim < 2:
            return mask
        rows = mask[None] if mask.ndim == 2 else mask
        if mask.shape[-2] == total:
            rows = gather_tokens(rows, self._joint, rows.ndim - 2)
        if self.store is None and mask.shape[-1] == total:
            rows = gather_tokens(rows, self._joint, rows.ndim - 1)
        return rows[0] if mask.ndim == 2 and rows.shape[0] == 1 else rows

    # Hooks

    def patched(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of this call alone: a patch around every block and what other nodes had put there, and the attention."""
        changed = dict(options)
        if self.store is not None:
            changed["optimized_attention_override"] = self._override(options.get("optimized_attention_override"))
        if self.spec.blocks:
            replace = dict(options.get("patches_replace", {}))
            foreign = replace.get("dit", {})
            replace["dit"] = {**foreign, **{key: self._block(key, foreign.get(key)) for key in self.spec.blocks}}
            changed["patches_replace"] = replace
        else:
            changed[LAYER] = LayerTag(None)  # named once the refiners have run
        return changed

    def _block(self, key: BlockKey, other: Callable | None) -> Callable:
        def run(args: dict, extra: dict, **kwargs) -> dict:
            given = dict(args)
            if key == self.spec.blocks[0]:
                text = args["txt"].shape[1] if self.spec.text_inside else 0
                self.enter(text, args["img"].shape[1], args["img"].shape[0])
                given["img"] = self.take_image(args["img"])
            if "pe" in args:
                given["pe"] = self.rotations(args["pe"])
            if args.get("attn_mask") is not None:
                given["attn_mask"] = self.mask(args["attn_mask"])
            given["transformer_options"] = {**(args.get("transformer_options") or {}), LAYER: LayerTag(key)}
            original = extra["original_block"]
            out = original(given) if other is None else other(given, extra, **kwargs)
            if key == self.spec.blocks[-1]:
                put = self.put_joint if key[0] == "single_block" else self.put_image
                out = {**out, "img": put(out["img"])}
            return out

        return run

    def residuals(self, control: Any, batch: int) -> Any:
        """ControlNet residuals of the rows in the forward; those behind the last block meet full-length tokens and stay.

        Raises: Unfit for residuals of another length than the picture's tokens.
        """
        if self.index is None or not isinstance(control, dict):
            return control
        index = self.index if self.index.shape[0] == 1 else self.index.repeat(batch // self.index.shape[0], 1)
        changed = dict(control)
        for name, kind in self.spec.control.items():
            kept = list(control.get(name) or ())
            inside = [(kind, place) != self.spec.blocks[-1] and (kind, place) in self.spec.blocks for place in range(len(kept))]
            places = [place for place, residual in enumerate(kept) if residual is not None and inside[place]]
            for place in places:
                if kept[place].shape[1] != self.tokens:
                    raise Unfit(f"a ControlNet residual of {kept[place].shape[1]} tokens where the picture has {self.tokens}")
            for place, rows in zip(places, gather_tokens([kept[place] for place in places], index) if places else ()):
                kept[place] = rows
            changed[name] = kept
        return changed

    # Attention

    def _override(self, previous: Callable | None) -> Callable:
        def attention(func: Callable, q, k, v, *args, **kwargs):
            tag = (kwargs.get("transformer_options") or {}).get(LAYER)
            inner = func if previous is None else lambda *a, **b: previous(func, *a, **b)
            if tag is None or tag.name is None:
                return inner(q, k, v, *args, **kwargs)
            place, tag.calls = tag.calls, tag.calls + 1
            axis = 2 if kwargs.get("skip_reshape") else 1
            start = k.shape[axis] - self.rows
            if k.shape[axis] != q.shape[axis] or start not in (0, self.text) or place and not self.spec.text_inside:
                return inner(q, k, v, *args, **kwargs)  # attention to something else than these tokens, such as text read from outside
            layer = (tag.name, place)
            plan = RowPlan(axis, start, self.tokens, self.spec.kv_repeat)
            if self.index is None:
                keep_rows(self.store, self.keys, layer, plan, k, v)
            elif any((key, layer) not in self.store.rows for key in self.keys):
                raise Unfit(f"an attention of {tag.name} that no whole call reached")
            else:
                k, v = all_rows(self.store, self.keys, layer, plan, self.index, k, v)
            return inner(q, k, v, *args, **kwargs)

        attention.rectiflow_passes_on = True  # to accel/attention: keys are completed first, then its handlers are asked
        return attention
