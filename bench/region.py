"""Measure region-adaptive sampling: `python bench/region.py [--rounds N] [step] [run]`. Writes bench/results/region_*.csv.

All times are seconds of this process (`time.process_time`), which work beside it hardly moves.

step   one call over a share of 4096 image tokens (latent 128×128) of a Flux of width 256 with random weights, 2 + 4 blocks, 16 text tokens,
       against the dense call: medians of interleaved rounds, CPU, float32, keys and values kept.
run    the tiny model at 128×128 pixels, eight seeds, guidance 1, on the CPU: latent error to 100 Euler steps, of RAS, of plain Euler and
       of interval caching. The two others get the number of steps with which they take the time of RAS or more.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.accel.cache.binding import attach as attach_cache
from rectiflow.accel.cache.interval import IntervalReuse
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.accel.region.binding import attach
from rectiflow.accel.region.plan import RegionPlan
from rectiflow.accel.region.report import RegionLog
from rectiflow.host import CFGGuider, build_flux_model, calculate_sigmas, prepare_noise, sampler_object
from rectiflow.host.embedded.latent_formats import Flux as FluxLatents
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from table import write_table

SEEDS = range(1, 9)
RATIOS = (0.125, 0.25, 0.5, 0.75)
REFERENCE_STEPS = 100
STEP_HEADER = ["tokens", "width", "ratio", "computed", "dense_ms", "partial_ms", "of_dense"]
RUN_HEADER = ["pixels", "method", "setting", "seconds", "seed", "error", "nearer_than_it"]


def wide_flux():
    """A MODEL: width 256, 4 heads, 2 double and 4 single blocks."""
    params = FluxParams(
        in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=256, mlp_ratio=4.0, num_heads=4, depth=2,
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


def guided(model, positive, negative, noise, sigmas, cfg=1.0) -> torch.Tensor:
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler_object("euler"), sigmas, disable_pbar=True, seed=0)


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


class Runs:
    """The tiny model at one size: latents and seconds of a method for every seed."""

    def __init__(self, pixels: int):
        self.pixels = pixels
        self.model, clip, _ = NODES["RectiflowLoadTiny"]().execute()
        self.positive, self.negative = (clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("noto cat on blue", ""))
        empty = torch.zeros(1, 16, pixels // 4, pixels // 4)
        self.noises = [prepare_noise(empty, seed) for seed in SEEDS]

    def sample(self, model, steps: int, seed: int) -> tuple[torch.Tensor, float]:
        sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        start = time.process_time()
        latent = guided(model, self.positive, self.negative, self.noises[seed], sigmas)
        return latent, time.process_time() - start

    def equal_steps(self, ours, others, steps: int, rounds: int) -> list[int]:
        """Steps with which each of `others` takes the time of `ours` at `steps`, rounded up, so that it is never short of time.

        Medians of interleaved rounds.
        """
        ratios: list[list[float]] = [[] for _ in others]
        for _ in range(rounds):
            spans = []
            for model in (ours, *others):
                start = time.process_time()
                self.sample(model, steps, 0)
                spans.append(time.process_time() - start)
            for found, span in zip(ratios, spans[1:]):
                found.append(spans[0] / span)
        return [math.ceil(statistics.median(found) * steps) for found in ratios]

    def regions(self, steps: int, **options):
        return attach(self.model, RegionPlan(**options), RegionLog(), "bench")

    def interval(self, interval: int, warmup: int):
        plan = CachePlan(IntervalReuse(interval=interval), "output", Limits(warmup, 1))
        return attach_cache(self.model, plan, CacheLog(), "bench")


def measure_runs(rounds: int, sizes: list[int], steps: int, ratio: float, start: int, order: int) -> None:
    rows = []
    for pixels in sizes:
        runs = Runs(pixels)
        references = [runs.sample(runs.model, REFERENCE_STEPS, place)[0] for place in range(len(SEEDS))]
        resets = (start + (steps - start) // 3, start + 2 * (steps - start) // 3)
        ours = runs.regions(steps, ratio=ratio, start=start, resets=resets, focus="high_std", starvation=1.0, order=order, overlay=False)
        every_second = runs.interval(2, start)
        euler, cached = runs.equal_steps(ours, (runs.model, every_second), steps, rounds)
        methods = {
            "RAS": (ours, steps, f"{steps} steps, ratio {ratio:g} from {start}, order {order}"),
            "Euler": (runs.model, euler, f"{euler} steps"),
            "interval cache": (every_second, cached, f"{cached} steps, every 2 from {start}"),
        }
        errors: dict[str, list[float]] = {}
        for method, (model, count, setting) in methods.items():
            for place, seed in enumerate(SEEDS):
                latent, seconds = runs.sample(model, count, place)
                error = float((latent - references[place]).norm() / references[place].norm())
                errors.setdefault(method, []).append(error)
                nearer = errors["RAS"][place] < error if method != "RAS" else ""
                rows.append([pixels, method, setting, f"{seconds:.3f}", seed, f"{error:.4f}", nearer])
        wins = {method: sum(a < b for a, b in zip(errors["RAS"], found)) for method, found in errors.items() if method != "RAS"}
        print(f"{pixels} pixels: RAS nearer on " + ", ".join(f"{count} of {len(SEEDS)} seeds than {name}" for name, count in wins.items()))
    write_table("region_run", RUN_HEADER, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["step", "run"], help="step, run; both when none is named")
    parser.add_argument("--rounds", type=int, default=5, help="measurements a figure; medians are printed")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128], help="pixels of a side")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--start", type=int, default=8)
    parser.add_argument("--order", type=int, default=0)
    arguments = parser.parse_args()
    if "step" in arguments.what:
        measure_step(arguments.rounds)
    if "run" in arguments.what:
        measure_runs(arguments.rounds, arguments.sizes, arguments.steps, arguments.ratio, arguments.start, arguments.order)


if __name__ == "__main__":
    main()
