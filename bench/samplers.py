"""Measure the samplers room: `python bench/samplers.py [--quick] [--tables …]`. Prints three tables, writes bench/results/samplers_*.csv.

    order       inversion error against a 2000-step RK4 on the mixture flow, and the order fitted over 20 to 160 steps
    round_trip  x0 → z → x0 at equal total evaluations, and the error of z alone against the exact noise
    overhead    seconds of a run on the tiny model against the bare loop of the same model calls

Everything is on the CPU; seconds are process time, so set OMP_NUM_THREADS=1. The flows are those of tests/samplers/flows.py.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rectiflow.samplers.registry import SOLVERS
from rectiflow.tests.samplers.flows import MixtureFlow, fitted_order, rk4_reference, rmse
from table import write_table

STEPS = (20, 40, 80, 160)
BUDGETS = (20, 40, 60, 120)


def rising(steps: int) -> torch.Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def steps_within(solver, budget: int) -> int:
    """The most steps whose evaluations fit into `budget`."""
    steps = 0
    while solver.nfe(steps + 1) <= budget:
        steps += 1
    return steps


def bench_order(flow: MixtureFlow, data: torch.Tensor, noise: torch.Tensor) -> None:
    rows = []
    for name, solver in SOLVERS.items():
        errors = [rmse(solver.function(flow, data, rising(steps)), noise) for steps in STEPS]
        rows.append([name, solver.order, f"{fitted_order(list(STEPS), errors):.3f}", *(f"{error:.3g}" for error in errors)])
    write_table("samplers_order", ["solver", "theory", "fitted", *(f"rmse_{steps}_steps" for steps in STEPS)], rows)


def bench_round_trip(flow: MixtureFlow, data: torch.Tensor, noise: torch.Tensor) -> None:
    rows = []
    for name, solver in SOLVERS.items():
        for budget in BUDGETS:
            steps = steps_within(solver, budget // 2)
            if steps < 2:
                continue
            flow.calls = 0
            z = solver.function(flow, data, rising(steps))
            back = solver.function(flow, z, rising(steps).flip(0))
            rows.append([name, budget, flow.calls, steps, f"{rmse(back, data):.3g}", f"{rmse(z, noise):.3g}"])
    write_table("samplers_round_trip", ["solver", "budget_nfe", "counted_nfe", "steps", "rmse_round_trip", "rmse_noise"], rows)


def tiny_denoiser():
    """`denoised = f(x, sigma)` of the tiny model with one prompt, through the host's model class, without a guider."""
    from rectiflow import NODE_CLASS_MAPPINGS

    model, clip, _ = NODE_CLASS_MAPPINGS["RectiflowLoadTiny"]().execute()
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("noto cat on blue"))
    context, pooled = conditioning[0][0], conditioning[0][1]["pooled_output"]
    return lambda x, sigma, **extra: model.model.apply_model(x, sigma, c_crossattn=context, y=pooled)


def bench_overhead(rounds: int, steps: int = 20) -> None:
    model = tiny_denoiser()
    x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(1, 0, steps + 1)
    rows = []
    for name, solver in SOLVERS.items():
        asked: list[tuple[torch.Tensor, torch.Tensor]] = []
        solver.function(lambda x, sigma, asked=asked: (asked.append((x, sigma)), model(x, sigma))[1], x, sigmas)
        bare, ours = [], []
        for _ in range(rounds):  # alternating, so that a slow moment of the machine hits both
            start = time.process_time()
            with torch.no_grad():
                for state, sigma in asked:
                    model(state, sigma)
            bare.append(time.process_time() - start)
            start = time.process_time()
            solver.function(model, x, sigmas)
            ours.append(time.process_time() - start)
        # What the sampler itself does, apart from the model: the same run with calls that cost nothing.
        start = time.process_time()
        for _ in range(20):
            solver.function(lambda x, sigma: x, x, sigmas)
        own = (time.process_time() - start) / 20
        seconds = statistics.median(bare)
        measured = [f"{seconds:.4f}", f"{statistics.median(ours):.4f}", f"{own * 1e6 / steps:.0f}", f"{100 * own / seconds:.2f}"]
        rows.append([name, len(asked), *measured])
    write_table("samplers_overhead", ["solver", "calls", "bare_loop_s", "sampler_s", "own_us_per_step", "own_percent"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 points and 3 rounds instead of 512 and 7")
    parser.add_argument("--tables", nargs="+", choices=("order", "round_trip", "overhead"), default=("order", "round_trip", "overhead"))
    arguments = parser.parse_args()
    quick = arguments.quick
    flow = MixtureFlow()
    data = flow.data(128 if quick else 512)
    noise = rk4_reference(flow, data, 0.0, 1.0)
    if "order" in arguments.tables:
        bench_order(flow, data, noise)
    if "round_trip" in arguments.tables:
        bench_round_trip(flow, data, noise)
    if "overhead" in arguments.tables:
        bench_overhead(3 if quick else 7)


if __name__ == "__main__":
    main()
