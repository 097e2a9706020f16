"""Depth pruning at a third of the blocks: `python bench/prune.py [--steps N] [--seeds N]`; writes bench/results/prune_*.csv.

    python bench/deep_flow.py FILE && python bench/prune.py --deep FILE     the first two tables on 27 blocks: prune_deep.csv,
                                                                            prune_deep_students.csv
    python bench/prune.py --every                                           prune_every alone

    prune_selections   three of the tiny model's nine blocks left out by each method, then equal recovery (Recover Pruned, all weights that
                       are left, equal steps, batch and rate). "PPCL runs" by CKA, left out as the others are; "PPCL, fitted students" by
                       what answers and final latents lose with a fitted student in the place of each run, which then learns with the
                       rest. TinyFusion leaves out as many of each eight blocks as outcome does
    prune_students     students of the same two choices of runs, which alone learn, after as many steps and after twice as many: one of
                       these steps costs half of the others. PPCL's begin as copies, ours fitted
    prune_runs         PPCL's students alone: one run or three, the alternating stage alone or half of the steps on their own states
    prune_every        every choice of a third of the nine blocks, recovered alike, one seed: what a search could find at best
    prune_clock        process time of one call of the pruned network and of the whole one, interleaved rounds, best of each

Errors are of prompts and noises that no training saw, against the whole model: ‖v − v_t‖²/‖v_t‖² at points of the flow, the same of final
latents, and the feature distance of the pictures (docs/metrics.md). Seconds are process time of one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from deep_flow import HELD_OUT, SHOWN, load_deep
from rectiflow.accel.prune.apply import apply_plan, stack_under
from rectiflow.accel.prune.depth_masks import patterns_like
from rectiflow.accel.prune.identity import model_hash
from rectiflow.accel.prune.plan import PrunePlan
from rectiflow.accel.prune.scores import relative_error
from rectiflow.accel.prune.select import plan_without, protected
from rectiflow.accel.prune.students import apply_runs
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.nodes.metrics import RectiflowFeatureDistance
from rectiflow.nodes.pruning import host_services
from rectiflow.tests.contract.tiny_runs import TinyRuns
from rectiflow.train.distill_runs import RunSettings, distill_runs
from rectiflow.train.learn_depth import DepthSettings, learn_depth
from rectiflow.train.pool import Calibration, PoolData, inside, points, sample_pool, velocities
from rectiflow.train.prune_scores import OUTCOME, RunSearch, ScoreRequest, find_runs, score_blocks
from rectiflow.train.recovery import RecoverSettings, recover
from table import write_table

SHARE, PROTECT, WHERE = 1 / 3, "0, -1", "bench"
SEARCH = {"nine": (80, 4), "deep": (160, 8)}  # steps and draws a step of TinyFusion's search: of more blocks there are more choices
BATCH, LR, LR_STUDENTS = 4, 3e-4, 1e-3  # of 3e-4 and 1e-3 the better one for each after 40 steps
SCORES = ("random", "ends", "magnitude", "similarity", "sensitivity", "outcome")
FITTED = "PPCL, fitted students"
SEARCHES = {"PPCL": RunSearch(SHARE), FITTED: RunSearch(SHARE, merge=OUTCOME)}


class Bench:
    """A whole MODEL, the tiny one unless told, and what every pruned one is compared with.

    uniform: groups of single blocks that leave out a third of all blocks, as TinyFusion is published, beside those that outcome gives.
    methods: those to compare; none for all. search: steps and draws a step of TinyFusion's.
    """

    def __init__(self, tiny: TinyRuns, model=None, uniform: str = "", methods: tuple[str, ...] = (), search=SEARCH["nine"]):
        self.tiny, self.model, self.uniform, self.methods, self.search = tiny, model or tiny.model, uniform, methods, search
        self.stack = stack_under(self.model, WHERE)
        empty = tiny.conditioning("")
        prompts = [[entry for text in texts for entry in tiny.conditioning(text)] for texts in (SHOWN, HELD_OUT)]
        self.shown = Calibration(prompts[0], empty, (16, 16, 16), count=32, steps=8)
        self.held_out = Calibration(prompts[1], empty, (16, 16, 16), count=12, steps=8, seed=1000)
        self.fixed, self.wanted, self.latents = [], None, None
        self.errors(self.model)

    def errors(self, model) -> tuple[float, float, float]:
        """(velocity error, final latent error, feature distance) of MODEL `model` on what is held out."""
        found = {}

        def body(trainee) -> None:
            latents = sample_pool(trainee, self.held_out)
            if self.latents is None:
                self.latents = latents
                self.fixed = points(PoolData(latents, len(HELD_OUT)), 48, 1000)
                self.wanted = velocities(trainee, self.fixed)
            found["velocity"] = relative_error(velocities(trainee, self.fixed), self.wanted)
            found["latent"] = relative_error(latents, self.latents)
            out = trainee.model.process_latent_out
            found["pictures"] = [self.tiny.vae.decode(out(each)).clamp(0, 1) for each in (latents, self.latents)]

        inside(host_services().guider, model.clone(), self.held_out, body)
        with torch.inference_mode():
            distance, *_ = RectiflowFeatureDistance().execute(
                image=found["pictures"][0], reference=found["pictures"][1], sigma=0.2, blocks="double:1-2, single:0-2", seed=0
            )  # fmt: skip
        return found["velocity"], found["latent"], distance

    def seeded(self, seed: int) -> Calibration:
        return dataclasses.replace(self.shown, seed=seed)

    def selections(self, seed: int) -> dict[str, tuple[PrunePlan, float]]:
        """Method → (plan that leaves out a third of the blocks, process seconds of finding it)."""
        found = {}

        def timed(name: str, make) -> None:
            if self.methods and name not in self.methods:
                return
            start = time.process_time()
            plan = make()
            found[name] = (plan, time.process_time() - start)
            assert len(plan.removed(self.stack)) == round(SHARE * len(self.stack.blocks))

        for method in SCORES:
            request = ScoreRequest(method, SHARE, at=16)
            timed(method, lambda request=request: score_blocks(self.model, request, self.seeded(seed), host_services().guider, WHERE).plan)
        if "outcome" not in found:  # TinyFusion's groups follow it
            return found
        gone = found["outcome"][0].removed(self.stack)
        patterns = patterns_like(gone, self.stack, protected(PROTECT, self.stack, WHERE))
        timed("TinyFusion", lambda: self.learned(seed, patterns["double"], patterns["single"]).plan)
        if self.uniform:
            timed("TinyFusion, uniform groups", lambda: self.learned(seed, "", self.uniform).plan)
        timed("PPCL runs", lambda: self.runs(seed, SEARCHES["PPCL"]))
        timed(FITTED, lambda: self.runs(seed, SEARCHES[FITTED]))
        return found

    def runs(self, seed: int, search: RunSearch) -> PrunePlan:
        return find_runs(self.model, search, self.seeded(seed), host_services().guider, WHERE).plan

    def pruned(self, name: str, plan: PrunePlan, seed: int):
        """The model that recovery begins with: blocks left out, or fitted students, untrained, in their places."""
        return self.distilled(plan, seed, 1, lr=0.0, init="fitted")[0] if name == FITTED else apply_plan(self.model, plan, WHERE)

    def learned(self, seed: int, double: str, single: str):
        steps, batch = self.search
        settings = DepthSettings(
            double_pattern=double, single_pattern=single, protect=PROTECT, steps=steps, batch=batch, lr_logits=5e-3, lr_lora=3e-4,
            tau_end=0.5, ema=0.9, seed=seed,
        )  # fmt: skip
        return learn_depth(self.model, settings, self.seeded(seed), None, host_services())

    def recovered(self, model, seed: int, steps: int):
        settings = RecoverSettings(steps=steps, batch=BATCH, seed=seed, learns="all", lr=LR, ema=0.9)
        return recover(model, self.model, settings, self.seeded(seed), None, host_services()).model

    def distilled(self, plan: PrunePlan, seed: int, steps: int, **changed):
        """(The model with students of the plan's runs after `steps`, what was distilled)."""
        settings = RunSettings(**{"steps": steps, "batch": BATCH, "seed": seed, "lr": LR_STUDENTS, "ema": 0.9, **changed})
        done = distill_runs(self.model, plan, settings, self.seeded(seed), None, host_services())
        plan = dataclasses.replace(done.plan, students={path: "in memory" for path in done.students})
        return apply_runs(self.model, plan, done.students, WHERE), done


def names_out(bench: Bench, plan: PrunePlan) -> str:
    return " ".join(block.name for block in plan.removed(bench.stack))


def selections(bench: Bench, seeds: int, steps: int, table: str = "prune_selections") -> dict[str, PrunePlan]:
    rows, figures, plans = [], {}, {}
    for seed in range(seeds):
        chosen, known = bench.selections(seed), {}
        for name, (plan, seconds) in chosen.items():
            out = names_out(bench, plan)
            key = (out, name == FITTED)
            if key not in known:  # methods that agree train alike
                start = time.process_time()
                pruned = bench.pruned(name, plan, seed)
                done = bench.recovered(pruned, seed, steps)
                spent = time.process_time() - start
                known[key] = (bench.errors(pruned)[0], spent, bench.errors(done))
            before, spent, errors = known[key]
            _row(rows, figures, (name, seed, out, before, seconds, spent), errors)
            plans.setdefault(name, plan)
    _summary(rows, figures)
    header = ("selection", "seed", "left_out", "velocity_error_before", "velocity_error", "latent_error", "feature_distance",
              "search_seconds", "recovery_seconds")  # fmt: skip
    write_table(table, (*header, "steps", "batch"), [(*row, steps, BATCH) for row in rows])
    return plans


def students(bench: Bench, seeds: int, steps: int, table: str = "prune_students") -> None:
    """Students alone, after as many steps as the recovery of prune_selections, and after twice as many."""
    rows, figures = [], {}
    for seed in range(seeds):
        for name, search in SEARCHES.items():
            plan = bench.runs(seed, search)
            for count in (steps, 2 * steps):
                start = time.process_time()
                model, _ = bench.distilled(plan, seed, count, own_share=0.5, init="fitted" if name == FITTED else "middle")
                seconds = time.process_time() - start
                _row(rows, figures, (f"{name}, {count} steps", seed, names_out(bench, plan), 0.0, 0.0, seconds), bench.errors(model))
    _summary(rows, figures)
    header = ("students", "seed", "left_out", "velocity_error", "latent_error", "feature_distance", "seconds")
    write_table(table, (*header, "batch"), [(*row[:3], *row[4:7], row[8], BATCH) for row in rows])


def _summary(rows: list, figures: dict) -> None:
    """Mean and deviation over the seeds, below the rows."""
    for name, each in figures.items():
        columns = list(zip(*each))
        means = [f"{statistics.mean(column):.4f}" for column in columns]
        spread = [f"{statistics.stdev(column):.4f}" if len(column) > 1 else "" for column in columns]
        rows.append((name, "mean", "", "", *means, "", ""))
        rows.append((name, "deviation", "", "", *spread, "", ""))


def _row(rows: list, figures: dict, entry: tuple, errors: tuple) -> None:
    name, seed, out, before, seconds, spent = entry
    figures.setdefault(name, []).append(errors)
    rows.append((name, seed, out, f"{before:.4f}", *(f"{error:.4f}" for error in errors), f"{seconds:.1f}", f"{spent:.1f}"))
    print(*rows[-1], flush=True)


def runs(bench: Bench, steps: int) -> None:
    """Do errors of students add up? One run, or three of two blocks."""
    rows = []
    for longest in (10, 2):
        plan = find_runs(bench.model, RunSearch(SHARE, longest), bench.shown, host_services().guider, WHERE).plan
        for share in (0.0, 0.5):
            model, done = bench.distilled(plan, 0, steps, own_share=share, init="middle")
            report, errors = done.report, bench.errors(model)
            each = " ".join(f"{path} {error:.4f}" for path, error in report["velocity_error"].items() if path != "all")
            ratio = report["error_of_all"] / report["root_of_squares_of_single"]
            sizes = " ".join(f"{value:.3f}" for value in report["norm_ratio"].values())
            rows.append((len(plan.runs), share, each, f"{report['velocity_error']['all']:.4f}", f"{ratio:.3f}", sizes,
                         *(f"{error:.4f}" for error in errors)))  # fmt: skip
    header = ("runs", "own_share", "velocity_error_of_single_runs", "of_all_runs", "all_over_root_of_squares", "norm_ratio",
              "velocity_error_held_out", "latent_error_held_out", "feature_distance_held_out")  # fmt: skip
    write_table("prune_runs", (*header, "steps", "batch"), [(*row, steps, BATCH) for row in rows])


def every(bench: Bench, steps: int, seed: int = 0) -> None:
    keep, base, rows = protected(PROTECT, bench.stack, WHERE), model_hash(bench.model), []
    free = [block for block in bench.stack.blocks if block.path not in keep]
    for gone in itertools.combinations(free, round(SHARE * len(bench.stack.blocks))):
        plan = plan_without(gone, bench.stack, base, WHERE)
        pruned = apply_plan(bench.model, plan, WHERE)
        figures = (bench.errors(pruned)[0], *bench.errors(bench.recovered(pruned, seed, steps)))
        rows.append((names_out(bench, plan), *(f"{figure:.4f}" for figure in figures), steps, BATCH))
        print(*rows[-1], flush=True)
    rows.sort(key=lambda row: row[2])
    header = ("left_out", "velocity_error_before", "velocity_error", "latent_error", "feature_distance", "steps", "batch")
    write_table("prune_every", header, rows)


def clock(bench: Bench, plans: dict[str, PrunePlan], rounds: int, calls: int = 4) -> None:
    """Best process time of a call of 8 rows over interleaved rounds."""
    models = {"whole": bench.model, **{name: bench.pruned(name, plan, 0) for name, plan in plans.items()}}
    best = dict.fromkeys(models, float("inf"))

    def measure(trainee, name: str) -> None:
        point = next(entry for entry in bench.fixed if len(entry[0]) == 8)
        with torch.no_grad():
            trainee.velocity(*point)
            start = time.process_time()
            for _ in range(calls):
                trainee.velocity(*point)
        best[name] = min(best[name], (time.process_time() - start) / calls)

    for _ in range(rounds):
        for name, model in models.items():
            inside(host_services().guider, model.clone(), bench.held_out, lambda trainee, name=name: measure(trainee, name))
    whole = bench.model.model_size()
    rows = [
        (name, names_out(bench, plans[name]) if name in plans else "", f"{1e3 * seconds:.2f}", f"{best['whole'] / seconds:.3f}",
         f"{models[name].model_size() / whole:.3f}", rounds) for name, seconds in best.items()
    ]  # fmt: skip
    write_table("prune_clock", ("selection", "left_out", "process_ms_a_call", "speed_up", "share_of_bytes", "rounds"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--deep", type=Path, help="prune_deep and its students alone, on this file of bench/deep_flow.py")
    parser.add_argument("--methods", nargs="+", default=(), help="of --deep, outcome among them: these alone, in prune_deep_<steps>")
    parser.add_argument("--students", action="store_true", help="prune_students alone")
    parser.add_argument("--every", action="store_true", help="prune_every alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    host = make_host(Path(tempfile.mkdtemp()), settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(host):
        tiny = TinyRuns(host)
        if given.deep:
            deep = Bench(tiny, load_deep(given.deep), "5:8", tuple(given.methods), SEARCH["deep"])
            if given.methods:
                selections(deep, given.seeds, given.steps, f"prune_deep_{given.steps}")
                return
            selections(deep, given.seeds, given.steps, "prune_deep")
            students(deep, given.seeds, given.steps, "prune_deep_students")
            return
        bench = Bench(tiny)
        if given.students:
            students(bench, given.seeds, given.steps)
            return
        if given.every:
            every(bench, given.steps)
            return
        clock(bench, selections(bench, given.seeds, given.steps), given.rounds)
        students(bench, given.seeds, given.steps)
        runs(bench, given.steps)


if __name__ == "__main__":
    main()
