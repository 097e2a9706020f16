"""From how many tokens on another attention is faster than dense attention on this machine: found by measuring both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["SIDES", "least_tokens", "seconds"]

SIDES = (1 << 9, 1 << 16)  # tokens between which the count is looked for
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def seconds(work: Callable[..., Any], *given: torch.Tensor, rounds: int = 3) -> float:
    """Median of the rounds, after one call that is not counted."""
    clock = given[0].device
    found = []
    for _ in range(rounds + 1):
        if clock.type == "cuda":
            torch.cuda.synchronize(clock)
        start = time.perf_counter()
        work(*given)
        if clock.type == "cuda":
            torch.cuda.synchronize(clock)
        found.append(time.perf_counter() - start)
    return sorted(found[1:])[rounds // 2]


@torch.inference_mode()
def least_tokens(
    other: Callable[[int], Attention | None], heads: int, width: int, device: torch.device, dtype: torch.dtype, budget: float = 0.5
) -> int | None:
    """The least number of tokens of a square picture at which `other(side)`, an attention of q, k, v (1, heads, side², width), is faster.

    `other` answers None for a side at which it would be dense. Sides grow by √2; None where no size is reached up to SIDES' end, or
    before a dense attention takes `budget` seconds.
    """
    side = math.ceil(math.sqrt(SIDES[0]))
    while side * side <= SIDES[1]:
        attention = other(side)
        tensors = [torch.full((1, heads, side * side, width), 0.5, device=device, dtype=dtype) for _ in range(3)]
        dense = seconds(F.scaled_dot_product_attention, *tensors)
        if attention is not None and seconds(attention, *tensors) < dense:
            return side * side
        if dense > budget:
            return None
        side = math.ceil(side * math.sqrt(2.0))
    return None
