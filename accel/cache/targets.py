"""What of a model call is kept on a full visit and put back on a skipped one.

    output        v = (x − denoised)/sigma, of any model; a skip makes no model call at all: denoised = x − sigma·v̂
    output_delta  v − x; a skip adds it to the x of the call
    last_block    the image tokens after the last block; a skip runs embedders and final layer only
    block_delta   what blocks a … c add to each stream of tokens; a skip adds it to what enters block a in the same call
    modules       the output of every attention and MLP before its gate, see module_target.py
    condition     the tokens that a decoupled model's encoder hands to its decoder; a skip runs embedders and decoder only

A target offers `full(call, parts)` → (denoised, features by part), and `skip(call, features, part)` → denoised. Parts are the ranges of a
policy that has several; a target without blocks knows only "". Features are whole batches, in the order `skip` takes them. The host adds
ControlNet residuals behind every block patch. A full visit keeps them inside what it captures, and a skip builds on what entered the first
block of the range, so each residual counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ...families.arch import ArchSpec
from ...families.blocks import BlockKey

__all__ = ["BlockTarget", "Call", "Features", "OutputTarget", "TARGETS", "Target", "Watch"]

TARGETS = ("output", "last_block", "block_delta", "output_delta", "modules", "condition")

Features = tuple[torch.Tensor, ...]  # each (b, …), the whole batch of a call


@dataclass
class Watch:
    """An eye on the first block of one forward. at: see Probe.

    gate, if any, is given what was read, before the rest of the stack: features leave the range of blocks out, None computes it.
    """

    at: str
    gate: Callable[[torch.Tensor], Features | None] | None = None
    seen: torch.Tensor | None = None  # (b, n, d)


@dataclass
class Call:
    """One model call on its way through APPLY_MODEL. run(options) goes on with it. sigma: one for all rows; bypassed: see RunRecord.

    text: tokens of text in this call. Conditions of unlike length that share a call are brought to one length, so it may change from one
    visit to the next.
    """

    x: torch.Tensor  # (b, c, …)
    sigma: float
    options: dict[str, Any]
    run: Callable[[dict[str, Any]], torch.Tensor]
    watch: Watch | None = None
    bypassed: int = 0
    text: int = 0


class Target(Protocol):
    """See the head of this file. full: parts None means all; the features are {} where the model did not offer its blocks.

    keeps_text: whether features hold text tokens, so that history fits only calls with as many of them.
    """

    name: str
    keeps_text: bool

    def full(self, call: Call, parts: Sequence[str] | None = None) -> tuple[torch.Tensor, Mapping[str, Features]]: ...

    def skip(self, call: Call, features: Features, part: str = "") -> torch.Tensor: ...


class OutputTarget:
    """The velocity of the whole model, or (`relative`) what it is beyond the x of its call."""

    keeps_text = False

    def __init__(self, relative: bool = False):
        self.relative = relative
        self.name = "output_delta" if relative else "output"

    def full(self, call: Call, parts: Sequence[str] | None = None) -> tuple[torch.Tensor, Mapping[str, Features]]:
        denoised = call.run(call.options)
        velocity = (call.x.float() - denoised.float()) / call.sigma
        return denoised, {"": (velocity - call.x.float() if self.relative else velocity,)}

    def skip(self, call: Call, features: Features, part: str = "") -> torch.Tensor:
        x = call.x.float()
        velocity = features[0] + x if self.relative else features[0]
        return (x - call.sigma * velocity).to(call.x.dtype)


State = tuple[torch.Tensor, "torch.Tensor | None"]  # image tokens (b, n, d), text tokens (b, m, d)


@dataclass
class _Pass:
    """What one call has met so far. parts: the ranges to capture; part: the one left out once `features` are there."""

    parts: Mapping[str, tuple[BlockKey, ...]] = field(default_factory=dict)
    part: str = ""
    features: Features | None = None
    text: int = 0
    starts: dict[str, State] = field(default_factory=dict)
    captured: dict[str, Features] = field(default_factory=dict)
    bypassed: int = 0
    foreign: dict[BlockKey, Callable] = field(default_factory=dict)


class BlockTarget:
    """Tokens at the end of a range of blocks: themselves (`relative` False, up to the last block), or what the range adds to them.

    ranges: by part a run of `arch.blocks` without gaps. modulated: the first block's modulated input from its arguments, for a watch at
    "entry".
    """

    def __init__(
        self, arch: ArchSpec, ranges: Mapping[str, tuple[BlockKey, ...]], relative: bool,
        modulated: Callable[[dict], torch.Tensor] | None = None,
    ):  # fmt: skip
        self.arch, self.ranges, self.relative, self.modulated = arch, dict(ranges), relative, modulated
        self.name = "block_delta" if relative else "last_block"
        self.keeps_text = any(self.with_text(part) for part in self.ranges)

    def with_text(self, part: str) -> bool:
        """Whether the text that leaves the range is still read."""
        return self.relative and self.arch.carries_text and self.ranges[part][-1] != self.arch.blocks[-1]

    def full(self, call: Call, parts: Sequence[str] | None = None) -> tuple[torch.Tensor, Mapping[str, Features]]:
        """With a watch that has a gate the range "" may end up left out; then there are no features."""
        seen = _Pass({part: blocks for part, blocks in self.ranges.items() if parts is None or part in parts})
        out = self._run(call, seen)
        return out, {} if seen.features is not None else seen.captured

    def skip(self, call: Call, features: Features, part: str = "") -> torch.Tensor:
        return self._run(call, _Pass(part=part, features=tuple(features)))

    def _run(self, call: Call, seen: _Pass) -> torch.Tensor:
        gated = call.watch is not None and call.watch.gate is not None
        may_skip = self.ranges[seen.part] if gated or seen.features is not None else ()
        ends = [key for blocks in seen.parts.values() for key in (blocks[0], blocks[-1])]

        def patch(key: BlockKey, args: dict, block: Callable) -> dict:
            first = key == self.arch.blocks[0]
            if first and call.watch is not None and call.watch.at == "entry":
                self._look(call.watch, self.modulated(args), seen)
            before = self._own(self._state(key, args, seen)) if first and self._needs_residual(call.watch) else None
            if self.relative:
                entered = [part for part, blocks in seen.parts.items() if key == blocks[0]]
                if key in may_skip[:1] and seen.part not in entered:
                    entered.append(seen.part)
                for part in entered:
                    seen.starts[part] = self._own(self._state(key, args, seen))
            if seen.features is not None and key in may_skip:
                return self._left_out(key, args, seen)
            out = block(args)
            if first and call.watch is not None and call.watch.at != "entry":
                img = self._state(key, out, seen)[0]
                self._look(call.watch, img - before[0] if before is not None else img, seen)
            for part, blocks in seen.parts.items():
                if key == blocks[-1]:
                    seen.captured[part] = self._feature(self._state(key, out, seen), seen, part)
            return out

        out = call.run(self._patched(call, seen, {self.arch.blocks[0], *ends, *may_skip}, patch))
        call.bypassed += seen.bypassed
        return out

    @staticmethod
    def _needs_residual(watch: Watch | None) -> bool:
        return watch is not None and watch.at == "first_residual"

    @staticmethod
    def _look(watch: Watch, read: torch.Tensor, seen: _Pass) -> None:
        watch.seen = read.detach().clone()
        if watch.gate is not None:
            seen.features = watch.gate(watch.seen)

    def _patched(self, call: Call, seen: _Pass, keys: set[BlockKey], patch: Callable) -> dict[str, Any]:
        """Options of this call alone, with `patch` around what other nodes had put at the same blocks."""
        replace = dict(call.options.get("patches_replace", {}))
        seen.foreign = dict(replace.get("dit", {}))

        def at(key: BlockKey) -> Callable:
            other = seen.foreign.get(key)

            def run(args: dict, extra: dict, **kwargs) -> dict | torch.Tensor:
                if key == self.arch.blocks[0]:
                    seen.text = args["txt"].shape[1] if self.arch.carries_text else 0
                original = extra["original_block"]
                return patch(key, args, original if other is None else lambda given: other(given, extra, **kwargs))

            return run

        replace["dit"] = {**seen.foreign, **{key: at(key) for key in keys}}
        return {**call.options, "patches_replace": replace}

    def _state(self, key: BlockKey, values: dict, seen: _Pass) -> State:
        """Streams before or after a block."""
        img = values if self.arch.bare and isinstance(values, torch.Tensor) else values[self.arch.stream]
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

    def _feature(self, state: State, seen: _Pass, part: str) -> Features:
        img, txt = state
        if not self.relative:
            return (img.detach().clone(),)
        start = seen.starts[part]
        streams = ((img, start[0]), (txt, start[1]))[: 1 + self.with_text(part)]
        return tuple(after.detach() - before for after, before in streams)

    def _left_out(self, key: BlockKey, args: dict, seen: _Pass) -> dict | torch.Tensor:
        """What a block of the range hands on without running; the last one puts the features back."""
        seen.bypassed += key in seen.foreign
        first, last = self.ranges[seen.part][0], self.ranges[seen.part][-1]
        if key != last:
            # Hosts add residuals in place; what entered the range must not change with them, a side network may read it later.
            img = args[self.arch.stream].clone() if key == first else args[self.arch.stream]
            return img if self.arch.bare else {"img": img, **({"txt": args["txt"]} if "txt" in args else {})}
        img, txt = self._state(key, args, seen)
        new = [feature.to(img.dtype) for feature in seen.features]
        if self.relative:
            new = [before + offset for before, offset in zip(seen.starts[seen.part], new)]
        img, txt = new[0], new[1] if self.with_text(seen.part) else txt
        if self.arch.joins(key):
            return {"img": torch.cat((txt, img) if self.arch.text_first else (img, txt), dim=1)}
        if self.arch.bare:
            return img
        return {"img": img, "txt": txt} if "txt" in args else {"img": img}
