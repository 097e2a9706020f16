"""Which blocks to leave out, learnt together with a cheap stand-in for later training (TinyFusion, arXiv 2412.01199).

    groups      M neighbouring blocks of a kind, of which N stay; the rows of C_k (C(M, N), M) are all choices as 0 and 1
    draw        y = onehot(argmax z), z = (s·g_k + Gumbel noise)/τ, with the gradient of softmax(z); m = yᵀ·C_k, one draw a sample
    block       h ← h + m·(φ(h) − h) in every stream
    decision    the row with the largest g_k

s = 100, g_k starts at 0.02. Blocks with m = 0 are computed all the same while this is learnt: their weights' gradient is 0 but that of m is
⟨∂L/∂h, φ(h) − h⟩, which says whether leaving them out was right.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import input_error
from ...families.stack import Stack, StackBlock, State
from .gates import own

__all__ = ["DepthMasks", "LocalGroup", "MaskGate", "choices", "local_groups", "patterns_like"]

FIRST_LOGIT = 0.02
LARGEST_GROUP = 8


def choices(size: int, keep: int) -> Tensor:
    """All rows of `size` zeros and ones with `keep` ones, (C(size, keep), size), in lexicographic order of the kept places."""
    rows = torch.zeros(math.comb(size, keep), size)
    for row, places in enumerate(itertools.combinations(range(size), keep)):
        rows[row, list(places)] = 1.0
    return rows


@dataclass(frozen=True)
class LocalGroup:
    """Neighbours of one kind of which `keep` stay."""

    blocks: tuple[StackBlock, ...]
    keep: int

    def choices(self) -> Tensor:
        return choices(len(self.blocks), self.keep)

    @property
    def name(self) -> str:
        return f"{self.blocks[0].name}-{self.blocks[-1].index} keeps {self.keep} of {len(self.blocks)}"


def local_groups(patterns: Mapping[str, str], stack: Stack, protected: frozenset[str], where: str) -> tuple[LocalGroup, ...]:
    """Groups of the blocks that are not protected.

    Args:
        patterns: kind → "" (all stay), "N:M" (as often as it fits, the rest stays) or a list such as "2:4, 3:4" from the first block on;
            of a group with N = M in a list all stay.
    Raises: NodeInputError for what is no pattern, groups beyond the last block, or none at all.
    """
    groups: list[LocalGroup] = []
    for kind, text in patterns.items():
        free = [block for block in stack.blocks if block.kind == kind and block.path not in protected]
        pairs = [_pair(part, kind, where) for part in text.split(",") if part.strip()]
        if len(pairs) == 1 and pairs[0][0] < pairs[0][1]:
            pairs *= max(1, len(free) // pairs[0][1])
        wanted = sum(size for _, size in pairs)
        if wanted > len(free):
            allowed = f"groups of {len(free)} blocks together, those of this kind that are not protected"
            raise input_error(where, f"{kind}_pattern", text, allowed, "Shorten the list, or protect fewer blocks.")
        for keep, size in pairs:
            members, free = free[:size], free[size:]
            if keep < size:
                groups.append(LocalGroup(tuple(members), keep))
    if not groups:
        allowed = "a pattern such as 1:2 for one kind at least"
        raise input_error(where, "double_pattern", "no group", allowed, "Write how many of how many neighbours stay.")
    return tuple(groups)


def patterns_like(gone: Collection[StackBlock], stack: Stack, protected: frozenset[str]) -> dict[str, str]:
    """Kind → the pattern of groups of LARGEST_GROUP that leaves out as many of each as there are of `gone`; "" where none is.

    How many go from where is then as a score has it; which of them, masks learn together. Uniform groups, as published, take as much from
    the part of a model that bears most as from the rest.
    """
    found = {}
    for kind in dict.fromkeys(block.kind for block in stack.blocks):
        free = [block for block in stack.blocks if block.kind == kind and block.path not in protected]
        parts = [free[start : start + LARGEST_GROUP] for start in range(0, len(free), LARGEST_GROUP)]
        keeps = [(len(part) - sum(block in gone for block in part), len(part)) for part in parts]
        found[kind] = ", ".join(f"{keep}:{size}" for keep, size in keeps) if any(keep < size for keep, size in keeps) else ""
    return found


def _pair(part: str, kind: str, where: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d{1,2})\s*:\s*(\d{1,2})\s*", part)
    keep, size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (0 <= keep <= size and 1 <= size <= LARGEST_GROUP):
        allowed = f"N:M with N up to M and M at most {LARGEST_GROUP}; 7:14 has 3432 choices and does not converge"
        raise input_error(where, f"{kind}_pattern", part.strip(), allowed, "Take 1:2 or 2:4.")
    return keep, size


class DepthMasks:
    """The logits g_k and what is drawn from them. Columns of a mask are the groups' blocks in order."""

    def __init__(self, groups: Sequence[LocalGroup], scale: float = 100.0):
        self.groups, self.scale = tuple(groups), scale
        self.rows = [group.choices() for group in self.groups]
        self.logits = {f"mask.{number}": nn.Parameter(torch.full((len(rows),), FIRST_LOGIT)) for number, rows in enumerate(self.rows)}

    @property
    def blocks(self) -> tuple[StackBlock, ...]:
        return tuple(block for group in self.groups for block in group.blocks)

    def draw(self, uniform: Sequence[Tensor], temperature: float) -> Tensor:
        """Masks (b, blocks) of exact zeros and ones with a gradient. uniform: of each group (b, choices), in [0, 1)."""
        parts = []
        for logits, rows, u in zip(self.logits.values(), self.rows, uniform):
            gumbel = -(-u.clamp(1e-12, 1.0 - 2**-24).log()).log()
            soft = torch.softmax((self.scale * logits + gumbel) / temperature, dim=1)  # (b, choices)
            hard = torch.nn.functional.one_hot(soft.argmax(1), len(logits)).to(soft)
            parts.append((hard + (soft - soft.detach())) @ rows)
        return torch.cat(parts, dim=1)

    def probabilities(self, values: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Path → how probable it is that the block stays: softmax(s·g_k)·C_k."""
        found: dict[str, float] = {}
        for group, rows, logits in zip(self.groups, self.rows, self._values(values)):
            shares = torch.softmax(self.scale * logits.double(), dim=0) @ rows.double()
            found.update({block.path: float(share) for block, share in zip(group.blocks, shares)})
        return found

    def gone(self, values: Mapping[str, Tensor] | None = None) -> tuple[StackBlock, ...]:
        """The blocks that the most probable row of every group leaves out."""
        out = []
        for group, rows, logits in zip(self.groups, self.rows, self._values(values)):
            out += [block for block, stays in zip(group.blocks, rows[int(logits.argmax())].tolist()) if not stays]
        return tuple(out)

    def _values(self, values: Mapping[str, Tensor] | None) -> list[Tensor]:
        return [(values or self.logits)[name].detach().cpu() for name in self.logits]


class MaskGate:
    """The handler around the blocks of all groups.

    masks: (b, blocks), or None where the network is whole. rows: the rows of the batch in the present call of the network.
    """

    def __init__(self, blocks: Sequence[StackBlock], rows: Callable[[], list[int]]):
        self.columns = {block.path: column for column, block in enumerate(blocks)}
        self.rows = rows
        self.masks: Tensor | None = None

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        if self.masks is None:
            return run()
        before, after = own(state), run()
        stays = self.masks[self.rows(), self.columns[block.path]]  # (rows,)
        return tuple(new if new is None else _mixed(old, new, stays) for old, new in zip(before, after))


def _mixed(old: Tensor, new: Tensor, stays: Tensor) -> Tensor:
    return old + stays.view(-1, *[1] * (new.ndim - 1)).to(new) * (new - old)
