"""GRAT, grouping first, attending smartly (Ren et al., arXiv 2505.14687): tokens of a picture form groups, whose queries share their keys.

A grid (t, h, w) is cut into groups of (g_t, g_h, g_w) tokens. A group sees

    block    groups at most `radius` away along every axis
    cross    groups in the same row or the same column; of a clip, groups with the same time, row or column: three planes
    both     the union of the two

and all text; text, and tokens of reference pictures, see and are seen by all. The softmax is over what is seen, nothing is renormalised.

Ours: a grid that groups do not divide ends in smaller groups, exactly, where the released code refuses; keys are read in place, so that no
layer permutes its tokens; attention is left dense where it would not be slower, and the report says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import input_error
from ...families.arch import arch_spec
from ...families.blocks import parse_blocks
from ...kernels.block_layout import BlockLayout, Term
from ...kernels.block_sparse_attention import block_sparse_attention
from ..cache.clock import StepClock
from .break_even import least_tokens
from .dispatch import AttentionCall, RunFacts, attach

__all__ = [
    "PATTERNS", "AttentionLog", "GroupedAttention", "GroupRule", "attach_grouped", "break_even", "group_layout",
    "key_map", "summary",
]  # fmt: skip

PATTERNS = ("block", "cross", "block_and_cross")


@dataclass(frozen=True)
class GroupRule:
    """pattern: one of PATTERNS; group: tokens of a group along time, rows, columns; radius: in groups."""

    pattern: str = "block"
    group: tuple[int, int, int] = (4, 16, 16)
    radius: int = 1

    def check(self, where: str) -> None:
        """Raises: NodeInputError for a value outside its range."""
        if self.pattern not in PATTERNS:
            raise input_error(where, "pattern", self.pattern, ", ".join(PATTERNS), "Choose one of these.")
        for name, side, low, high in zip(("group_frames", "group_height", "group_width"), self.group, (1, 2, 2), (16, 64, 64)):
            if not low <= side <= high:
                raise input_error(where, name, side, f"{low} to {high} tokens", "Enter 4 for frames, 16 for height and width.")
        if not 0 <= self.radius <= 64:
            raise input_error(where, "radius", self.radius, "0 to 64 groups", "Enter 1.")

    def sees(self, places: torch.Tensor, axes: tuple[bool, ...]) -> torch.Tensor:
        """Which groups see which, (g, g), for groups at `places` (g, 3). axes: those the grid has; a picture has no time."""
        near = torch.ones(len(places), len(places), dtype=torch.bool)
        line = torch.zeros_like(near)
        for along, real in zip(places.unbind(1), axes):
            near &= (along[:, None] - along).abs() <= self.radius
            if real:
                line |= along[:, None] == along
        return near if self.pattern == "block" else line if self.pattern == "cross" else near | line


def group_layout(sides: tuple[int, ...], rule: GroupRule, before: int = 0, behind: int = 0) -> BlockLayout:
    """The blocks of a grid of `sides` = ((frames,) rows, columns) with `before` text tokens in front and `behind` extra tokens after it."""
    clip = len(sides) > 2
    sides = sides if clip else (1, *sides)
    group = rule.group if clip else (1, *rule.group[1:])
    counts = [-(-side // length) for side, length in zip(sides, group)]
    places = list(itertools.product(*(range(count) for count in counts)))
    number = torch.arange(math.prod(sides)).view(sides) + before
    blocks = [number[tuple(slice(p * g, (p + 1) * g) for p, g in zip(place, group))].flatten() for place in places]
    seen = rule.sees(torch.tensor(places), (clip, True, True))
    kept = [tuple(row.nonzero().flatten().tolist()) for row in seen]
    total = math.prod(sides) + before + behind
    shared = [tokens for tokens in (torch.arange(before), torch.arange(total - behind, total)) if len(tokens)]
    axes = [axis for axis in range(3) if clip or axis > 0]
    terms = _cross_terms(blocks, places, axes, before, shared) if rule.pattern == "cross" else ()
    return _with_shared(blocks, kept, shared, terms)


def _with_shared(
    blocks: list[torch.Tensor], kept: list[tuple[int, ...]], shared: list[torch.Tensor], terms: tuple[Term, ...] = ()
) -> BlockLayout:
    """A layout with blocks that see and are seen by all."""
    last = len(blocks) + len(shared)
    rows = [(*row, *range(len(blocks), last)) for row in kept] + [tuple(range(last))] * len(shared)
    return BlockLayout((*blocks, *shared), tuple(rows), terms)


def _cross_terms(
    groups: list[torch.Tensor], places: list[tuple[int, ...]], axes: list[int], before: int, shared: list[torch.Tensor]
) -> tuple[Term, ...]:
    """Groups that are equal along some axis are all those that are equal along one, less those along two, and those along three.

    So a row sees itself, a column sees itself, and a group, which both have seen, is taken away once. What all see is in the first term.
    """
    terms: list[Term] = []
    for size in range(1, len(axes) + 1):
        for equal in itertools.combinations(axes, size):
            lines: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for tokens, place in zip(groups, places):
                lines.setdefault(tuple(place[axis] for axis in equal), []).append(tokens)
            blocks = [torch.cat(tokens).sort().values for tokens in lines.values()]
            kept = [(i,) for i in range(len(blocks))]
            if not terms:
                terms.append(Term(1, 0, _with_shared(blocks, kept, shared)))
            else:
                terms.append(Term((-1) ** (size + 1), before, BlockLayout(tuple(tokens - before for tokens in blocks), tuple(kept))))
    return tuple(terms)


def summary(sides: tuple[int, ...], rule: GroupRule, text: int) -> str:
    """Keys a token sees and the share of pairs, in words; "ideal" counts multiplications of the attention alone."""
    layout = group_layout(sides, rule, text)
    keys = layout.keys[:-1] if text else layout.keys
    mean = sum(length * seen for length, seen in zip(layout.lengths, keys)) / math.prod(sides)
    grid = "×".join(map(str, sides))
    return (
        f"{rule.pattern}: {grid} tokens and {text} of text\n"
        f"keys an image token sees: {min(keys)} to {max(keys)}, mean {mean:.1f}, of {layout.tokens}\n"
        f"sparsity {1.0 - layout.share:.2%}; attention ideally {1.0 / layout.share:.2f}× faster"
    )


def key_map(sides: tuple[int, ...], rule: GroupRule, text: int, at: tuple[float, float]) -> torch.Tensor:
    """What the token at shares (down, across) of the picture sees, 1 or 0: (1, rows, columns, 3); of a clip in its middle frame."""
    layout = group_layout(sides, rule, text)
    rows, columns = sides[-2:]
    first = math.prod(sides[:-2]) // 2 * rows * columns
    row, column = (min(int(share * side), side - 1) for share, side in zip(at, (rows, columns)))
    token = text + first + row * columns + column
    owner = next(i for i, block in enumerate(layout.blocks) if bool((block == token).any()))
    seen = torch.zeros(layout.tokens)
    seen[torch.cat([layout.blocks[i] for i in layout.kept[owner]])] = 1.0
    shown = seen[text + first : text + first + rows * columns].view(1, rows, columns, 1)
    return shown.expand(-1, -1, -1, 3).contiguous()


def break_even(rule: GroupRule, heads: int, width: int, device: torch.device, dtype: torch.dtype, budget: float = 0.5) -> int | None:
    """The least number of tokens of a square picture at which this rule is faster than dense attention here; see `least_tokens`."""

    def grouped(side: int) -> Callable[..., torch.Tensor] | None:
        layout = group_layout((side, side), rule)
        return None if layout.dense else lambda q, k, v: block_sparse_attention(q, k, v, layout)

    return least_tokens(grouped, heads, width, device, dtype, budget)


class AttentionLog:
    """What the last run did, for the report; a node's output, filled while sampling."""

    def __init__(self):
        self.lines: list[str] = []
        self.sparse = self.dense = 0
        self.share = 1.0
        self.runs = 0

    def __deepcopy__(self, memo) -> AttentionLog:
        return self

    def text(self) -> str:
        total = self.sparse + self.dense
        head = f"attention: {self.sparse} of {total} grouped, {self.share:.1%} of the pairs computed in those"
        return "\n".join([head, *self.lines])


@dataclass(frozen=True)
class GroupedAttention:
    """Settings of a run. start, end: shares of the run's steps; blocks: "all" or ranges; min_tokens: text among them, below which attention
    stays dense; 0 measures the break-even count of this machine."""

    rule: GroupRule
    log: AttentionLog
    where: str
    start: float = 0.0
    end: float = 1.0
    blocks: str = "all"
    min_tokens: int = 8192

    def open(self, facts: RunFacts) -> GroupedHandler:
        return GroupedHandler(self, facts)


class GroupedHandler:
    """One run."""

    def __init__(self, plan: GroupedAttention, facts: RunFacts):
        self.plan = plan
        self.clock = StepClock(facts.sigmas)
        self.blocks = _chosen(plan.blocks, facts.transformer, plan.where)
        self.sparse = self.dense = 0
        self.lines: list[str] = []
        self.share = 1.0
        self.least: int | None = plan.min_tokens or None
        self.measured = False
        self.layouts: dict[tuple, BlockLayout] = {}

    def active(self, sigma: float) -> bool:
        passed = self.clock.at(sigma).u / max(1, self.clock.steps)
        return self.plan.start <= passed and (passed < self.plan.end or self.plan.end == 1.0)

    def attend(self, call: AttentionCall) -> torch.Tensor | None:
        if self.blocks is not None and call.layer not in self.blocks:
            return None
        tokens = call.q.shape[2]
        shape = (call.sides, self.plan.rule, call.text, call.extra)
        layout = self.layouts.get(shape)
        if layout is None:
            layout = self.layouts[shape] = group_layout(*shape)
        reason = "these settings see every key" if layout.dense else self._too_small(call, tokens)
        if reason:
            self.dense += 1
            self._say(f"dense is faster here: {reason}" if not layout.dense else f"dense: {reason}")
            return None
        self.sparse += 1
        self.share = layout.share
        return block_sparse_attention(call.q, call.k, call.v, layout, call.mask)

    def close(self) -> None:
        log = self.plan.log
        log.sparse, log.dense, log.share, log.lines = self.sparse, self.dense, self.share, self.lines
        log.runs += 1
        self.layouts.clear()
        if not self.sparse and not self.dense:
            self._say("no attention was reached: the steps or blocks chosen leave none, or another patch took their place")

    def _too_small(self, call: AttentionCall, tokens: int) -> str:
        if self.plan.min_tokens == 0 and not self.measured:
            self.measured = True
            self.least = break_even(self.plan.rule, call.q.shape[1], call.q.shape[-1], call.q.device, call.q.dtype)
            found = "above what was measured" if self.least is None else f"{self.least} tokens"
            self._say(f"break-even on this machine: {found}")
        if self.least is None:
            return f"{tokens} tokens, and no size measured gains"
        return f"{tokens} tokens, below {self.least}" if tokens < self.least else ""

    def _say(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)


def _chosen(blocks: str, transformer: Any, where: str) -> frozenset | None:
    """Keys of the named blocks; None for all."""
    if blocks.strip() in ("", "all"):
        return None
    arch = arch_spec(transformer)
    if arch is None:
        raise input_error(where, "blocks", blocks, "all: this family has no named blocks", "Enter all.")
    return frozenset(parse_blocks(blocks, arch.layout, where))


def attach_grouped(model: Any, plan: GroupedAttention) -> Any:
    """A clone of MODEL `model` with grouped attention.

    Raises: NodeInputError for settings out of range, blocks the model does not have, or a family whose attention is not known.
    """
    where = plan.where
    plan.rule.check(where)
    if not 0.0 <= plan.start < plan.end <= 1.0:
        raise input_error(where, "start_percent", (plan.start, plan.end), "0 ≤ start_percent < end_percent ≤ 1", "Enter 0 and 1.")
    _chosen(plan.blocks, model.get_model_object("diffusion_model"), where)
    return attach(model, plan, where)
