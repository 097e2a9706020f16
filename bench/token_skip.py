"""Measure skipped MLPs: `python bench/token_skip.py [--rounds N] [--steps N] [time] [error]`. Writes bench/results/token_skip_*.csv.

time   one call of the Flux of width 256 of bench/region.py, 4096 image and 16 text tokens, float32, CPU, process time, medians of
       interleaved rounds, against the dense call; FLOPs as the report counts them. The same where MLPs weigh more: 1024 tokens, width 512.
error  the tiny model at 128×128, eight seeds, guidance 3: ‖z − z₀‖/‖z₀‖ against the plain run by ratio, router and reuse, and fewer
       steps of the plain model beside it, with the FLOPs of the whole run.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rectiflow.accel.region.skip_binding import SkipLog, attach_token_skip
from rectiflow.accel.region.token_skip import REUSES, ROUTERS, TokenSkip
from rectiflow.metrics.fidelity import relative_errors
from region import SEEDS, Stamped, guided, wide_flux
from table import write_table

TIME_HEADER = ["width", "tokens", "ratio", "reuse", "mlp_share", "flops_share", "dense_ms", "skipping_ms", "of_dense", "kept_mib"]
ERROR_HEADER = ["ratio", "router", "reuse", "run_flops", "error", "worst"]


def time_rows(width: int, side: int, rounds: int) -> list[list]:
    model = wide_flux(width)
    text = [[torch.zeros(1, 16, 64), {"pooled_output": torch.zeros(1, 64)}]]
    noise = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(1))
    stamps = Stamped()  # stands outside of what skips
    cases = {"dense": (stamps.on(model), None)}
    for reuse in REUSES:
        for ratio in (0.25, 0.5, 0.75):
            log = SkipLog()
            plan = TokenSkip(ratio, "latent_variance", reuse, start=0.5)
            cases[ratio, reuse] = (attach_token_skip(stamps.on(model), plan, log, "bench"), log)
    spans: dict = {case: [] for case in cases}
    for _ in range(rounds + 1):  # the first is a warm-up
        for case, (patched, _) in cases.items():
            guided(patched, text, text, noise, torch.tensor([0.6, 0.5, 0.0]))  # a whole step, then one that skips
            spans[case].append(stamps.spans[-1])
    rows = []
    for case, (_, log) in list(cases.items())[1:]:
        times = list(zip(spans["dense"][1:], spans[case][1:]))
        dense, skipping = (1000 * statistics.median(part) for part in zip(*times))
        few, whole, mlps = log.flops[16]
        of_dense = statistics.median(part / all_ for all_, part in times)
        rows.append([width, log.tokens[0], *case, f"{mlps / whole:.3f}", f"{few / whole:.3f}", f"{dense:.0f}", f"{skipping:.0f}",
                     f"{of_dense:.3f}", f"{log.kept_bytes / 2**20:.1f}"])  # fmt: skip
    return rows


def error_rows(steps: int) -> list[list]:
    from rectiflow.host.embedded import make_host
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    tiny = TinyRuns(make_host())
    x = tiny.noise(SEEDS, (128, 128))

    def draw(model=None, count: int = steps) -> torch.Tensor:
        return torch.cat([tiny.sample("noto cat", x[place : place + 4], model=model, steps=count) for place in (0, 4)])

    plain = draw()

    def row(z: torch.Tensor, *case) -> list:
        errors = relative_errors(z, plain).tolist()
        return [*case, f"{statistics.mean(errors):.4f}", f"{max(errors):.4f}"]

    cases = [(0.5, router, reuse) for router in ROUTERS for reuse in REUSES]
    cases += [(ratio, ROUTERS[0], reuse) for ratio in (0.25, 0.75) for reuse in REUSES]
    rows = []
    for case in sorted(cases):
        log = SkipLog()
        z = draw(attach_token_skip(tiny.model, TokenSkip(*case), log, "bench"))
        few, whole, _ = next(iter(log.flops.values()))
        share = (log.calls[0] * few + log.calls[1] * whole) / (sum(log.calls) * whole)
        rows.append(row(z, *case, f"{share:.3f}"))
    for fewer in (steps - 1, steps - 2, steps - 3):
        rows.append(row(draw(count=fewer), "", f"plain, {fewer} of {steps} steps", "", f"{fewer / steps:.3f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["time", "error"], help="time, error; both when none is named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    if "time" in arguments.what:
        rows = [row for width, side in ((256, 128), (512, 64)) for row in time_rows(width, side, arguments.rounds)]
        write_table("token_skip_time", TIME_HEADER, rows)
    if "error" in arguments.what:
        write_table("token_skip_error", ERROR_HEADER, error_rows(arguments.steps))


if __name__ == "__main__":
    main()
