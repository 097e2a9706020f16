"""Which tokens make a block, which blocks a block of queries sees, and in which order a processor takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

__all__ = ["BlockLayout", "Plan", "Term", "Turn"]

LARGE = 1 << 16  # pairs of a block that runs alone: an eighth of a millisecond of a core; below, a turn's calls take more than its copies


@dataclass(frozen=True, eq=False)
class Term:
    """A layout of the tokens from `first` on, whose pairs are added (sign 1) or taken away (−1)."""

    sign: int
    first: int
    layout: BlockLayout


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """blocks: the tokens of each block, every token of the sequence in one of them; kept: for each block the blocks it sees, none twice.

    terms: the same pairs as a sum over layouts of larger blocks, or none. Each pair that a term takes away is in at least two that add it.
    """

    blocks: tuple[torch.Tensor, ...]
    kept: tuple[tuple[int, ...], ...]
    terms: tuple[Term, ...] = ()

    def __post_init__(self):
        order = torch.cat(self.blocks).sort().values
        if not torch.equal(order, torch.arange(len(order))):
            raise ValueError("block_sparse_attention: blocks must hold every token once")
        if len(self.kept) != len(self.blocks) or not all(len(set(row)) == len(row) > 0 for row in self.kept):
            raise ValueError("block_sparse_attention: every block must keep at least one block, and none twice")

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(block) for block in self.blocks)

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """Keys that a query of each block sees."""
        return tuple(sum(self.lengths[i] for i in row) for row in self.kept)

    @property
    def pairs(self) -> int:
        """Pairs of query and key that are computed."""
        return sum(length * keys for length, keys in zip(self.lengths, self.keys))

    @property
    def share(self) -> float:
        """Of all pairs, those that are computed: 1 − sparsity."""
        return self.pairs / self.tokens**2

    @property
    def dense(self) -> bool:
        return all(len(row) == len(self.blocks) for row in self.kept)

    def mask(self) -> torch.Tensor:
        """(n, n), True where a query sees a key."""
        owner = torch.empty(self.tokens, dtype=torch.long)
        table = torch.zeros(len(self.blocks), len(self.blocks), dtype=torch.bool)
        for i, (block, row) in enumerate(zip(self.blocks, self.kept)):
            owner[block] = i
            table[i, list(row)] = True
        return table[owner][:, owner]

    @cached_property
    def in_terms(self) -> bool:
        """Whether the sum over terms is the shorter way: blocks are small, of which a pair takes two to five times as long."""
        small = all(length * keys < LARGE for length, keys in zip(self.lengths, self.keys) if keys < self.tokens)
        return small and 0 < sum(term.layout.pairs for term in self.terms) <= 2 * self.pairs

    @cached_property
    def plan(self) -> Plan:
        return _plan(self)


@dataclass(frozen=True, eq=False)
class Turn:
    """A large block's turn at a buffer of keys: tokens `new` are written from their place on; its queries see `keys`, all it holds."""

    length: int
    keys: torch.Tensor
    new: tuple[tuple[int, torch.Tensor], ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """How blocks are run: those that see every key, over keys as they lie; large ones in turns, which leave most keys where the turn before
    had them; small ones of equal length and number of keys together.

    order: tokens as their queries are run; back: where in `order` each token is; dense: how many queries see every key; classes: length and
    keys (g, m) of small blocks; most: keys that are gathered for one block.
    """

    order: torch.Tensor
    back: torch.Tensor
    dense: int
    turns: tuple[Turn, ...]
    classes: tuple[tuple[int, torch.Tensor], ...]
    most: int


def _plan(layout: BlockLayout) -> Plan:
    def tokens(of: Iterable[int]) -> torch.Tensor:
        return torch.cat([layout.blocks[i] for i in of])

    dense: list[int] = []
    large: list[int] = []
    small: dict[tuple[int, int], list[int]] = {}
    for i, (length, keys) in enumerate(zip(layout.lengths, layout.keys)):
        kind = dense if keys == layout.tokens else large if length * keys >= LARGE else small.setdefault((length, keys), [])
        kind.append(i)
    large = _walk(large, layout.kept)
    order = tokens(itertools.chain(dense, large, *small.values()))
    return Plan(
        order, order.argsort(), sum(layout.lengths[i] for i in dense), tuple(_turns(layout, large)),
        tuple((length, torch.stack([tokens(layout.kept[i]) for i in found])) for (length, _), found in small.items()),
        max((layout.keys[i] for i in itertools.chain(large, *small.values())), default=0),
    )  # fmt: skip


def _turns(layout: BlockLayout, blocks: Sequence[int]) -> Iterator[Turn]:
    held: list[int] = []
    places: dict[int, int] = {}
    for i in blocks:
        held, before = _arranged(held, layout.kept[i], layout.lengths), places
        places = dict(zip(held, itertools.accumulate((layout.lengths[j] for j in held), initial=0)))
        stays = {j: before.get(j) == place for j, place in places.items()}
        written = [list(run) for stay, run in itertools.groupby(held, stays.get) if not stay]  # what lies side by side at once
        new = tuple((places[run[0]], torch.cat([layout.blocks[j] for j in run])) for run in written)
        yield Turn(layout.lengths[i], torch.cat([layout.blocks[j] for j in held]), new)


def _walk(blocks: Sequence[int], kept: Sequence[Sequence[int]]) -> list[int]:
    """`blocks` in an order in which each, of those that the one before it sees, needs the fewest blocks that that one does not see."""
    left = dict.fromkeys(blocks)
    order: list[int] = []
    while left:
        seen = set(kept[order[-1]]) if order else set()
        near = (j for j in seen if j in left)
        order.append(min(near, key=lambda j: len(set(kept[j]) - seen), default=next(iter(left))))
        del left[order[-1]]
    return order


def _arranged(before: Sequence[int], row: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The blocks of `row` in an order in which as many as can be lie where they lay in `before`."""
    old, kept = set(before), set(row)
    waiting = dict.fromkeys([*(i for i in row if i not in old), *(i for i in reversed(before) if i in kept)])
    order: list[int] = []
    for held in before:
        fit = held if held in waiting else next((i for i in waiting if lengths[i] == lengths[held]), None)
        if fit is None:
            break
        del waiting[fit]
        order.append(fit)
    return [*order, *waiting]
