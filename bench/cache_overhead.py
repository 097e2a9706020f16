"""What a cache costs that leaves nothing out: steps of the tiny model (256 wide), plain and with interval 1, medians of processor seconds.

    OMP_NUM_THREADS=1 .venv/bin/python bench/cache_overhead.py [--rounds 40]

Writes bench/results/cache_overhead.csv. Runs of all caches take turns, and every result must equal the plain one bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host import CFGGuider, sampler_object
from rectiflow.nodes.tiny import RectiflowLoadTiny
from table import write_table

__all__ = ["overhead"]

STEPS = 4


def overhead(model, sample, rounds: int) -> dict[str, float]:
    """Share of a run that the cache adds, by target; the runs' order turns each round, and results must be equal bit by bit.

    sample: of a MODEL, its final latent.
    """
    plans = {target: CachePlan(IntervalReuse(interval=1), target) for target in ("output", "last_block", "block_delta")}
    models = {"plain": model, **{target: attach(model, plan, CacheLog(), "bench") for target, plan in plans.items()}}
    expected = sample(model)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            drawn = sample(models[name])
            seconds[name].append(time.process_time() - start)
            if not torch.equal(drawn, expected):
                raise AssertionError(f"{name} changes the picture though it leaves nothing out")
    plain = statistics.median(seconds["plain"])
    return {target: statistics.median(seconds[target]) / plain - 1 for target in plans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    with torch.inference_mode():
        model, clip, _ = RectiflowLoadTiny().execute()
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("noto cat on blue"))
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    def sample(chosen) -> torch.Tensor:
        guider = CFGGuider(chosen)
        guider.set_conds(positive, positive)
        guider.set_cfg(1.0)
        sigmas = torch.linspace(1, 0, STEPS + 1)
        with torch.inference_mode():
            return guider.sample(noise, torch.zeros_like(noise), sampler_object("euler"), sigmas, disable_pbar=True, seed=0)

    found = overhead(model, sample, rounds)
    rows = [[target, STEPS, rounds, f"{100 * share:.2f}", "yes"] for target, share in found.items()]
    write_table("cache_overhead", ["target", "steps", "rounds", "added_percent", "bit_identical"], rows)


if __name__ == "__main__":
    main()
