"""Our caches as bench/peers.py and its kin sweep them: families of plans from gentle to strong, and the model that runs them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from peer_caches import GUIDANCE, Picture, Run, Setting
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host import CFGGuider, sampler_object

__all__ = ["Ours"]


class Ours:
    """The tiny model on the host that runs this, with both conditions in one call."""

    def __init__(self, model):
        self.model = model

    def run(self, setting: Setting | None, picture: Picture, sigmas: Sequence[float], weigh: bool = False) -> Run:
        log = CacheLog()
        model = self.model if setting is None else attach(self.model, setting.make, log, "bench")
        guider = CFGGuider(model)
        guider.set_conds(*([[text, {"pooled_output": pooled}]] for text, pooled in (picture.positive, picture.negative)))
        guider.set_cfg(GUIDANCE)
        schedule = torch.tensor(sigmas)
        start = time.perf_counter()
        with torch.inference_mode():
            start_from, euler = torch.zeros_like(picture.noise), sampler_object("euler")
            latent = guider.sample(picture.noise, start_from, euler, schedule, disable_pbar=True, seed=0)
        seconds, asked = time.perf_counter() - start, 2 * (len(sigmas) - 1)
        if setting is None:
            return Run(latent, seconds, asked, asked)
        return Run(latent, seconds, sum(visit.full for visit in log.last.visits), asked, log.last.peak_bytes)

    @staticmethod
    def settings(steps: int) -> list[Setting]:
        limits = Limits(warmup_steps=3, tail_steps=1)
        found = []
        for target in ("last_block", "output"):
            for order in (0, 1):
                family = f"TaylorSeer {target} order {order}"
                found += [
                    Setting(family, f"{n}", CachePlan(TaylorSeer(order, interval=n), target, limits)) for n in (1, 2, 3, 4, 6)
                ]
        return found
