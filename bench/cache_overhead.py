"""What a cache costs that leaves nothing out: steps of the tiny model (256 wide), plain and with interval 1, medians of seconds.

    .venv/bin/python -m rectiflow.bench.cache_overhead [--rounds 40]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ..accel.cache.binding import attach
from ..accel.cache.interval import IntervalReuse
from ..accel.cache.report import CacheLog
from ..accel.cache.visits import CachePlan

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
            start = time.perf_counter()
            drawn = sample(models[name])
            seconds[name].append(time.perf_counter() - start)
            if not torch.equal(drawn, expected):
                raise AssertionError(f"{name} changes the picture though it leaves nothing out")
    plain = statistics.median(seconds["plain"])
    return {target: statistics.median(seconds[target]) / plain - 1 for target in plans}


def main() -> None:
    import tempfile

    from ..host.embedded import HostSettings, make_host, use_host

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder, use_host(make_host(folder, settings=HostSettings(device="cpu", dtype="fp32"))):
        from ..host import CFGGuider, sampler_object
        from ..nodes.tiny import RectiflowLoadTiny

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

        for target, share in overhead(model, sample, rounds).items():
            print(f"{target}: {share:+.2%} of a run of {STEPS} steps, bit-identical")


if __name__ == "__main__":
    main()
