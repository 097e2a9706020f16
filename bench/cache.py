"""Measure the caches: `python bench/cache.py [--rounds N] [--steps 28 50] [--targets …]`. Prints a table, writes bench/results/cache.csv.

Four prompts in one batch under guidance 3 on the tiny model, Euler on the model's own schedule, on the CPU. Every row is one cache against
the uncached run of the same noise: ratio of processor times (median of the rounds, the two in turn; with OMP_NUM_THREADS=1 those of one
thread, near the wall clock of a quiet machine), model calls, PSNR of the decoded pictures (mean and worst), relative error of the final
latent (mean), most bytes kept. The first row, interval 1, is the price of the engine when it skips nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host import CFGGuider, calculate_sigmas, prepare_noise, sampler_object
from rectiflow.metrics.fidelity import psnr, relative_errors
from table import write_csv

PROMPTS = ("noto cat on blue", "noto fox on green", "twemoji rocket on black", "noto watermelon on blue")
HEADER = [
    "steps", "target", "interval", "order", "basis", "calls", "of", "time_ratio", "psnr_mean", "psnr_worst", "latent_error",
    "peak_kib",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    target: str
    interval: int
    order: int
    basis: str = "newton"


SETTINGS = (
    Setting("last_block", 1, 1),
    *(Setting("last_block", interval, order) for interval in (2, 3, 4, 6) for order in (0, 1, 2)),
    *(Setting("last_block", interval, 2, "reference") for interval in (2, 3)),
    *(Setting("output", interval, order) for interval in (2, 3, 4, 6) for order in (0, 1)),
    Setting("block_delta", 3, 1),
    *(Setting("modules", interval, order) for interval in (2, 3, 4) for order in (0, 1)),
)


class Bench:
    """The tiny model with a batch of prompts; `sample` gives (latent, seconds)."""

    def __init__(self, pictures: int = len(PROMPTS)):
        self.model, clip, self.vae = NODES["RectiflowLoadTiny"]().execute()
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(pictures)]
        entries = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in prompts]
        pooled = torch.cat([entry[1]["pooled_output"] for entry in entries])
        self.positive = [[torch.cat([entry[0] for entry in entries]), {"pooled_output": pooled}]]
        self.negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        empty = torch.zeros(1, 16, 16, 16)
        self.noise = torch.cat([prepare_noise(empty, seed) for seed in range(1, pictures + 1)])

    def sample(self, model, steps: int) -> tuple[torch.Tensor, float]:
        guider = CFGGuider(model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(3.0)
        sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        start = time.process_time()
        with torch.inference_mode():
            latent = guider.sample(
                self.noise, torch.zeros_like(self.noise), sampler_object("euler"), sigmas, disable_pbar=True, seed=0
            )
        return latent, time.process_time() - start

    def row(self, setting: Setting, steps: int, rounds: int) -> list:
        log = CacheLog()
        plan = CachePlan(TaylorSeer(setting.order, setting.basis, "step", setting.interval), setting.target, Limits(3, 1))
        cached = attach(self.model, plan, log, "bench")
        ratios = []
        for _ in range(rounds):
            plain, seconds = self.sample(self.model, steps)
            latent, cached_seconds = self.sample(cached, steps)
            ratios.append(seconds / cached_seconds)
        decibels = psnr(self.vae.decode(latent), self.vae.decode(plain), where="bench")
        error = float(relative_errors(latent, plain).mean())
        last = log.last
        return [
            steps, setting.target, setting.interval, setting.order, setting.basis, last.calls_made, last.calls,
            f"{statistics.median(ratios):.2f}", f"{float(decibels.mean()):.1f}", f"{float(decibels.min()):.1f}", f"{error:.4f}",
            last.peak_bytes >> 10,
        ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs a row; the ratio is their median")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--pictures", type=int, default=len(PROMPTS), help="prompts in the batch, each with a seed of its own")
    parser.add_argument("--targets", nargs="+", default=sorted({setting.target for setting in SETTINGS}))
    parser.add_argument("--name", default="cache", help="of the file under bench/results")
    arguments = parser.parse_args()
    bench = Bench(arguments.pictures)
    bench.sample(bench.model, 4)  # the first run loads and chooses kernels
    rows = []
    for steps in arguments.steps:
        for setting in (setting for setting in SETTINGS if setting.target in arguments.targets):
            rows.append(bench.row(setting, steps, arguments.rounds))
            print("  ".join(f"{name} {value}" for name, value in zip(HEADER, rows[-1])), flush=True)
    write_csv(arguments.name, HEADER, rows)


if __name__ == "__main__":
    main()
