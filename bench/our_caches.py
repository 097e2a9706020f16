"""Our caches as bench/peers.py and its kin sweep them: families of plans from gentle to strong, and the model that runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from peer_caches import GUIDANCE, Picture, Run, Setting
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.calibration import ReuseCalibration
from rectiflow.accel.cache.confidence import ConfidenceGatedTaylor
from rectiflow.accel.cache.first_block import FirstBlockGate
from rectiflow.accel.cache.magnitude import MagnitudeRule
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.recording import RecordOptions, recorder
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.schedule_search import SearchOptions, search_schedule
from rectiflow.accel.cache.scheduled import ScheduledCache
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host import CFGGuider, sampler_object

__all__ = ["Ours"]

LEARN = ("noto dog on white", "twemoji apple on green", "noto koala on red", "twemoji house on yellow")
SHARES = (0.6, 0.5, 0.42, 0.35, 0.28, 0.22)  # of the steps computed
LIMITS = Limits(warmup_steps=3, tail_steps=1)


class Ours:
    """The tiny model on the host that runs this, with both conditions in one call."""

    def __init__(self, model, picture: Callable[[str, int], Picture], sigmas: Callable[[int], list[float]]):
        self.model, self.picture, self.sigmas = model, picture, sigmas

    @staticmethod
    def sample(model, picture: Picture, sigmas: Sequence[float]) -> tuple[torch.Tensor, float]:
        """(latent, seconds of the processor)"""
        guider = CFGGuider(model)
        guider.set_conds(*([[text, {"pooled_output": pooled}]] for text, pooled in (picture.positive, picture.negative)))
        guider.set_cfg(GUIDANCE)
        schedule, start_from, euler = torch.tensor(sigmas), torch.zeros_like(picture.noise), sampler_object("euler")
        start = time.process_time()
        with torch.inference_mode():
            latent = guider.sample(picture.noise, start_from, euler, schedule, disable_pbar=True, seed=0)
        return latent, time.process_time() - start

    def run(self, setting: Setting | None, picture: Picture, sigmas: Sequence[float], weigh: bool = False) -> Run:
        log = CacheLog()
        model = self.model if setting is None else attach(self.model, setting.make, log, "bench")
        latent, seconds = self.sample(model, picture, sigmas)
        asked = 2 * (len(sigmas) - 1)
        if setting is None:
            return Run(latent, seconds, asked, asked)
        return Run(latent, seconds, sum(visit.full for visit in log.last.visits), asked, log.last.peak_bytes)

    def settings(self, steps: int) -> list[Setting]:
        """Fixed intervals, gates, and schedules searched on pictures that no bench draws."""
        fixed = (("reuse", 0, "output"), ("TaylorSeer order 1", 1, "last_block"))
        found = [
            Setting(f"{name} {target}", f"{n}", CachePlan(TaylorSeer(order, interval=n), target, LIMITS))
            for name, order, target in fixed for n in (2, 3)
        ]  # fmt: skip
        off = CachePlan(TaylorSeer(1, interval=1), "last_block", LIMITS)
        return [Setting("off", "1", off), *found, *self._gates(steps), *self._searched(steps)]

    def _gates(self, steps: int) -> list[Setting]:
        findings = self._learn(CachePlan(ReuseCalibration(), "block_delta"), steps).findings
        ratios, longest = tuple(findings["ratios"]), Limits(round(0.2 * steps), max_consecutive=5)  # as the rule's authors set it
        found = []
        for t in (0.04, 0.08, 0.16):
            gate = ConfidenceGatedTaylor(threshold=t, gate="residual")
            found.append(Setting("confidence gate", f"{t:g}", CachePlan(gate, "last_block", LIMITS)))
        for t in (0.1, 0.2, 0.4):
            gate = FirstBlockGate(order=1, threshold=t)
            found.append(Setting("first block order 1", f"{t:g}", CachePlan(gate, "block_delta", LIMITS)))
        for t in (0.06, 0.24, 1.0):
            rule = MagnitudeRule(threshold=t, ratios=ratios)
            found.append(Setting("magnitude", f"{t:g}", CachePlan(rule, "block_delta", longest)))
        return found

    def _searched(self, steps: int) -> list[Setting]:
        found = []
        for target, fits in (("last_block", (True,)), ("output", (False, True))):
            policy = recorder(self.model, target, "", RecordOptions(tokens=256, runs=len(LEARN), probes=6))
            self._learn(CachePlan(policy, target), steps)
            for fitted in fits:
                for share in SHARES:
                    options = SearchOptions(round(share * steps), 1, metric="guided", weights="amplified", fitted=fitted)
                    schedule = search_schedule(policy.recording, options, "bench").schedule
                    plan = CachePlan(ScheduledCache.of(schedule), target, schedule=schedule)
                    name = "searched and fitted" if fitted else "searched order 1"
                    found.append(Setting(f"{name} {target}", f"{options.budget}", plan))
        return found

    def _learn(self, plan: CachePlan, steps: int):
        """The record of the last of a few runs that look and skip nothing."""
        log = CacheLog()
        model = attach(self.model, plan, log, "bench")
        for seed, prompt in enumerate(LEARN):
            self.sample(model, self.picture(prompt, 1000 + seed), self.sigmas(steps))
        return log.last
