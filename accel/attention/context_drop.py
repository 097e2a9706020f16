"""Context Drop (Lumina-Next, Zhuo et al., arXiv 2406.18583): fewer keys: those of the image are means over squares.

    out_i = Σ_c softmax_c(q_i·k̄_c/√d + log n_c) v̄_c,    k̄_c, v̄_c: mean over the n_c ≤ r² tokens of square c

beside the text's and reference pictures' own keys, which stay as they are. log n_c is ours (`weighted`): without it a square counts as
one token, so text gains weight by r². With it the answer is that of dense attention wherever keys and values are equal inside squares.

Time-aware: with t = 1 − sigma, (1 − t)·L of the L layers drop keys, all at pure noise and none at the picture. The paper does not say
which: `time_linear` the first ones, `last_first` the last; `all` is every layer at every time. A square at the edge of a grid that r does
not divide is smaller. Keys are pooled as attention gets them, already rotated, as in the released code; of clips, each frame by itself.

`rope_free`: with k_j = R(p_j)·κ_j, the square's key is R(p̄)·mean κ_j at its mean place p̄, in place of mean R(p_j)·κ_j, which wears fast
pairs of channels down by the mean of their turns. R is the table that the block was given; κ_j = R(p_j)⁻¹·k_j takes nothing from the
model. R(p̄) is read off the table too: the sum of R over the middle tokens of the square, at p̄ or half a token around it, is R(p̄) times a
positive number for every pair that turns by less than half a circle a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import input_error
from ...families.tokens import attention_spec
from ..cache.clock import StepClock
from .break_even import least_tokens
from .dispatch import AttentionCall, RunFacts, attach
from .heads import weighted_keys

__all__ = [
    "LAYER_RULES", "POOLS", "ContextDrop", "DropLog", "Turns", "attach_context_drop", "break_even", "dropped_layers", "pooled",
    "pooled_attention", "pooled_before_rotation",
]  # fmt: skip

LAYER_RULES = ("time_linear", "last_first", "all")
POOLS = ("mean", "rope_free")
ROTATED = ("Flux", "HunyuanVideo", "Qwen-Image", "Wan")  # families that give a rotary table to their blocks
SIDES = (1, 8)  # of a square, in tokens


def pooled(tokens: torch.Tensor, sides: tuple[int, ...], side: int) -> torch.Tensor:
    """Means of `tokens` (b, h, n, d), n a grid of `sides` = ((frames,) rows, columns), over squares: (b, h, squares, d)."""
    rows, columns = sides[-2:]
    grid = tokens.reshape(-1, 1, rows, columns, tokens.shape[-1])
    means = F.avg_pool3d(grid, (min(side, rows), min(side, columns), 1), ceil_mode=True, count_include_pad=False)
    return means.reshape(*tokens.shape[:2], -1, tokens.shape[-1])


@dataclass(frozen=True)
class Turns:
    """What of a rotary table pooling before rotation needs: inverse (b or 1, 1, n, d/2, 2, 2) of each token's rotation, middle (b or 1, 1,
    squares, d/2, 2, 2) of each square's mean place."""

    inverse: torch.Tensor
    middle: torch.Tensor

    @classmethod
    def of(cls, rotations: torch.Tensor, sides: tuple[int, ...], side: int) -> Turns:
        """rotations: (b or 1, 1, n, d/2, 2, 2) of the image's tokens."""
        table = rotations.float()
        return cls((table.transpose(-1, -2) / _squared(table)).contiguous(), middle_rotations(table, sides, side))


def pooled_before_rotation(keys: torch.Tensor, turns: Turns, sides: tuple[int, ...], side: int) -> torch.Tensor:
    """Means of what `keys` (b, h, n, d) were before they were rotated, rotated to the squares' mean places."""
    means = pooled(_turned(keys.float(), turns.inverse), sides, side)
    return _turned(means, turns.middle).to(keys.dtype)


def middle_rotations(table: torch.Tensor, sides: tuple[int, ...], side: int) -> torch.Tensor:
    """The rotation at each square's mean place, (b, 1, squares, d/2, 2, 2), of the size that the table's have."""
    grid = table.unflatten(2, (math.prod(sides[:-2]), *sides[-2:]))
    for axis in (3, 4):
        length = grid.shape[axis]
        spans = [(start, min(start + side, length) - 1) for start in range(0, length, side)]
        low, high = (torch.tensor([(first + last + more) // 2 for first, last in spans], device=table.device) for more in (0, 1))
        one, other = grid.index_select(axis, low), grid.index_select(axis, high)
        both = one + other
        grid = both * (_squared(one) / _squared(both)).sqrt()
    return grid.flatten(2, 4)


def _squared(table: torch.Tensor) -> torch.Tensor:
    """The determinant of each 2×2 matrix, its size squared, (…, 1, 1)."""
    return (table[..., 0, 0] * table[..., 1, 1] - table[..., 0, 1] * table[..., 1, 0])[..., None, None]


def _turned(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels of x (b, h, n, d) as pairs, each multiplied by its matrix."""
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).flatten(-2)


def square_counts(sides: tuple[int, ...], side: int, device: torch.device) -> torch.Tensor:
    """Tokens of each square, in the order of `pooled`."""
    down, across = (
        torch.tensor([min(side, length - start) for start in range(0, length, side)], device=device) for length in sides[-2:]
    )  # fmt: skip
    return (down[:, None] * across).flatten().repeat(math.prod(sides[:-2]))


def pooled_mask(mask: torch.Tensor, text: int, sides: tuple[int, ...], side: int) -> torch.Tensor:
    """A mask over keys, bool or added, for pooled keys: any of a square's tokens, or the log of the mean of what they are weighted by."""
    count = math.prod(sides)
    before, image, behind = mask.split([text, count, mask.shape[-1] - text - count], dim=-1)
    weights = (image.float() if mask.dtype == torch.bool else image.float().exp()).reshape(-1, 1, count, 1)
    means = pooled(weights, sides, side).reshape(*image.shape[:-1], -1)
    kept = means > 0 if mask.dtype == torch.bool else means.log().to(mask.dtype)
    return torch.cat((before, kept, behind), dim=-1)


def pooled_attention(
    call: AttentionCall, side: int, weighted: bool, by_channel: bool | None = None, turns: Turns | None = None
) -> torch.Tensor:
    """Attention of all queries over text, pooled image and extra keys, (b, h, n, d). turns: of the image, to pool before rotation.

    by_channel: see `weighted_keys`.
    """
    lengths = [call.text, math.prod(call.sides), call.extra]
    keys, values = ([*x.split(lengths, dim=2)] for x in (call.k, call.v))
    values[1] = pooled(values[1], call.sides, side)
    keys[1] = pooled(keys[1], call.sides, side) if turns is None else pooled_before_rotation(keys[1], turns, call.sides, side)
    k, v = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    mask = None if call.mask is None else pooled_mask(call.mask, call.text, call.sides, side)
    counts = square_counts(call.sides, side, k.device)
    if not weighted or call.text + call.extra == 0 and bool((counts == counts[0]).all()):
        return call.default(call.q, k, v, mask)  # a weight that all keys share falls out of the softmax
    bias = torch.cat((k.new_zeros(call.text), counts.log().to(k.dtype), k.new_zeros(call.extra)))
    return weighted_keys(call.default, call.q, k, v, bias, mask, by_channel)


def dropped_layers(rule: str, layers: int, sigma: float) -> range:
    """Numbers of the layers that drop keys at sigma."""
    if rule == "all":
        return range(layers)
    count = min(max(math.floor(sigma * layers + 0.5), 0), layers)
    return range(count) if rule == "time_linear" else range(layers - count, layers)


@torch.inference_mode()
def break_even(side: int, weighted: bool, heads: int, width: int, device: torch.device, dtype: torch.dtype, budget=0.5) -> int | None:
    """The least number of tokens of a square picture at which pooled keys are faster here; text of one token, so that weights are added."""

    def dropping(grid: int):
        def attention(q, k, v):
            text = [torch.cat((x[:, :, :1], x), dim=2) for x in (k, v)]
            call = AttentionCall(q, *text, None, 1, (grid, grid), 0, ("layer", 0), 0, 1.0, (), lambda q, k, v, mask: _plain(q, k, v, mask))
            return pooled_attention(call, side, weighted)

        return attention if side > 1 else None

    return least_tokens(dropping, heads, width, device, dtype, budget)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class DropLog:
    """What the last run did, for Attention Report; a node's output, filled while sampling.

    pairs: products of a query and a key in the attentions that dropped keys; dense: those they would have had; calls: dropped, left dense.
    """

    def __init__(self):
        self.runs = 0
        self.pairs = self.dense = 0
        self.calls = (0, 0)
        self.layers: dict[float, tuple[int, int]] = {}
        self.lines: list[str] = []

    def __deepcopy__(self, memo) -> DropLog:
        return self

    @property
    def share(self) -> float:
        """Pairs computed of those that dense attention has, in the attentions that dropped keys."""
        return self.pairs / self.dense if self.dense else 1.0

    def text(self) -> str:
        head = f"attention: {self.calls[0]} of {sum(self.calls)} with pooled keys, {self.share:.1%} of the pairs computed in those"
        rows = [f"sigma {sigma:.3f}: layers {low}-{high - 1}" if high > low else f"sigma {sigma:.3f}: none"
                for sigma, (low, high) in self.layers.items()]  # fmt: skip
        return "\n".join([head, *self.lines, *rows])


@dataclass(frozen=True)
class ContextDrop:
    """Settings. side: of a square in tokens, 0: √(tokens/base_tokens), rounded; layers: one of LAYER_RULES; start, end: shares of the run's
    steps; min_tokens: text among them, below which attention stays dense; 0 measures the break-even count of this machine; pool: one of
    POOLS."""

    log: DropLog
    where: str
    side: int = 2
    weighted: bool = True
    layers: str = "time_linear"
    start: float = 0.0
    end: float = 1.0
    min_tokens: int = 2048
    base_tokens: int = 4096
    pool: str = "mean"

    def check(self) -> None:
        """Raises: NodeInputError for a value outside its range."""
        if self.side != 0 and not SIDES[0] <= self.side <= SIDES[1]:
            raise input_error(self.where, "factor", self.side, "0 (from the size) or 1 to 8 tokens", "Enter 2.")
        for name, value, allowed in (("layers", self.layers, LAYER_RULES), ("pool", self.pool, POOLS)):
            if value not in allowed:
                raise input_error(self.where, name, value, ", ".join(allowed), "Choose one of these.")
        if not 0.0 <= self.start < self.end <= 1.0:
            raise input_error(self.where, "start_percent", (self.start, self.end), "0 ≤ start_percent < end_percent ≤ 1", "Enter 0 and 1.")
        for name, count, low in (("min_tokens", self.min_tokens, 0), ("base_tokens", self.base_tokens, 1)):
            if not low <= count <= 1000000:
                raise input_error(self.where, name, count, f"{low} to 1000000 tokens", "Enter 2048 and 4096.")

    def without_rotations(self, got: str) -> Exception:
        allowed = f"rope_free with {', '.join(ROTATED)} (Chroma is of the first)"
        return input_error(self.where, "pool", got, allowed, "Choose mean.")

    def open(self, facts: RunFacts) -> DropHandler:
        return DropHandler(self, facts)


class DropHandler:
    """One run."""

    def __init__(self, plan: ContextDrop, facts: RunFacts):
        self.plan, self.clock = plan, StepClock(facts.sigmas)
        self.order = {key: place for place, key in enumerate(facts.spec.blocks)}
        self.count = len(self.order) or facts.spec.layers
        self.least: int | None = plan.min_tokens or None
        self.measured = False
        self.found = DropLog()
        self.dropped = self.left = 0
        self.held: tuple[torch.Tensor, tuple, Turns] | None = None

    def active(self, sigma: float) -> bool:
        passed = self.clock.at(sigma).u / max(1, self.clock.steps)
        if not (self.plan.start <= passed and (passed < self.plan.end or self.plan.end == 1.0)):
            return False
        layers = dropped_layers(self.plan.layers, self.count, sigma)
        self.found.layers.setdefault(round(sigma, 6), (layers.start, layers.stop))
        return len(layers) > 0

    def attend(self, call: AttentionCall) -> torch.Tensor | None:
        number = self.order[call.layer] if self.order else call.layer[1]
        if number not in dropped_layers(self.plan.layers, self.count, call.sigma):
            return None
        image, tokens = math.prod(call.sides), call.q.shape[2]
        side = self.plan.side or max(1, round(math.sqrt(image / self.plan.base_tokens)))
        reason = "squares of one token" if side == 1 else self._too_small(call, tokens, min(side, SIDES[1]))
        if reason:
            self.left += 1
            self._say(f"dense: {reason}" if side == 1 else f"dense is faster here: {reason}")
            return None
        side = min(side, SIDES[1])
        turns = self._turns(call, side) if self.plan.pool == "rope_free" else None
        self.dropped += 1
        keys = tokens - image + math.prod(call.sides[:-2]) * math.prod(-(-length // side) for length in call.sides[-2:])
        self.found.pairs += tokens * keys * len(call.q)
        self.found.dense += tokens * tokens * len(call.q)
        return pooled_attention(call, side, self.plan.weighted, turns=turns)

    def _turns(self, call: AttentionCall, side: int) -> Turns:
        """Of the call's table; blocks of one model call share theirs, and a table that is held has its memory to itself."""
        table = call.rotations
        if table is None:
            raise self.plan.without_rotations(f"{call.layer[0]} {call.layer[1]} without its rotary table")
        held = self.held
        same = held is not None and held[0].data_ptr() == table.data_ptr() and held[0].shape == table.shape
        if not same or held[1] != (call.text, call.sides, side):
            image = table[:, :, call.text : call.text + math.prod(call.sides)]
            self.held = held = (table, (call.text, call.sides, side), Turns.of(image, call.sides, side))
        return held[2]

    def close(self) -> None:
        self.held = None
        if not self.dropped and not self.left:
            self._say("no attention was reached: the steps chosen leave none, or another patch took their place")
        log, found = self.plan.log, self.found
        log.pairs, log.dense, log.calls, log.layers, log.lines = (
            found.pairs, found.dense, (self.dropped, self.left), found.layers, found.lines,
        )  # fmt: skip
        log.runs += 1

    def _too_small(self, call: AttentionCall, tokens: int, side: int) -> str:
        if self.plan.min_tokens == 0 and not self.measured:
            self.measured = True
            heads, width = call.q.shape[1], call.q.shape[-1]
            self.least = break_even(side, self.plan.weighted, heads, width, call.q.device, call.q.dtype)
            self._say("break-even on this machine: " + ("above what was measured" if self.least is None else f"{self.least} tokens"))
        if self.least is None:
            return f"{tokens} tokens, and no size measured gains"
        return f"{tokens} tokens, below {self.least}" if tokens < self.least else ""

    def _say(self, line: str) -> None:
        if line not in self.found.lines:
            self.found.lines.append(line)


def attach_context_drop(model: Any, plan: ContextDrop) -> Any:
    """A clone of MODEL `model` that drops image keys.

    Raises: NodeInputError for settings out of range, a family whose attention is not known, or rope_free on one that keeps its rotations.
    """
    plan.check()
    if plan.pool == "rope_free":
        family = attention_spec(model.get_model_object("diffusion_model"), plan.where).family
        if family not in ROTATED:
            raise plan.without_rotations(f"rope_free on {family}")
    return attach(model, plan, plan.where)
