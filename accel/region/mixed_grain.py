"""Blocks that see coarse regions as one token each (cells.py has the rule): one model call, and what is set for a run.

Block patches merge the image's tokens in front of the first block of the range and put them back behind its last. Between the two,
rotations and masks have the merged tokens' rows, ControlNet residuals are merged like the tokens, and the attention of every block weighs
the keys of cells. A residual behind the last block meets all tokens and stays. Before the range and behind it the model is untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import input_error
from ...families.blocks import BlockKey
from ...families.tokens import TokenSpec
from ..attention.heads import apart, joined, weighted_keys
from .cells import BLOCK, MERGES, POSITIONS, SIDES, UNMERGES, GrainCells, Joint
from .hooks import Unfit

__all__ = ["KEY", "MergedCall", "MixedGrain"]

KEY = "rectiflow_mixed_grain"


@dataclass(frozen=True)
class MixedGrain:
    """grains: MASK, 1 where the picture is fine. first, last: numbers of the blocks that see merged tokens, counted over all blocks.

    start, end: shares of a run, from its noisy end, between which tokens are merged. side: of a cell, in tokens. See cells.py for the rest.
    """

    grains: torch.Tensor = field(compare=False, repr=False)
    first: int = 2
    last: int = 200
    start: float = 0.2
    end: float = 1.0
    merge: str = "mean"
    unmerge: str = "delta"
    position: str = "centre"
    weigh: bool = True
    side: int = 2

    def check(self, spec: TokenSpec, where: str) -> None:
        """Raises: NodeInputError naming what does not fit, with the model's blocks."""
        choices = (("merge", self.merge, MERGES), ("unmerge", self.unmerge, UNMERGES), ("position", self.position, POSITIONS))
        for name, value, allowed in choices:
            if value not in allowed:
                raise input_error(where, name, value, ", ".join(allowed), "Choose one of these.")
        if not SIDES[0] <= self.side <= SIDES[1]:
            raise input_error(where, "grain", self.side, f"{SIDES[0]} to {SIDES[1]} tokens", "Enter 2.")
        if not 0.0 <= self.start < self.end <= 1.0:
            allowed = "0 ≤ start_percent < end_percent ≤ 1"
            raise input_error(where, "start_percent", (self.start, self.end), allowed, "Enter 0.2 and 1.")
        count = len(spec.blocks)
        if not 0 <= self.first < count:
            raise input_error(where, "block_start", self.first, f"0 to {count - 1}: this model has {count} blocks", "Enter 2.")
        if self.last < self.first:
            raise input_error(where, "block_end", self.last, f"block_start ({self.first}) or more", "Enter 200 for all that follow.")

    def blocks(self, spec: TokenSpec) -> tuple[BlockKey, ...]:
        """The blocks that see merged tokens."""
        return spec.blocks[self.first : self.last + 1]

    def line(self) -> str:
        weights = "weighted keys" if self.weigh else "plain keys"
        return f"mixed grains: cells of {self.side}×{self.side}, {self.merge}, {self.unmerge}, position {self.position}, {weights}"


@dataclass
class _Block:
    """A block of the range while it runs, and how many attentions of it have run."""

    calls: int = 0


@dataclass
class MergedCall:
    """One call. cells: on the model's device. text, extra: tokens in front of the image, and of reference pictures behind it."""

    plan: MixedGrain
    spec: TokenSpec
    cells: GrainCells
    text: int = 0
    extra: int = 0
    merged: bool = False  # whether it came to the range
    _joint: Joint | None = None
    _whole: torch.Tensor | None = None
    _entered: torch.Tensor | None = None
    _taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def patched(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of this call alone: patches around the range's blocks and what other nodes had put there, and the attention."""
        replace = dict(options.get("patches_replace", {}))
        foreign = replace.get("dit", {})
        keys = self.plan.blocks(self.spec)
        ours = {key: self._block(key, foreign.get(key)) for key in keys}
        if keys[0] != self.spec.blocks[0]:
            ours[self.spec.blocks[0]] = self._reader(foreign.get(self.spec.blocks[0]))
        changed = {**options, "patches_replace": {**replace, "dit": {**foreign, **ours}}}
        if self.plan.weigh:
            changed["optimized_attention_override"] = self._override(options.get("optimized_attention_override"))
        return changed

    def _reader(self, other: Callable | None) -> Callable:
        def run(args: dict, extra: dict, **kwargs) -> dict:
            self._read_text(args)
            return extra["original_block"](args) if other is None else other(args, extra, **kwargs)

        return run

    def _read_text(self, args: dict) -> None:
        self.text = args["txt"].shape[1] if self.spec.text_inside else 0

    def _block(self, key: BlockKey, other: Callable | None) -> Callable:
        keys, together = self.plan.blocks(self.spec), key[0] == "single_block"

        def run(args: dict, extra: dict, **kwargs) -> dict:
            given = dict(args)
            if key == self.spec.blocks[0]:
                self._read_text(args)
            if key == keys[0]:
                given["img"] = self._enter(args["img"], self.text if together else 0)
            if args.get("pe") is not None:
                given["pe"] = self._rotations(args["pe"])
            if isinstance(args.get("attn_mask"), torch.Tensor) and args["attn_mask"].ndim > 1:
                given["attn_mask"] = self._joint.mask(args["attn_mask"])
            given["transformer_options"] = {**(args.get("transformer_options") or {}), BLOCK: _Block()}
            out = extra["original_block"](given) if other is None else other(given, extra, **kwargs)
            if key == keys[-1]:
                out = {**out, "img": self._leave(out["img"], self.text if together else 0)}
            return out

        return run

    def _enter(self, x: torch.Tensor, text: int) -> torch.Tensor:
        """Merge the tokens behind the first `text` rows of x.

        Raises: Unfit for a sequence with fewer image tokens than the picture has, or others that are not text's or a reference's.
        """
        count = self.cells.count
        self.extra = x.shape[1] - text - count
        if self.extra < 0 or self.extra and not self.spec.text_inside:
            raise Unfit(f"{x.shape[1] - text} image tokens where the latent has {count}")
        self._joint = self.cells.joint(self.text, self.extra, len(x), x.device)
        before, image, behind = x.split((text, count, self.extra), dim=1)
        self._whole, entered = image, self.cells.merge(image, self.plan.merge)
        self._entered = entered.clone()  # blocks write into what they are given
        self.merged = True
        return torch.cat((before, entered, behind), dim=1)

    def _leave(self, x: torch.Tensor, text: int) -> torch.Tensor:
        before, image, behind = x.split((text, self.cells.merged, self.extra), dim=1)
        whole = self.cells.put_back(image, self._entered, self._whole, self.plan.unmerge)
        self._whole = self._entered = None
        return torch.cat((before, whole, behind), dim=1)

    def _rotations(self, pe: Any) -> Any:
        """pe of the merged tokens. Its token axis is 1 or 2, by its length.

        Raises: Unfit for rotations that are no matrices of these tokens.
        """
        if not isinstance(pe, torch.Tensor):
            return pe
        known = self._taken.get(id(pe))
        if known is None:
            axis = next((axis for axis in (1, 2) if pe.ndim > axis and pe.shape[axis] == self._joint.total), None)
            if axis is None or pe.shape[-2:] != (2, 2):
                raise Unfit(f"rotations of shape {tuple(pe.shape)} for {self._joint.total} tokens")
            known = (pe, self._joint.rotations(pe, axis, self.plan.position))  # the first keeps the id from being used again
            self._taken[id(pe)] = known
        return known[1]

    def residuals(self, control: Any) -> Any:
        """ControlNet residuals with the rows that they meet.

        Raises: Unfit for residuals of another length than the picture's tokens.
        """
        if not isinstance(control, dict):
            return control
        inside, changed = self.plan.blocks(self.spec)[:-1], dict(control)
        for name, kind in self.spec.control.items():
            kept = list(control.get(name) or ())
            for place, residual in enumerate(kept):
                if residual is not None and (kind, place) in inside:
                    if residual.shape[1] != self.cells.count:
                        raise Unfit(f"a ControlNet residual of {residual.shape[1]} tokens where the picture has {self.cells.count}")
                    kept[place] = self.cells.merge(residual, self.plan.merge)
            changed[name] = kept
        return changed

    def _override(self, previous: Callable | None) -> Callable:
        def attention(func: Callable, *args, **kwargs):
            inner = func if previous is None else lambda *a, **b: previous(func, *a, **b)
            tag = (kwargs.get("transformer_options") or {}).get(BLOCK)
            found = None if tag is None else apart(inner, args, kwargs)
            if found is None:
                return inner(*args, **kwargs)
            place, tag.calls = tag.calls, tag.calls + 1
            q, k, v, mask, default = found
            rows = self._joint.first.shape[1]
            start = rows - k.shape[2]  # rows of text that are not in it
            if k.shape[2] != q.shape[2] or start not in (0, self.text) or place and not self.spec.text_inside:
                return inner(*args, **kwargs)  # attention to something else than these tokens, such as text read from outside
            return joined(weighted_keys(default, q, k, v, self._joint.log_weights(k, start), mask), kwargs)

        return attention
