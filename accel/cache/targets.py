"""What of a model call is kept on a full visit and put back on a skipped one.

    output       v = (x − denoised)/sigma, of any model; a skip makes no model call at all: denoised = x − sigma·v̂
    last_block   the image tokens after the last block; a skip runs embedders and final layer only
    block_delta  what blocks a … c add to each stream of tokens; a skip adds it to what enters block a in the same call

The host adds ControlNet residuals behind every block patch. A full visit keeps them inside what it captures, and a skip builds on what
entered the first block of the range, so each residual counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...families.arch import ArchSpec
from ...families.blocks import BlockKey

__all__ = ["BlockTarget", "Call", "OutputTarget", "TARGETS"]

TARGETS = ("output", "last_block", "block_delta")


@dataclass
class Call:
    """One model call on its way through APPLY_MODEL. run(options) goes on with it. sigma: one for all rows; bypassed: see RunRecord."""

    x: torch.Tensor  # (b, c, …)
    sigma: float
    options: dict[str, Any]
    run: Callable[[dict[str, Any]], torch.Tensor]
    bypassed: int = 0


class OutputTarget:
    """The velocity of the whole model."""

    name = "output"

    def full(self, call: Call) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """(denoised, features): features are whole batches, in the order `skip` takes them."""
        denoised = call.run(call.options)
        return denoised, ((call.x.float() - denoised.float()) / call.sigma,)

    def skip(self, call: Call, features: Sequence[torch.Tensor]) -> torch.Tensor:
        return (call.x.float() - call.sigma * features[0]).to(call.x.dtype)


State = tuple[torch.Tensor, "torch.Tensor | None"]  # image tokens (b, n, d), text tokens (b, m, d)


@dataclass
class _Pass:
    """What one call has met so far."""

    text: int = 0
    start: State | None = None
    captured: tuple[torch.Tensor, ...] | None = None
    bypassed: int = 0
    foreign: dict[BlockKey, Callable] = field(default_factory=dict)


class BlockTarget:
    """Tokens at the end of a range of blocks: themselves (`relative` False, the whole stack), or what the range adds to them.

    blocks: a run of `arch.blocks` without gaps.
    """

    def __init__(self, arch: ArchSpec, blocks: tuple[BlockKey, ...], relative: bool):
        self.arch, self.blocks, self.relative = arch, blocks, relative
        self.name = "block_delta" if relative else "last_block"
        self.with_text = relative and arch.carries_text and blocks[-1] != arch.blocks[-1]

    def full(self, call: Call) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """As OutputTarget.full; features None where the model did not offer the blocks."""
        seen = _Pass()

        def patch(key: BlockKey, args: dict, block: Callable) -> dict:
            if key == self.blocks[0] and self.relative:
                seen.start = self._own(self._state(key, args, seen))
            out = block(args)
            if key == self.blocks[-1]:
                seen.captured = self._feature(self._state(key, out, seen), seen)
            return out

        return call.run(self._patched(call, seen, {*self._ends()}, patch)), seen.captured

    def skip(self, call: Call, features: Sequence[torch.Tensor]) -> torch.Tensor:
        seen = _Pass()

        def patch(key: BlockKey, args: dict, block: Callable) -> dict:
            if key not in self.blocks:
                return block(args)
            seen.bypassed += key in seen.foreign
            if key == self.blocks[0]:
                seen.start = self._own(self._state(key, args, seen)) if self.relative else None
            if key != self.blocks[-1]:
                return {name: args[name] for name in ("img", "txt") if name in args}
            return self._restored(key, args, features, seen)

        out = call.run(self._patched(call, seen, {*self._ends(), *self.blocks}, patch))
        call.bypassed += seen.bypassed
        return out

    def _ends(self) -> tuple[BlockKey, ...]:
        return self.arch.blocks[0], self.blocks[0], self.blocks[-1]

    def _patched(self, call: Call, seen: _Pass, keys: set[BlockKey], patch: Callable) -> dict[str, Any]:
        """Options of this call alone, with `patch` around what other nodes had put at the same blocks."""
        replace = dict(call.options.get("patches_replace", {}))
        seen.foreign = dict(replace.get("dit", {}))

        def at(key: BlockKey) -> Callable:
            other = seen.foreign.get(key)

            def run(args: dict, extra: dict, **kwargs) -> dict:
                if key == self.arch.blocks[0]:
                    seen.text = args["txt"].shape[1] if self.arch.carries_text else 0
                original = extra["original_block"]
                return patch(key, args, original if other is None else lambda given: other(given, extra, **kwargs))

            return run

        replace["dit"] = {**seen.foreign, **{key: at(key) for key in keys}}
        return {**call.options, "patches_replace": replace}

    def _state(self, key: BlockKey, values: dict, seen: _Pass) -> State:
        """Streams before or after a block."""
        img = values["img"]
        if not self.arch.joins(key):
            return img, values.get("txt") if self.arch.carries_text else None
        if self.arch.text_first:
            return img[:, seen.text :], img[:, : seen.text]
        return img[:, : img.shape[1] - seen.text], img[:, img.shape[1] - seen.text :]

    @staticmethod
    def _own(state: State) -> State:
        """In memory of its own: blocks and hosts write into their inputs."""
        img, txt = state
        return img.detach().clone(), None if txt is None else txt.detach().clone()

    def _feature(self, state: State, seen: _Pass) -> tuple[torch.Tensor, ...]:
        img, txt = state
        if not self.relative:
            return (img.detach().clone(),)
        streams = ((img, seen.start[0]), (txt, seen.start[1]))[: 1 + self.with_text]
        return tuple(after.detach() - before for after, before in streams)

    def _restored(self, key: BlockKey, args: dict, features: Sequence[torch.Tensor], seen: _Pass) -> dict:
        """What the last block of the range would hand on."""
        img, txt = self._state(key, args, seen)
        new = [feature.to(img.dtype) for feature in features]
        if self.relative:
            new = [before + offset for before, offset in zip(seen.start, new)]
        img, txt = new[0], new[1] if self.with_text else txt
        if self.arch.joins(key):
            return {"img": torch.cat((txt, img) if self.arch.text_first else (img, txt), dim=1)}
        return {"img": img, "txt": txt} if "txt" in args else {"img": img}
