"""Re-ttention, attention statistical reshape (Chen et al., arXiv 2505.22918): sparse attention that keeps the mass dense attention has.

With S_i the keys a query i sees and s_ij its scores, every `period` steps a dense step measures

    ρ_i = Σ_{l∈S_i} exp s_il / Σ_l exp s_il = exp(lse_S − lse_full)              (eq. 8)
    R   = A V − ρ · A^S V,   what the keys left out gave                         (eq. 10)

and the steps between give  O = ρ_t · A^S V + R  (eq. 9), ρ_t = min(ρ + λ·(t − t_refresh − 1), ρ_max).

Ours, form "centred": both sides with (1 − ρ) · v̄ more, v̄ the mean of the values of now, so that what the unseen gave moves with them:

    R = A V − ρ · A^S V − (1 − ρ) · v̄,    O = ρ_t · A^S V + (1 − ρ_t) · v̄ + R

A softmax's weights add up to one, so values that all grow by c move dense attention by c. The published form moves by ρ·c, this one by c.

Also ours: the step is read off sigma, so that no counter runs on from one picture to the next; all is kept per layer and per condition, and
is taken apart and joined as the host batches conditions; sums stay logarithms, which no precision overflows; ρ is held below ρ_max; R
stands before the output projection, the only place an attention override sees; S is made of blocks (grouped.py), so that sparse steps leave
their work out. A step without its statistics is a dense one that measures: a size, a window or a condition that came new, a dense step
that a cache around us answered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import input_error
from ...kernels.attention_lse import attention_with_lse
from ...kernels.block_sparse_attention import BlockLayout, block_sparse_attention
from ..cache.clock import StepClock
from .break_even import least_tokens
from .dispatch import AttentionCall, RunFacts, attach
from .grouped import GroupRule, group_layout
from .statistics import Kept, Storage

__all__ = ["FORMS", "PATTERNS", "Rettention", "RettentionLog", "attach_rettention", "layout_for"]

PATTERNS = ("grat_block", "grat_cross", "band_2d", "band_1d", "frame_band")
FORMS = ("centred", "published")
FRAMES = 4  # latent frames of a group in a clip, as GRAT has them


def layout_for(pattern: str, keep: float, sides: tuple[int, ...], before: int = 0, behind: int = 0) -> BlockLayout:
    """Blocks in which an image token away from the edges sees about `keep` of the image; text sees and is seen by all.

    grat_block   squares and their 8 neighbours, in a clip also those before and after
    grat_cross   squares of 2 tokens a side and more in the same rows or columns; in a clip of 4 and more, also in the same frames
    band_2d      squares of 3/5 the side and their 24 neighbours: a rounder window, with more and smaller blocks
    band_1d      runs of tokens in reading order and the runs beside them: the paper's band for pictures
    frame_band   the same within a frame, and the same places of every frame: the paper's band for clips
    """
    frames, rows, columns = sides if len(sides) > 2 else (1, *sides)
    place = rows * columns
    if keep >= 1.0:
        return group_layout(sides, GroupRule("block", (frames, rows, columns), 0), before, behind)
    if pattern in ("band_1d", "frame_band"):
        joined = frames if pattern == "frame_band" else 1
        run = max(1, round(keep * frames * place / joined / 3))
        shape = (frames, 1, place) if pattern == "frame_band" else (1, 1, frames * place)
        return group_layout(shape, GroupRule("block", (joined, 1, run), 1), before, behind)
    deep = min(FRAMES, frames)
    if pattern == "grat_cross":  # groups of fewer tokens take longer to gather than to compute; of a clip each of three planes has a share
        planes, least = (3, 4) if len(sides) > 2 else (2, 2)
        deep = max(1, round(keep * frames / planes))
        side = max(least, round(2 * keep / planes * place / (rows + columns)))
        return group_layout(sides, GroupRule("cross", (deep, side, side), 0), before, behind)
    radius = 2 if pattern == "band_2d" else 1
    seen_frames = min(frames, (2 * radius + 1) * deep)
    side = max(1, round(math.sqrt(keep * frames * place / seen_frames) / (2 * radius + 1)))
    return group_layout(sides, GroupRule("block", (deep, side, side), radius), before, behind)


class RettentionLog:
    """What the last run did, for Attention Report; a node's output, filled while sampling.

    ratios: step → layer → (mean ρ over queries, heads and conditions, how many conditions). calls: attentions made sparse, dense with
    statistics, dense.
    """

    def __init__(self):
        self.runs = 0
        self.calls = (0, 0, 0)
        self.share = 1.0
        self.held = 0  # bytes, most at any time
        self.ratios: dict[float, dict[str, tuple[float, int]]] = {}
        self.lines: list[str] = []

    def __deepcopy__(self, memo) -> RettentionLog:
        return self

    def add(self, u: float, layer: str, ratio: float, conditions: int) -> None:
        """Another call of a layer at step u; the host may make one for all conditions or one for each."""
        before, count = self.ratios.setdefault(u, {}).get(layer, (0.0, 0))
        total = count + conditions
        self.ratios[u][layer] = ((before * count + ratio * conditions) / total, total)

    def text(self) -> str:
        sparse, measured, dense = self.calls
        rows = [
            f"Re-ttention: {sparse} of {sum(self.calls)} attentions sparse, {self.share:.1%} of the pairs computed in those; "
            f"{measured} measured, {dense} dense; {self.held / 2**20:.1f} MiB of statistics",
            *self.lines,
        ]
        for u, layers in sorted(self.ratios.items()):
            mean = sum(ratio for ratio, _ in layers.values()) / len(layers)
            each = ", ".join(f"{layer} {ratio:.3f}" for layer, (ratio, _) in layers.items())
            rows.append(f"step {u:g}: mean mass seen {mean:.4f}; {each}")
        return "\n".join(rows)


@dataclass(frozen=True)
class Rettention:
    """Settings of a run. keep: share of the image a token sees; warmup: steps left dense; period: steps from one dense step to the next, 1
    makes all dense and measures; ramp: λ; min_tokens: text among them, below which attention stays dense; 0 measures this machine's
    break-even count; form: one of FORMS."""

    log: RettentionLog
    where: str
    keep: float = 0.03125
    pattern: str = "grat_block"
    warmup: int = 5
    period: int = 5
    ramp: float = 0.04
    rho_max: float = 1.0
    use_ratio: bool = True
    use_residual: bool = True
    storage: Storage = field(default_factory=Storage)
    min_tokens: int = 2048
    form: str = "centred"

    def check(self) -> None:
        """Raises: NodeInputError for a value outside its range."""
        for name, value, allowed in (("pattern", self.pattern, PATTERNS), ("form", self.form, FORMS)):
            if value not in allowed:
                raise input_error(self.where, name, value, ", ".join(allowed), "Choose one of these.")
        ranges = {
            "keep": (self.keep, 0.005, 1.0, "0.03125"), "warmup_steps": (self.warmup, 0, 100, "5"), "period": (self.period, 1, 50, "5"),
            "ramp": (self.ramp, 0.0, 0.2, "0.04"), "rho_max": (self.rho_max, 0.5, 2.0, "1"),
            "min_tokens": (self.min_tokens, 0, 1000000, "2048"),
        }  # fmt: skip
        for name, (value, low, high, remedy) in ranges.items():
            if not low <= value <= high:
                raise input_error(self.where, name, value, f"{low} to {high}", f"Enter {remedy}.")
        self.storage.check(self.where)

    def open(self, facts: RunFacts) -> RettentionHandler:
        return RettentionHandler(self, facts)


class RettentionHandler:
    """One run."""

    def __init__(self, plan: Rettention, facts: RunFacts):
        self.plan, self.clock, self.layers = plan, StepClock(facts.sigmas), facts.spec.layers
        self.kept: dict[tuple, Kept] = {}
        self.layouts: dict[tuple, BlockLayout] = {}
        self.found = RettentionLog()
        self.sparse = self.measured = self.dense = 0
        self.least: float | None = None

    def active(self, sigma: float) -> bool:
        moment = self.clock.at(sigma)
        return not moment.foreign and moment.u >= self.plan.warmup

    def attend(self, call: AttentionCall) -> torch.Tensor | None:
        layout = self._layout(call)
        reason = "these settings see every key" if layout.dense else ""
        reason = reason or self._too_small(call)
        if reason:
            self.dense += 1
            return self._say(f"dense: {reason}")
        u = self.clock.at(call.sigma).u
        names = [(call.layer, call.place, key, call.window) for key in call.keys]
        names = names if len(call.q) % len(names) == 0 else [(call.layer, call.place, call.keys, call.window)]
        rows = len(call.q) // len(names)
        shape = torch.Size((rows, *call.q.shape[1:]))
        held = [self.kept.get(name) for name in names]
        if self._due(u, held, shape):
            return self._measure(call, layout, names, u)
        return self._corrected(call, layout, held, u)

    def _due(self, u: float, held: list[Kept | None], shape: torch.Size) -> bool:
        """Whether this step measures: by the schedule, or because what is held is missing, of another size or not of this period.

        A step that a cache around us answered, or an area that came new, has measured nothing; the next one makes up for it.
        """
        plan, step = self.plan, math.floor(u)
        first = step - (step - plan.warmup) % plan.period  # of this period
        if step == first or not plan.use_ratio and not plan.use_residual:
            return step == first
        return any(kept is None or kept.shape != shape or not first <= kept.step <= step for kept in held)

    def close(self) -> None:
        if not self.sparse and not self.measured and not self.dense:
            self._say("no attention was reached: the warm-up holds every step, or another patch took their place")
        log, found = self.plan.log, self.found
        log.calls, log.share, log.held = (self.sparse, self.measured, self.dense), found.share, found.held
        log.ratios, log.lines = found.ratios, found.lines
        log.runs += 1
        self.kept.clear()
        self.layouts.clear()

    def _measure(self, call: AttentionCall, layout: BlockLayout, names: list[tuple], u: float) -> torch.Tensor:
        """Dense attention as the model has it, and what the layout leaves out of it."""
        plan = self.plan
        full = call.default(call.q, call.k, call.v)
        seen, lse = block_sparse_attention(call.q, call.k, call.v, layout, call.mask, with_lse=True)
        _, full_lse = attention_with_lse(call.q, call.k, call.v, call.mask)
        log_ratio = (lse - full_lse).clamp_(max=0.0)  # (b, h, n)
        self.measured += 1
        layer = "{} {}".format(call.layer[0].removesuffix("_block"), call.layer[1]) + ("+" if call.place else "")
        self.found.add(u, layer, float(log_ratio.exp().mean()), len(names))
        if plan.period == 1:
            return full
        self._check_memory(self.layers * plan.storage.bytes_of(call.q, plan.use_ratio, plan.use_residual), call)
        reshaped = _reshaped(seen, log_ratio.exp() if plan.use_ratio else None, call.v if plan.form == "centred" else None)
        residual = full.float() - reshaped if plan.use_residual else None
        rows = len(call.q) // len(names)
        for i, name in enumerate(names):
            part = slice(i * rows, (i + 1) * rows)
            self.kept[name] = Kept.of(
                math.floor(u), log_ratio[part] if plan.use_ratio else None, None if residual is None else residual[part],
                call.q[part], plan.storage,
            )  # fmt: skip
        held = sum(kept.bytes for kept in self.kept.values())
        self._check_memory(held, call)  # conditions that come in calls of their own
        self.found.held = max(self.found.held, held)
        return full

    def _corrected(self, call: AttentionCall, layout: BlockLayout, held: list[Kept | None], u: float) -> torch.Tensor:
        """(b, h, n, d): ρ · A^S V + R, in fp32 until the end."""
        plan = self.plan
        out = block_sparse_attention(call.q, call.k, call.v, layout, call.mask)
        self.sparse += 1
        self.found.share = layout.share
        ratio = None
        if plan.use_ratio:
            parts = [kept.ratio(out.device, plan.ramp * max(0.0, u - kept.step - 1.0), plan.rho_max) for kept in held]
            ratio = torch.cat(parts)
        corrected = _reshaped(out, ratio, call.v if plan.form == "centred" else None)
        if plan.use_residual:
            for part, kept in zip(corrected.chunk(len(held)), held):
                part += kept.residual(out.device)
        return corrected.to(out.dtype)

    def _layout(self, call: AttentionCall) -> BlockLayout:
        shape = (call.sides, call.text, call.extra)
        if shape not in self.layouts:
            self.layouts[shape] = layout_for(self.plan.pattern, self.plan.keep, *shape)
        return self.layouts[shape]

    def _too_small(self, call: AttentionCall) -> str:
        tokens, plan = call.q.shape[2], self.plan
        if self.least is None:
            self.least = plan.min_tokens or self._break_even(call)
        return f"{tokens} tokens, below {self.least:g}" if tokens < self.least else ""

    def _break_even(self, call: AttentionCall) -> float:
        """Tokens of a square picture from which a sparse step is faster on this machine; inf where no size was."""

        def sparse(side: int):
            layout = layout_for(self.plan.pattern, self.plan.keep, (side, side))
            return None if layout.dense else lambda q, k, v: block_sparse_attention(q, k, v, layout)

        least = least_tokens(sparse, call.q.shape[1], call.q.shape[-1], call.q.device, call.q.dtype)
        self._say(f"break-even on this machine: {'above what was measured' if least is None else f'{least} tokens'}")
        return math.inf if least is None else least

    def _check_memory(self, need: int, call: AttentionCall) -> None:
        storage = self.plan.storage
        if need > storage.cap:
            allowed = f"at least {need / 2**30:.3g} GiB for {self.layers} attentions of {call.q.shape[2]} tokens with these conditions"
            remedy = "Raise memory_gib, or choose residual_dtype fp8_e4m3, or use_residual off."
            raise input_error(self.plan.where, "memory_gib", f"{storage.cap / 2**30:.3g}", allowed, remedy)

    def _say(self, line: str) -> None:
        if line not in self.found.lines:
            self.found.lines.append(line)


def _reshaped(out: torch.Tensor, ratio: torch.Tensor | None, values: torch.Tensor | None) -> torch.Tensor:
    """ρ · out, and (1 − ρ) · v̄ of the values (b, h, n, d) where they are given: a tensor (b, h, n, d) of its own in fp32.

    A query that sees no key has ratio 0, and what a softmax over nothing gave is left out.
    """
    if ratio is None:
        return out.to(torch.float32, copy=True)
    ratio = ratio[..., None]
    scaled = (out.float() * ratio).masked_fill_(ratio <= 0, 0.0)
    return scaled if values is None else scaled.addcmul_(1.0 - ratio, values.float().mean(dim=2, keepdim=True))


def attach_rettention(model: Any, plan: Rettention) -> Any:
    """A clone of MODEL `model` with Re-ttention.

    Raises: NodeInputError for settings out of range, or a family whose attention is not known.
    """
    plan.check()
    return attach(model, plan, plan.where)
