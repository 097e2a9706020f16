"""Measure region-adaptive sampling and mixed grains: `python bench/region.py [--rounds N] [step] [run] [mixed] [mixed_error]`.

Writes bench/results/region_*.csv.

All times are seconds of this process (`time.process_time`), which work beside it hardly moves.

step   one call over a share of 4096 image tokens (latent 128×128) of a Flux of width 256 with random weights, 2 + 4 blocks, 16 text tokens,
       against the dense call: medians of interleaved rounds, CPU, float32, keys and values kept.
run    the tiny model at 128×128 pixels, eight seeds in one batch, guidance 1, on the CPU: latent error to 100 Heun steps, of RAS, of
       RAS in a cache, of plain Euler, of interval caching and of a cache that continues the slope. All but the first two get the fewest
       steps with which their whole calls take as long as the slower of these, or longer.
mixed  one call of the same Flux of width 256 with the tokens of coarse 2 × 2 cells merged in some of its 6 blocks, against the dense call.
mixed_error  the tiny model at 128×128, eight seeds, guidance 3, 12 steps, merged from block 2 of 9 and 20 % on, up to the last block and
       step unless the row says otherwise: ‖z − z₀‖/‖z₀‖ against the plain run by the share of fine cells; the fine ones are those with
       most, fewest or a random amount of detail in the plain picture.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.accel.cache.binding import attach as attach_cache
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.taylor import TaylorSeer
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.accel.region.binding import attach
from rectiflow.accel.region.mixed_binding import GrainLog, attach_mixed_grain
from rectiflow.accel.region.mixed_grain import MixedGrain
from rectiflow.accel.region.plan import RegionPlan
from rectiflow.accel.region.report import RegionLog
from rectiflow.host import CFGGuider, build_flux_model, calculate_sigmas, prepare_noise, sampler_object
from rectiflow.host.embedded.latent_formats import Flux as FluxLatents
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.metrics.fidelity import relative_errors
from table import write_table

SEEDS = range(1, 9)
RATIOS = (0.125, 0.25, 0.5, 0.75)
REFERENCE_STEPS, STEPS, FINE_STEPS = 100, 60, 80
CACHES = ((2, 8, 0), (3, 8, 0), (4, 12, 0), (8, 16, 0), (4, 12, 1))  # interval, warm-up, order
STEP_HEADER = ["tokens", "width", "ratio", "computed", "dense_ms", "partial_ms", "of_dense"]
MIXED_HEADER = ["tokens", "blocks", "fine_ratio", "seen", "tokens_share", "flops_share", "dense_ms", "merged_ms", "of_dense"]
ERROR_HEADER = [
    "fine_ratio", "fine_by", "merge", "unmerge", "position", "weighted", "last_block", "until", "error", "worst", "better_than_random",
]  # fmt: skip
RUN_HEADER = ["pixels", "batch", "method", "setting", "seconds", "seed", "error", "ras_is_nearer", "ras_in_a_cache_is_nearer"]
OURS = ("RAS", "RAS in a cache")


def wide_flux(width: int = 256):
    """A MODEL: heads of 64 channels, 2 double and 4 single blocks."""
    params = FluxParams(
        in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=width, mlp_ratio=4.0, num_heads=width // 64, depth=2,
        depth_single_blocks=4, axes_dim=(16, 24, 24), theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    network = Flux(params, dtype=torch.float32)
    state = {name: torch.randn(t.shape, generator=generator) * 0.02 for name, t in network.state_dict().items()}
    return build_flux_model(state, {**params.__dict__, "axes_dim": list(params.axes_dim)}, FluxLatents(), torch.float32)


class Stamped:
    """Seconds of every model call, from outside all other wrappers."""

    def __init__(self):
        self.spans: list[float] = []

    def __call__(self, executor, *args, **kwargs):
        start = time.process_time()
        out = executor(*args, **kwargs)
        self.spans.append(time.process_time() - start)
        return out

    def on(self, model):
        watched = model.clone()
        watched.add_wrapper_with_key("apply_model", "stamped", self)
        return watched


def guided(model, positive, negative, noise, sigmas, cfg=1.0, solver="euler") -> torch.Tensor:
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler_object(solver), sigmas, disable_pbar=True, seed=0)


def measure_step(rounds: int) -> None:
    model = wide_flux()
    text = [[torch.zeros(1, 16, 64), {"pooled_output": torch.zeros(1, 64)}]]
    noise = torch.randn(1, 16, 128, 128, generator=torch.Generator().manual_seed(1))
    rows = []
    for ratio in RATIOS:
        stamps = Stamped()
        log = RegionLog()
        # Dense and partial steps alternate: every second step is a reset.
        steps = 2 * rounds + 2
        plan = RegionPlan(ratio=ratio, start=2, resets=tuple(range(3, steps, 2)))
        guided(attach(stamps.on(model), plan, log, "bench"), text, text, noise, torch.linspace(1, 0, steps + 1))
        visits = log.last.visits
        dense, partial = (
            [span for span, visit in zip(stamps.spans[2:], visits[2:]) if visit.phase == phase] for phase in ("dense", "active")
        )  # fmt: skip
        of_dense = statistics.median(part / whole for part, whole in zip(partial, dense))
        computed = next(visit.tokens for visit in visits if visit.phase == "active")
        rows.append([
            log.last.tokens, 256, ratio, computed, f"{1000 * statistics.median(dense):.0f}", f"{1000 * statistics.median(partial):.0f}",
            f"{of_dense:.3f}",
        ])  # fmt: skip
    write_table("region_step", STEP_HEADER, rows)


def measure_mixed(rounds: int) -> None:
    model = wide_flux()
    text = [[torch.zeros(1, 16, 64), {"pooled_output": torch.zeros(1, 64)}]]
    noise = torch.randn(1, 16, 128, 128, generator=torch.Generator().manual_seed(1))
    order = torch.rand(32 * 32, generator=torch.Generator().manual_seed(2)).argsort()
    stamps = Stamped()  # stands outside of what merges
    cases = {"dense": (stamps.on(model), None)}
    for first in (0, 2):
        for ratio in (0.0, 0.25, 0.5, 0.75):
            fine = torch.zeros(32 * 32)
            fine[order[: round(ratio * 1024)]] = 1.0
            log = GrainLog()
            plan = MixedGrain(fine.view(1, 32, 32), first=first, start=0.0)
            cases[f"{first}-5 of 6", ratio] = (attach_mixed_grain(stamps.on(model), plan, log, "bench"), log)
    spans: dict = {case: [] for case in cases}
    for _ in range(rounds + 1):  # the first is a warm-up
        for case, (patched, _) in cases.items():
            guided(patched, text, text, noise, torch.tensor([0.5, 0.0]))
            spans[case].append(stamps.spans[-1])
    rows = []
    for case, (_, log) in list(cases.items())[1:]:
        times = list(zip(spans["dense"][1:], spans[case][1:]))
        dense, merged = (1000 * statistics.median(part) for part in zip(*times))
        few, whole = log.flops[16]
        shares = (log.share, few / whole, statistics.median(part / all_ for all_, part in times))
        rows.append([log.tokens[0], *case, log.tokens[1], f"{shares[0]:.4f}", f"{shares[1]:.3f}", f"{dense:.0f}", f"{merged:.0f}",
                     f"{shares[2]:.3f}"])  # fmt: skip
    write_table("region_mixed", MIXED_HEADER, rows)


def measure_mixed_error(steps: int = 12) -> None:
    from rectiflow.host.embedded import make_host
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    tiny = TinyRuns(make_host())
    x = tiny.noise(SEEDS, (128, 128))

    def draw(model=None) -> torch.Tensor:
        return torch.cat([tiny.sample("noto cat", x[place : place + 4], model=model, steps=steps) for place in (0, 4)])

    plain = draw()
    detail = F.avg_pool2d(plain.std(dim=1, keepdim=True), 4).flatten(1)  # of a cell: 2 × 2 tokens of 2 × 2
    scores = {"detail": detail, "random": torch.rand(detail.shape, generator=torch.Generator().manual_seed(0)), "least detail": -detail}
    usual = {"merge": "mean", "unmerge": "delta", "position": "centre", "weigh": True, "last": 8, "end": 1.0}
    cases = [(ratio, by, usual) for ratio in (0.0, 0.25, 0.5, 0.75) for by in scores if ratio or by == "detail"]
    cases += [(0.25, "detail", {**usual, **changed}) for changed in (
        {"merge": "centre"}, {"unmerge": "copy"}, {"position": "first"}, {"weigh": False}, {"last": 6}, {"end": 0.7},
        {"last": 6, "end": 0.7},
    )]  # fmt: skip
    found: dict = {}
    for ratio, by, options in cases:
        order = scores[by].argsort(dim=1, descending=True)
        fine = torch.zeros_like(detail).scatter_(1, order[:, : round(ratio * detail.shape[1])], 1.0).view(-1, 8, 8)
        z = torch.cat([
            tiny.sample("noto cat", x[part], model=attach_mixed_grain(tiny.model, MixedGrain(fine[part], **options), GrainLog(), "bench"),
                        steps=steps) for part in (slice(0, 4), slice(4, 8))
        ])  # fmt: skip
        found[(ratio, by, *options.values())] = relative_errors(z, plain).tolist()
    rows = []
    for case, errors in found.items():
        chance = found.get((case[0], "random", *case[2:]))
        nearer = "" if chance is None or case[1] == "random" else f"{sum(a < b for a, b in zip(errors, chance))} of {len(errors)}"
        rows.append([*case, f"{statistics.mean(errors):.4f}", f"{max(errors):.4f}", nearer])
    write_table("region_mixed_error", ERROR_HEADER, rows)


def cached(model, interval: int, warmup: int, order: int = 0):
    """A cache of the output around `model`: the last velocity again (order 0) or its slope continued, from step `warmup` on."""
    policy = TaylorSeer(interval=interval, order=order) if order else IntervalReuse(interval=interval)
    return attach_cache(model, CachePlan(policy, "output", Limits(warmup, 1)), CacheLog(), "bench")


def whole_calls(steps: int, interval: int, warmup: int) -> int:
    """Of a cache's run: the first `warmup` steps, every `interval`-th from the last of them, and the last."""
    return sum(step < warmup or step == steps - 1 or (step - warmup + 1) % interval == 0 for step in range(steps))


class Runs:
    """The tiny model at one size: seeds in one batch, or one by one."""

    def __init__(self, pixels: int, together: bool, seeds: Sequence[int]):
        self.model, clip, _ = NODES["RectiflowLoadTiny"]().execute()
        self.positive, self.negative = (clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("noto cat on blue", ""))
        empty = torch.zeros(1, 16, pixels // 4, pixels // 4)
        noises = [prepare_noise(empty, seed) for seed in seeds]
        self.batches = [torch.cat(noises)] if together else noises

    def sample(
        self, model, steps: int, batches: Sequence[torch.Tensor] | None = None, solver: str = "euler"
    ) -> tuple[torch.Tensor, list[float]]:
        """Latents of all seeds, and the seconds of every batch."""
        sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        latents, seconds = [], []
        for noise in batches or self.batches:
            start = time.process_time()
            latents.append(guided(model, self.positive, self.negative, noise, sigmas, solver=solver))
            seconds.append(time.process_time() - start)
        return torch.cat(latents), seconds

    def worth(self, model, steps: int, rounds: int) -> float:
        """How many Euler steps take the time of `model` at `steps`: the median of interleaved rounds over the first batch."""
        few = steps // 2
        found = []
        for _ in range(rounds):
            (ours,), (plain,) = (self.sample(one, count, self.batches[:1])[1] for one, count in ((model, steps), (self.model, few)))
            found.append(few * ours / plain)
        return statistics.median(found)


def measure_runs(rounds: int, pixels: int, together: bool, seeds: Sequence[int]) -> list[list]:
    runs = Runs(pixels, together, seeds)
    tokens = (pixels // 8) ** 2
    reference, _ = runs.sample(runs.model, REFERENCE_STEPS, solver="heun")

    def regions(ratio: float, start: int, slope: int = 0):
        """`slope` tokens of 256 more are left out every eight steps."""
        plan = RegionPlan(
            ratio=ratio, start=start, resets=(), metric="change", starvation=0.0, slope=tokens * slope // 256, period=8, overlay=False
        )  # fmt: skip
        return attach(runs.model, plan, RegionLog(), "bench")

    ours, both = regions(0.25, 6, 20), cached(regions(0.75, 12), 4, 12, order=1)
    worths = [runs.worth(model, steps, rounds) for model, steps in ((ours, STEPS), (both, FINE_STEPS))]
    print(f"{pixels} pixels: RAS takes the time of {worths[0]:.1f} Euler steps, RAS in a cache that of {worths[1]:.1f}")
    worth = max(worths)
    methods = {
        "RAS": (ours, STEPS, f"{STEPS} steps, ratio 0.25 from 6"),
        "RAS in a cache": (both, FINE_STEPS, f"{FINE_STEPS} steps, ratio 0.75 from 12, every 4 from 12, order 1"),
        "Euler": (runs.model, math.ceil(worth), f"{math.ceil(worth)} steps"),
    }
    for interval, warmup, order in CACHES:
        steps = next(count for count in itertools.count(1) if whole_calls(count, interval, warmup) >= worth)
        name = f"forecast cache, every {interval}" if order else f"interval cache, every {interval}"
        methods[name] = (cached(runs.model, interval, warmup, order), steps, f"{steps} steps, from {warmup}, order {order}")
    spans: dict[str, list[float]] = {name: [] for name in methods}
    errors: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, (model, steps, _) in methods.items():
            latents, seconds = runs.sample(model, steps)
            spans[name].append(statistics.mean(seconds))
            errors[name] = relative_errors(latents, reference).tolist()
    rows = []
    for name, (_, _, setting) in methods.items():
        won = {mine: [near < far for near, far in zip(errors[mine], errors[name])] for mine in OURS}
        for mine in OURS:
            if name != mine:
                print(f"{mine} is nearer than {name} on {sum(won[mine])} of {len(seeds)} seeds")
        for place, seed in enumerate(seeds):
            batch, seconds = len(seeds) if together else 1, f"{statistics.median(spans[name]):.2f}"
            nearer = ["" if name == mine else won[mine][place] for mine in OURS]
            rows.append([pixels, batch, name, setting, seconds, seed, f"{errors[name][place]:.4f}", *nearer])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["step", "run", "mixed", "mixed_error"], help="step, run, mixed, mixed_error; else all")
    parser.add_argument("--rounds", type=int, default=5, help="measurements a figure; medians are printed")
    parser.add_argument("--pixels", type=int, nargs="*", default=[128], help="of a side: the seeds of each size in one batch")
    parser.add_argument("--alone", type=int, nargs="*", default=[], help="pixels of a side: the seeds of each size one by one")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="settings were chosen on 101 to 104")
    arguments = parser.parse_args()
    if "step" in arguments.what:
        measure_step(arguments.rounds)
    if "run" in arguments.what:
        cases = [(pixels, True) for pixels in arguments.pixels] + [(pixels, False) for pixels in arguments.alone]
        rows = [row for pixels, together in cases for row in measure_runs(arguments.rounds, pixels, together, arguments.seeds)]
        write_table("region_run", RUN_HEADER, rows)
    if "mixed" in arguments.what:
        measure_mixed(arguments.rounds)
    if "mixed_error" in arguments.what:
        measure_mixed_error()


if __name__ == "__main__":
    main()
