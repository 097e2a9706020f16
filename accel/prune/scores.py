"""How much each block of a model matters, by five numbers. High is important.

    similarity    1 − mean cos(h_in, h_out) over the tokens of every stream  (block influence: Men et al. 2024, arXiv 2403.03853)
    sensitivity   ‖v without the block − v‖² / ‖v‖², the error of the model's answer when this block alone is left out
    outcome       sensitivity + ‖x̂0 without the block − x̂0‖² / ‖x̂0‖², the error of the final latents of whole runs: where an error at high
                  sigma leads elsewhere, which the answers alone do not show
    magnitude     root mean square of the block's weights; asks nothing of the model
    probe         1 − linear CKA of the block's output and that of a linear map fitted to it (probes.py)

`ask` runs the model at fixed points of the flow and gives its answers; the blocks are seen through gates.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...families.stack import Stack, StackBlock, State
from .gates import own
from .identity import original_module

__all__ = ["METHODS", "Dispatcher", "Leave", "Similarity", "magnitude", "relative_error", "sensitivity", "similarity"]

METHODS = ("similarity", "sensitivity", "magnitude", "probe", "outcome")


class Dispatcher:
    """The handler that hangs on a network for a whole measurement; `current` is what it does at the moment."""

    def __init__(self) -> None:
        self.current: Callable | None = None

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        return run() if self.current is None else self.current(block, state, run)


class Similarity:
    """Adds up 1 − cos between what enters a block and what leaves it."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.tokens: dict[str, int] = {}

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        before = own(state)
        after = run()
        for old, new in zip(before, after):
            if new is None:  # SD3's last block hands no context on
                continue
            distance = 1.0 - torch.nn.functional.cosine_similarity(old.double(), new.double(), dim=-1)
            self.sums[block.path] = self.sums.get(block.path, 0.0) + float(distance.sum())
            self.tokens[block.path] = self.tokens.get(block.path, 0) + distance.numel()
        return after

    def scores(self) -> dict[str, float]:
        return {path: total / self.tokens[path] for path, total in self.sums.items()}


class Leave:
    """Leaves out the blocks at `paths`."""

    def __init__(self, paths: Iterable[str]):
        self.paths = frozenset(paths)

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        return state if block.path in self.paths else run()


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """‖given − wanted‖² / ‖wanted‖²."""
    return float((given - wanted).double().square().sum() / wanted.double().square().sum().clamp(min=1e-30))


def similarity(ask: Callable[[], Tensor], gate: Dispatcher) -> dict[str, float]:
    gate.current = watch = Similarity()
    ask()
    gate.current = None
    return watch.scores()


def sensitivity(
    ask: Callable[[], Tensor], gate: Dispatcher, stack: Stack, step: Callable[[], None] = lambda: None
) -> dict[str, float]:  # fmt: skip
    """One run of all that `ask` asks a block. Blocks that cannot be left out have no number. step: called before each."""
    whole = ask()
    scores = {}
    for block in stack.blocks:
        if block in stack.fixed:
            continue
        step()
        gate.current = Leave([block.path])
        scores[block.path] = relative_error(ask(), whole)
    gate.current = None
    return scores


def magnitude(model: Any, stack: Stack) -> Mapping[str, float]:
    scores = {}
    for block in stack.blocks:
        values = list(original_module(model, block.path).parameters())
        total = sum(float(value.detach().double().square().sum()) for value in values)
        scores[block.path] = (total / sum(value.numel() for value in values)) ** 0.5
    return scores
