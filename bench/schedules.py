"""Measure searched schedules: `python bench/schedules.py [--steps 28] [--pictures 8]`. Prints a table, writes bench/results/schedules.csv.

Schedules are found on four prompts of the tiny model and used on held-out ones (other things, other seeds): at equal full calls the
searched steps, even steps, and Δ-DiT's ranges. Columns: PSNR of the decoded pictures against the uncached ones and relative error of the
final latent, mean and worst. "searched" computes the last step in any case, "searched, free end" need not. `open_loop` is the cost that
the search saw, searched over even.
"""

from __future__ import annotations

import argparse

import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.delta_dit import DeltaDiT
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.recording import RecordOptions, recorder
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.schedule import CacheSchedule
from rectiflow.accel.cache.schedule_search import SearchOptions, search_schedule
from rectiflow.accel.cache.scheduled import ScheduledCache
from rectiflow.accel.cache.search import even_steps
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host import CFGGuider, calculate_sigmas, prepare_noise, sampler_object
from rectiflow.metrics.fidelity import psnr, relative_errors
from table import write_csv

LEARN = ("noto watermelon on blue", "twemoji rocket on black", "noto dog on white", "twemoji apple on green")
HELD_OUT = (
    "noto cat on blue", "noto fox on green", "twemoji bee on black", "noto pizza on white",
    "twemoji car on blue", "noto house on green", "noto rabbit on black", "twemoji owl on white",
)  # fmt: skip
BUDGETS = (0.25, 0.35, 0.5)
HEADER = [
    "steps", "target", "order", "metric", "budget", "plan", "calls", "of", "psnr_mean", "psnr_worst", "latent_error_mean",
    "latent_error_worst", "open_loop",
]  # fmt: skip


class Bench:
    """The tiny model; `sample` gives the final latents of a batch of prompts."""

    def __init__(self):
        self.model, self.clip, self.vae = NODES["RectiflowLoadTiny"]().execute()

    def sample(self, model, prompts, first_seed: int, steps: int) -> torch.Tensor:
        entries = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0] for text in prompts]
        pooled = torch.cat([entry[1]["pooled_output"] for entry in entries])
        noise = torch.cat([prepare_noise(torch.zeros(1, 16, 16, 16), first_seed + i) for i in range(len(prompts))])
        guider = CFGGuider(model)
        guider.set_conds(
            [[torch.cat([entry[0] for entry in entries]), {"pooled_output": pooled}]],
            self.clip.encode_from_tokens_scheduled(self.clip.tokenize("")),
        )
        guider.set_cfg(3.0)
        sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        with torch.inference_mode():
            return guider.sample(noise, torch.zeros_like(noise), sampler_object("euler"), sigmas, disable_pbar=True, seed=0)

    def record(self, target: str, steps: int):
        policy = recorder(self.model, target, "", RecordOptions(tokens=256, probes=6))
        self.sample(attach(self.model, CachePlan(policy, target), CacheLog(), "bench"), LEARN, 100, steps)
        return policy.recording

    def figures(self, plan: CachePlan, plain: torch.Tensor, prompts, steps: int) -> list:
        log = CacheLog()
        latent = self.sample(attach(self.model, plan, log, "bench"), prompts, 1, steps)
        decibels = psnr(self.vae.decode(latent), self.vae.decode(plain), where="bench")
        errors = relative_errors(latent, plain)
        return [
            log.last.calls_made, log.last.calls, f"{float(decibels.mean()):.1f}", f"{float(decibels.min()):.1f}",
            f"{float(errors.mean()):.4f}", f"{float(errors.max()):.4f}",
        ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[28])
    parser.add_argument("--pictures", type=int, default=len(HELD_OUT), help="held-out prompts, at most all")
    parser.add_argument("--targets", nargs="+", default=["last_block", "output"])
    parser.add_argument("--metrics", nargs="+", default=["rel_l2"])
    arguments = parser.parse_args()
    prompts = HELD_OUT[: arguments.pictures]
    bench, rows = Bench(), []

    def add(*values) -> None:
        rows.append(list(values))
        print("  ".join(f"{name} {value}" for name, value in zip(HEADER, rows[-1])), flush=True)

    for steps in arguments.steps:
        plain = bench.sample(bench.model, prompts, 1, steps)
        for target in arguments.targets:
            recording = bench.record(target, steps)
            for order in (0, 1):
                for share in BUDGETS:
                    budget = round(share * steps)
                    even = CacheSchedule(recording.runs[-1].sigmas, even_steps(steps, budget), order)
                    plan = CachePlan(ScheduledCache.of(even), target, schedule=even)
                    add(steps, target, order, "", budget, "even", *bench.figures(plan, plain, prompts, steps), "1.00")
                    for metric, last in ((metric, last) for metric in arguments.metrics for last in (1, 0)):
                        found = search_schedule(recording, SearchOptions(budget, order, metric=metric, last=last), "bench").schedule
                        plan = CachePlan(ScheduledCache.of(found), target, schedule=found)
                        name, gain = "searched" if last else "searched, free end", f"{found.cost / found.even_cost:.2f}"
                        add(steps, target, order, metric, budget, name, *bench.figures(plan, plain, prompts, steps), gain)
        for interval in (2, 3):
            plan = CachePlan(DeltaDiT(interval=interval), "block_delta", Limits(1))
            add(steps, "block_delta", 0, "", "", f"delta-dit every {interval}", *bench.figures(plan, plain, prompts, steps), "")
    write_csv("schedules", HEADER, rows)


if __name__ == "__main__":
    main()
