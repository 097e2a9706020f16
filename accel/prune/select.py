"""From numbers to a plan: which blocks go, by score or by a fixed pattern.

    least     the blocks with the lowest scores
    even      spread evenly over the stack
    ends      the first and last of the stack stay, and of what lies between every second goes, as many as asked (the pattern of BK-SDM,
              arXiv 2305.15798)
    random    drawn from a seed
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ...errors import input_error
from ...families.stack import Stack, StackBlock
from .plan import PrunePlan

__all__ = ["PATTERNS", "how_many", "least_important", "pattern", "plan_without", "protected"]

PATTERNS = ("even", "ends", "random")


def protected(text: str, stack: Stack, where: str) -> frozenset[str]:
    """Paths of the blocks that must stay: "0" and "-1" count over the whole stack, "double:1", "single:-1" within a kind.

    Raises: NodeInputError for a part that names no block.
    """
    allowed = f"numbers from {-len(stack.blocks)} to {len(stack.blocks) - 1}, or such as double:0 and single:-1, with commas"
    paths = {block.path for block in stack.fixed}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(?:(double|single):)?(-?\d{1,4})", part)
        members = [block for block in stack.blocks if match and match[1] in (None, block.kind)]
        if not match or not -len(members) <= int(match[2]) < len(members):
            raise input_error(where, "protect", part, allowed, "Correct the list.")
        paths.add(members[int(match[2])].path)
    return frozenset(paths)


def how_many(share: float, stack: Stack, keep: frozenset[str], where: str) -> int:
    """Blocks to remove for a share of all blocks, the nearest whole number.

    Raises: NodeInputError where so many cannot go, or none would.
    """
    count = round(share * len(stack.blocks))
    free = len(stack.blocks) - len(keep)
    if not 1 <= count <= free or count == len(stack.blocks):
        most = min(free, len(stack.blocks) - 1)
        allowed = f"a share that leaves out 1 to {most} of {len(stack.blocks)} blocks, {len(keep)} of them protected"
        raise input_error(where, "remove", share, allowed, "Change the share, or protect fewer blocks.")
    return count


def least_important(scores: Mapping[str, float], stack: Stack, count: int, keep: frozenset[str]) -> tuple[StackBlock, ...]:
    """`count` blocks with the lowest scores; equal ones from the end of the stack."""
    placed = enumerate(stack.blocks)
    free = [(scores[block.path], -place, block) for place, block in placed if block.path in scores and block.path not in keep]
    return tuple(block for _, _, block in sorted(free, key=lambda entry: entry[:2])[:count])


def pattern(kind: str, stack: Stack, count: int, keep: frozenset[str], seed: int = 0) -> tuple[StackBlock, ...]:
    free = [block for block in stack.blocks if block.path not in keep]
    if kind == "random":
        order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()
        return tuple(free[place] for place in order[:count])
    if kind == "even":
        return tuple(free[int((number + 0.5) * len(free) / count)] for number in range(count))
    inner = [block for block in free if block not in (stack.blocks[0], stack.blocks[-1])]
    order = inner[1::2] + inner[0::2] + [block for block in free if block not in inner]
    return tuple(order[:count])


def plan_without(
    blocks: tuple[StackBlock, ...], stack: Stack, model: str, method: str, scores: Mapping[str, float] | None = None, **facts
) -> PrunePlan:
    """The plan that leaves out `blocks`. Raises: ValueError where a holder would be empty and that holder is the only one."""
    gone = {block.path for block in blocks}
    kept = {group[0].holder: tuple(block.index for block in group if block.path not in gone) for group in stack.groups()}
    return PrunePlan(stack.family, model, stack.counts, kept, method=method, scores=dict(scores or {}), facts=facts)
