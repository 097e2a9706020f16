"""Measure and write a preset of Accelerate: `python bench/presets.py [--steps 28] [--pictures 8]`. Writes accel/cache/presets/flux.json and
bench/results/presets.csv.

Schedules are found on four prompts of the tiny model, whose blocks are those of Flux, for each target and budget, with errors of the guided
velocity, amplified weights and fitted forecasts; each is used on held-out prompts and seeds, beside what order 0 and order 1 without a fit
would give. A preset keeps the fitted one of every target and budget, whose cost is the lowest by construction: the held-out prompts choose
nothing. `--other-steps` then spreads each kept point over runs of other lengths, beside even steps of the same number and order.
"""

from __future__ import annotations

import argparse
import json

import torch
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.preset import FOLDER
from rectiflow.accel.cache.schedule import CacheSchedule
from rectiflow.accel.cache.schedule_search import SearchOptions, search_schedule
from rectiflow.accel.cache.scheduled import ScheduledCache
from rectiflow.accel.cache.search import even_steps
from rectiflow.accel.cache.spread import SpreadCache, SpreadSchedule, budget_of
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.host import calculate_sigmas
from schedules import HELD_OUT, LEARN, Bench
from table import write_csv

RATIOS = (1.33, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
HEADER = [
    "steps", "searched_on", "target", "order", "plan", "calls", "of", "psnr_mean", "psnr_worst", "latent_error_mean", "latent_error_worst",
    "open_loop", "kept",
]  # fmt: skip


def kept_points(bench: Bench, plain: torch.Tensor, prompts, steps: int, target: str, add) -> list[dict]:
    recording, found = bench.record(target, steps), []
    for ratio in RATIOS:
        budget = budget_of(ratio, steps)
        for order, fitted in ((0, False), (1, False), (1, True)):
            options = SearchOptions(budget, order, metric="guided", weights="amplified", fitted=fitted)
            schedule = search_schedule(recording, options, "bench").schedule
            figures = bench.figures(CachePlan(ScheduledCache.of(schedule), target, schedule=schedule), plain, prompts, steps)
            name = "searched and fitted" if fitted else "searched"
            add(steps, steps, target, order, name, *figures, f"{schedule.cost:.4f}", int(fitted))
        found.append({
            "ratio": round(steps / budget, 3), "psnr": float(figures[2]), "psnr_worst": float(figures[3]), "policy": "schedule",
            "target": target, "settings": {"order": schedule.order}, "shares": [round(step / steps, 5) for step in schedule.computed],
            **({"reach": list(schedule.reach)} if schedule.reach else {}),
        })  # fmt: skip
    return found


def spread_over(bench: Bench, points: list[dict], prompts, made_for: int, steps: int, add) -> None:
    """Points of a preset on runs of `steps`, beside even ones."""
    plain = bench.sample(bench.model, prompts, 1, steps)
    sigmas = tuple(calculate_sigmas(bench.model.get_model_object("model_sampling"), "simple", steps).tolist())
    for point in points:
        order, speed, target = point["settings"]["order"], point["ratio"], point["target"]
        schedule = SpreadSchedule(tuple(point["shares"]), speed, made_for, tuple(point.get("reach", ())))
        plan = CachePlan(SpreadCache(order, speed=speed), target, Limits(), schedule=schedule)
        add(steps, made_for, target, order, "spread", *bench.figures(plan, plain, prompts, steps), "", "")
        even = CacheSchedule(sigmas, even_steps(steps, budget_of(speed, steps)), order)
        plan = CachePlan(ScheduledCache.of(even), target, schedule=even)
        add(steps, "", target, order, "even", *bench.figures(plan, plain, prompts, steps), "", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=len(HELD_OUT), help="held-out prompts, at most all")
    parser.add_argument("--other-steps", type=int, nargs="*", default=[12, 50])
    arguments = parser.parse_args()
    prompts, steps = HELD_OUT[: arguments.pictures], arguments.steps
    bench, rows = Bench(), []

    def add(*values) -> None:
        rows.append(list(values))
        print("  ".join(f"{name} {value}" for name, value in zip(HEADER, rows[-1])), flush=True)

    plain = bench.sample(bench.model, prompts, 1, steps)
    points = [point for target in ("last_block", "output") for point in kept_points(bench, plain, prompts, steps, target, add)]
    measured_on = (
        f"Rectiflow Tiny (Flux layout, 64 × 64 pixels), Euler, simple schedule, {steps} steps, guidance 3: searched on {len(LEARN)} "
        f"prompts, measured on {len(prompts)} others"
    )
    preset = {"rectiflow_preset": 1, "family": "Flux", "measured_on": measured_on, "steps": steps}
    lines = ",\n".join("    " + json.dumps(point) for point in points)
    head = json.dumps(preset, ensure_ascii=False, indent=2).removesuffix("\n}")
    (FOLDER / "flux.json").write_text(f'{head},\n  "points": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    for other in arguments.other_steps:
        spread_over(bench, [point for point in points if point["target"] == "last_block"][1::2], prompts, steps, other, add)
    write_csv("presets", HEADER, rows)


if __name__ == "__main__":
    main()
