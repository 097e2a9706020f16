"""The outputs of every attention and MLP, as the paper of TaylorSeer keeps them: a skipped visit makes the modulation anew and adds them.

"From Reusing to Forecasting", arXiv 2503.06923: what is kept is each module's output before its gate, so that a skip follows the time
embedding. A computed call reads them by forward hooks, which stand for that call alone; a skipped one leaves every block out through its
block patch and does

    x ← x + gate(vec)·F̂     module by module: no attention, no MLP; embedders, modulation and final layer run

It keeps one tensor a module: with the 57 blocks of FLUX.1 as much as 76 whole sequences of tokens, where `last_block` keeps one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ...families.blocks import BlockKey
from ...families.gated import GatedStream
from .targets import Call, Features

__all__ = ["ModuleTarget"]


class ModuleTarget:
    """streams: of every block, see families/gated.py. Features stand in the order of the blocks, their streams and modules."""

    name = "modules"
    keeps_text = True

    def __init__(self, streams: Mapping[BlockKey, tuple[GatedStream, ...]]):
        self.streams = dict(streams)
        self.modules = [module for block in self.streams.values() for stream in block for module in stream.modules]

    def full(self, call: Call, parts: Sequence[str] | None = None) -> tuple[torch.Tensor, Mapping[str, Features]]:
        """A module that another node's patch kept from running has an empty feature, and its block is left out in skips too."""
        seen: dict[nn.Module, torch.Tensor] = {}

        def keep(module: nn.Module, _: Any, output: torch.Tensor) -> None:
            seen[module] = output.detach().clone()  # hosts write into what modules return

        with ExitStack() as hooks:
            for module in self.modules:
                hooks.enter_context(module.register_forward_hook(keep))
            out = call.run(call.options)
        nothing = call.x.new_zeros(call.x.shape[0], 0)
        return out, {"": tuple(seen.get(module, nothing) for module in self.modules)} if seen else {}

    def skip(self, call: Call, features: Features, part: str = "") -> torch.Tensor:
        foreign = call.options.get("patches_replace", {}).get("dit", {})
        rest = iter(features)
        patches = {}
        for key, block in self.streams.items():
            patches[key] = _finisher([(stream, [next(rest) for _ in stream.modules]) for stream in block])
        call.bypassed += len(foreign.keys() & patches.keys())
        replace = {**call.options.get("patches_replace", {}), "dit": {**foreign, **patches}}
        return call.run({**call.options, "patches_replace": replace})


def _finisher(block: Sequence[tuple[GatedStream, Sequence[torch.Tensor]]]) -> Callable:
    """A block patch that adds outputs under the gates of its own call, in place of the block."""

    def patch(args: dict, extra: dict) -> dict:
        out = {name: args[name] for name in ("img", "txt") if name in args}
        for stream, outputs in block:
            x = out[stream.name].clone()  # (b, n, d); hosts add residuals in place
            for gate, output in zip(stream.gates(args["vec"]), outputs, strict=True):
                if output.ndim == x.ndim:
                    x += gate.to(x) * output.to(x)
            out[stream.name] = torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x
        return out

    return patch
