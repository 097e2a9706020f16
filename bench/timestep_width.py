"""Measure width by timestep: `python bench/timestep_width.py [--rounds N] [--steps N] [time] [error]`.

Writes bench/results/timestep_width_*.csv.

time   a Flux of width 512 with random weights (bench/region.py), 1024 image and 16 text tokens, float32, CPU, process time: calls in slices
       against dense ones, medians of interleaved rounds; `first_ms`: the first call of a bucket, which makes its narrower layers.
error  the tiny model at 64×64, eight seeds, guidance 3, a table of ten buckets for each target: ‖z − z₀‖/‖z₀‖ against the plain run, the
       FLOPs of the steps that were made, and the plain model with fewer steps beside it.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rectiflow.accel.prune.width_run import apply_width_table, made_table
from rectiflow.metrics.fidelity import relative_errors
from rectiflow.nodes.timestep_width import RectiflowApplyTimestepWidth, RectiflowTimestepWidthTable
from region import SEEDS, Stamped, guided, wide_flux
from table import write_table

TIME_HEADER = ["target", "sigma", "flops_share", "dense_ms", "first_ms", "slice_ms", "of_dense"]
ERROR_HEADER = ["target", "run_flops", "heads_low", "heads_high", "channels_low", "channels_high", "error", "worst"]


def time_rows(rounds: int) -> list[list]:
    model = wide_flux(512)
    text = [[torch.zeros(1, 16, 64), {"pooled_output": torch.zeros(1, 64)}]]
    noise = torch.randn(1, 16, 64, 64, generator=torch.Generator().manual_seed(1))
    stamps = Stamped()
    plain, rows = stamps.on(model), []

    def run(watched, sigmas):
        guided(watched, text, text, noise, sigmas)

    for target in (0.5, 0.7, 0.9):
        table = made_table(model, run, tuple(noise.shape), 16, 1, target, "bench")
        narrow = apply_width_table(stamps.on(model), table, "slice", "bench")
        times = []
        for _ in range(rounds):
            guided(plain, text, text, noise, torch.tensor([0.6, 0.4, 0.0]))
            dense = stamps.spans[-1]
            guided(narrow, text, text, noise, torch.tensor([0.6, 0.4, 0.0]))  # the second call has its layers
            times.append((dense, *stamps.spans[-2:]))
        middle = [f"{1000 * statistics.median(part):.0f}" for part in zip(*times)]
        of_dense = statistics.median(last / dense for dense, _, last in times)
        rows.append([target, "0 to 1", f"{table.flops[0]:.3f}", *middle, f"{of_dense:.3f}"])
    return rows


def kept_shares(table, heads: bool) -> list[str]:
    """Units kept in the lower and the upper half of sigma, of all."""
    mine = {key: count for key, count in table.counts.items() if key[1].startswith("heads") == heads}
    whole = sum(mine.values())
    shares = [sum(len(kept.get(key, range(count))) for key, count in mine.items()) / whole for kept in table.kept]
    half = len(shares) // 2
    return [f"{statistics.mean(part):.2f}" for part in (shares[:half], shares[half:])]


def error_rows(steps: int) -> list[list]:
    from rectiflow.host import calculate_sigmas
    from rectiflow.host.embedded import make_host
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    tiny = TinyRuns(make_host())
    x = tiny.noise(SEEDS)
    plain = tiny.sample("noto cat", x, steps=steps)
    sigmas = calculate_sigmas(tiny.model.get_model_object("model_sampling"), "simple", steps)[:-1].tolist()

    def row(z: torch.Tensor, *case) -> list:
        errors = relative_errors(z, plain).tolist()
        return [*case, f"{statistics.mean(errors):.4f}", f"{max(errors):.4f}"]

    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    given = {"positive": tiny.conditioning("noto cat"), "negative": tiny.conditioning(""), "latent": latent}
    rows = []
    for target in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        table, _ = RectiflowTimestepWidthTable().execute(model=tiny.model, **given, target_flops=target, buckets=10, cfg=3.0, seed=0)
        (model,) = RectiflowApplyTimestepWidth().execute(model=tiny.model, table=table, exec="slice")
        share = statistics.mean(table.flops[min(int(sigma * 10), 9)] for sigma in sigmas)
        widths = [*kept_shares(table, True), *kept_shares(table, False)]
        rows.append(row(tiny.sample("noto cat", x, model=model, steps=steps), target, f"{share:.3f}", *widths))
    for fewer in (steps - 1, steps - 2, steps - 4):
        z = tiny.sample("noto cat", x, steps=fewer)
        rows.append(row(z, f"plain, {fewer} of {steps} steps", f"{fewer / steps:.3f}", "", "", "", ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["time", "error"], help="time, error; both when none is named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    if "time" in arguments.what:
        write_table("timestep_width_time", TIME_HEADER, time_rows(arguments.rounds))
    if "error" in arguments.what:
        write_table("timestep_width_error", ERROR_HEADER, error_rows(arguments.steps))


if __name__ == "__main__":
    main()
