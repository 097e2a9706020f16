"""One sampling run of RAS: which step a visit belongs to, which tokens it computes, and what is kept for those it leaves out.

"Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389. A visit is one evaluation of the guided model (PREDICT_NOISE).
Its phase and its tokens are decided once for all its conditions; each condition is merged before guidance, computed tokens as they came,
the others with their own last velocity. After the visit the guided velocity says which tokens the next step takes.

What we do differently: the step is read off sigma, so midpoint and Heun evaluations belong to their step and share its tokens; a step
that a cache around us skips changes nothing, and a reset that falls on it is made up for at the next one; a condition without history is
computed whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...families.tokens import TokenSpec
from ..cache.clock import StepClock
from .drift import Drift
from .grid import TokenGrid
from .history import VelocityHistory
from .hooks import PartialCall, Unfit
from .kv_cache import KVStore
from .plan import RegionPlan
from .report import RegionRecord, RegionVisit
from .schedule import drop_counts
from .select import choose, focus_metric, scores

__all__ = ["RegionRun", "RunShape"]

Go = Callable[["PartialCall | None"], torch.Tensor]


@dataclass(frozen=True)
class RunShape:
    """What a sampling starts with. noise: (b, c, *shape); seed: of the run; denoise_mask: as the sampler node got it, or None."""

    noise: torch.Size
    sigmas: tuple[float, ...]
    seed: int
    denoise_mask: torch.Tensor | None = None


class RegionRun:
    """State of one run, on the device of the model; `close` drops all of it but the record."""

    def __init__(self, plan: RegionPlan, spec: TokenSpec, shape: RunShape, where: str):
        self.plan, self.spec, self.where = plan, spec, where
        self.batch, self.seed = shape.noise[0], shape.seed
        self.grid = TokenGrid.of(shape.noise[2:], spec.patch, where)
        self.grid.cells_of(plan.cell, where)
        self.clock = StepClock(shape.sigmas)
        self.drops = drop_counts(
            self.grid.count, self.clock.steps, plan.ratio, plan.start, plan.end, plan.resets, plan.slope, plan.period
        )  # fmt: skip
        if plan.cell > 1:
            self.drops = [drop - drop % plan.cell**2 for drop in self.drops]
        self.always, self.never = self._masks(shape.denoise_mask)
        self.store = KVStore(plan.kv, spec.layers, where) if plan.kv.mode == "full" and self.enabled else None
        self.history: dict[Hashable, VelocityHistory] = {}
        self.record = RegionRecord(plan.line(), spec.family, self.grid.sides, self.grid.patch, self.clock.steps)
        self.step, self.phase, self.reason = -1, "dense", ""
        self.index: torch.Tensor | None = None  # (b, a) of this step
        self.active: torch.Tensor | None = None  # (b, n), the same as a mask
        self.metric: torch.Tensor | None = None
        self.drift = Drift(self.grid) if plan.metric == "change" else None
        self.left = torch.zeros(self.batch, self.grid.count)
        self.inside = self.visiting = False
        self._served = self._went_dense = False
        self._owed_reset = self._counted = False
        self._evaluations: dict[int, int] = {}
        self._two_a_step = False

    @property
    def enabled(self) -> bool:
        """False where the settings leave no token out at any step: then nothing is kept."""
        return any(self.drops)

    def _masks(self, denoise_mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(always, never) computed tokens (b, n). Of an inpainting mask: what lies wholly outside is never, what it cuts always."""
        always = never = None
        if self.plan.always is not None:
            cells = self.grid.from_mask(self.plan.always, self.batch, self.where, "region_mask")
            always = (self.grid.pool(cells) >= 0.5).expand(self.batch, -1)
        if denoise_mask is not None:
            flat = denoise_mask.reshape(-1, *denoise_mask.shape[-2:])
            if flat.shape[0] not in (1, self.batch):
                return always, never
            cells = self.grid.from_mask(flat, self.batch, self.where, "noise_mask")
            low, high = self.grid.pool(cells, "min"), self.grid.pool(cells, "max")
            never = (high <= 0.0).expand(self.batch, -1)
            cut = ((low < 1.0) & (high > 0.0)).expand(self.batch, -1)
            always = cut if always is None else always | cut
        return always, never

    # A visit

    def begin(self, sigma: float) -> None:
        """Open the visit: its step, its phase and, at a new step, its tokens."""
        self._served = self._went_dense = False
        self.visiting = True
        self._mark = time.perf_counter()
        moment = self.clock.at(sigma)
        step = self._step_of(moment.u)
        if moment.foreign or sigma == 0.0:
            self.step, self.phase, self.reason = step, "dense", "sigma 0" if sigma == 0.0 else "sigma outside the schedule"
            return
        if step == self.step and self.reason:
            return
        self.step, self._counted = step, False
        count = self.drops[step] if step < len(self.drops) else 0
        self.phase, self.reason = self._phase(step, count)
        if self.phase == "active":
            self._choose(count, sigma)

    def _step_of(self, u: float) -> int:
        """The step an evaluation at u belongs to. Solvers that evaluate each sigma twice (Heun) start a step with the second one."""
        near = round(u)
        if abs(u - near) > 1e-6:
            return int(u)
        count = self._evaluations[near] = self._evaluations.get(near, 0) + 1
        self._two_a_step |= count == 2
        ends_step = self._two_a_step and count == 1 and near > 0
        return min(near - ends_step, max(self.clock.steps - 1, 0))

    def _phase(self, step: int, count: int) -> tuple[str, str]:
        if not self.enabled:
            return "dense", "ratio 1"
        if count == 0:
            if step in self.plan.resets and step >= self.plan.start:
                return "dense", "reset"
            return "dense", "start" if step < self.plan.start else "end" if step >= self.plan.end else "ratio 1"
        if self._owed_reset:
            return "dense", "reset of a skipped step"
        if (self.metric if self.drift is None else self.drift.rate) is None or not self.history:
            return "dense", "no history"
        return "active", "part"

    def _choose(self, count: int, sigma: float) -> None:
        m = self.metric if self.drift is None else self.drift.expected(sigma)
        if self.plan.metric == "random":
            m = focus_metric(m, self.grid, "random", self.seed + self.step)
        self.left = self.left.to(m.device)
        score = scores(m, self.left, self.plan.rule, self.plan.starvation)
        score = self.grid.mean_of_cells(score, self.plan.cell)
        masks = (None if mask is None else mask.to(m.device) for mask in (self.always, self.never))
        self.index = choose(score, count, self.plan.rule, self.plan.high_ratio, *masks)
        self.active = torch.zeros_like(score, dtype=torch.bool).scatter_(1, self.index, True)

    def finish(self, x: torch.Tensor, denoised: torch.Tensor, sigma: float) -> None:
        """Close the visit: the guided velocity chooses the next tokens; what was left out counts once a step."""
        self.visiting = False
        seconds = time.perf_counter() - self._mark
        if not self._served:  # a cache around us answered
            self._owed_reset |= self.reason.startswith("reset")
            self.record.visits.append(RegionVisit(self.step, sigma, "skipped", 0, "answered by a cache", seconds))
            return
        partial = self.phase == "active" and not self._went_dense
        if not partial and self.phase == "dense":
            self._owed_reset = False
        tokens = self.index.shape[1] if partial else self.grid.count
        reason = self.reason if partial or self.phase == "dense" else "a condition could not be made in part"
        self.record.visits.append(RegionVisit(self.step, sigma, "active" if partial else "dense", tokens, reason, seconds))
        if self.enabled and sigma != 0.0:
            v = (x.float() - denoised.float()) / sigma
            if self.drift is not None:
                self.drift.update(v, sigma, self.active if partial else None)
            else:
                self.metric = v if self.plan.metric == "random" else focus_metric(v, self.grid, self.plan.metric)
        if partial and not self._counted:
            self._counted = True
            self.left = self.left + (~self.active).float()
            self.record.masks.append((self.step, self.active.cpu()))

    # A model call

    def call(self, x: torch.Tensor, sigma: float, keys: Sequence[Hashable], go: Go) -> torch.Tensor:
        """Make one model call of this visit. go(None) makes it untouched, go(partial) with hooks."""
        self._served = True
        if not self.enabled or sigma == 0.0 or not self.visiting:
            return go(None)
        if self.phase == "active":
            if all(key in self.history and (self.store is None or self.store.has(key)) for key in keys):
                out = self._partial(x, sigma, keys, go)
                if out is not None:
                    return out
            else:
                self.record.note("a condition without history was computed whole")
            self._went_dense = True
        out = self._dense(sigma, keys, go)
        v = (x.float() - out.float()) / sigma
        for key, part in zip(keys, v.chunk(len(keys))):
            self.history.setdefault(key, VelocityHistory(self.plan.order)).update(part, sigma, None)
        return out

    def _dense(self, sigma: float, keys: Sequence[Hashable], go: Go) -> torch.Tensor:
        """A whole call; keys and values are kept where the next executed step may leave tokens out."""
        ahead = self.drops[self.step : self.step + 2]
        if self.store is None or not any(ahead):
            return go(None)
        try:
            out = go(PartialCall(self.spec, self.grid.count, keys, None, self.store))
        except Unfit as reason:
            self._warn(f"a call was made whole: {reason}")
            return go(None)
        reached = min(self.store.count(key) for key in keys)
        if not reached:
            self._warn("no keys and values came from this model's attention; kv_cache none works without them")
        elif reached < self.store.layers:
            self.record.note(f"{reached} of {self.store.layers} attentions are there; blocks were left out of this model")
            self.store.expect(reached)
        return out

    def _partial(self, x: torch.Tensor, sigma: float, keys: Sequence[Hashable], go: Go) -> torch.Tensor | None:
        """The call over part of the tokens, filled up by each condition's history; None where it cannot be made."""
        try:
            out = go(PartialCall(self.spec, self.grid.count, keys, self.index, self.store))
        except Unfit as reason:
            self._warn(f"a call was made whole: {reason}")
            return None
        computed = self.grid.spread(self.active)
        parts = []
        for key, x_part, part in zip(keys, x.chunk(len(keys)), out.chunk(len(keys))):
            history = self.history[key]
            held = x_part.float() - sigma * history.predict(sigma)
            history.update((x_part.float() - part.float()) / sigma, sigma, computed)
            parts.append(torch.where(computed, part, held.to(part.dtype)))
        return torch.cat(parts)

    def _warn(self, text: str) -> None:
        if text not in self.record.notes:
            logging.warning("Rectiflow RAS: %s", text)
        self.record.note(text)

    def close(self, seconds: float, finished: bool) -> RegionRecord:
        """Drop every tensor of the run and finish the record."""
        record = self.record
        record.seconds, record.finished = seconds, finished
        if self.store is not None:
            record.kv_bytes = self.store.peak
            self.store.drop()
        self.history.clear()
        self.index = self.active = self.metric = self.drift = None
        if finished and not record.masks and self.plan.ratio < 1.0:
            record.note("no gain: no step left tokens out; start later steps in part, or use more steps")
        return record

    def overlay(self, x0: Any) -> Any:
        """x0 (b, c, *shape) for a preview: tokens that this step leaves out are dimmed."""
        fits = isinstance(x0, torch.Tensor) and x0.shape[0] == self.batch and tuple(x0.shape[2:]) == self.grid.shape
        if self.phase != "active" or self.active is None or not fits:
            return x0
        return torch.where(self.grid.spread(self.active).to(x0.device), x0, 0.35 * x0)
