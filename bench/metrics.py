"""Measure the metrics room: `python bench/metrics.py [--quick] [--tables …]`. Prints four tables, writes bench/results/metrics_*.csv.

    straightness   S(Z) of analytic flows beside their quadrature, and of the tiny model at several guidance scales
    solvers        Solver Compare on the tiny model: error against a fine reference at equal model calls
    distances      PSNR, SSIM and feature distance of changes to the example pictures
    cost           seconds of the figures at common sizes, and of a run with a stopwatch against one without

Everything is on the CPU; milliseconds of the last table are process time, so set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from functools import partial

import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.host import CFGGuider, prepare_noise, sampler_object
from rectiflow.metrics.fidelity import figures, psnr, ssim
from rectiflow.samplers.straightness import PathRecord, sample_recorded, straightness
from rectiflow.tests.samplers.flows import GaussianFlow, MixtureFlow
from table import write_table


class Noise:
    """A NOISE from a seed."""

    seed = 7

    def generate_noise(self, latent):
        return prepare_noise(latent["samples"], self.seed)


class Tiny:
    """The tiny model and what every table needs of it."""

    def __init__(self):
        self.model, self.clip, self.vae = NODES["RectiflowLoadTiny"]().execute()

    def guider(self, cfg: float, model=None) -> CFGGuider:
        guider = CFGGuider(model or self.model)
        guider.set_conds(*(self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)) for text in ("noto fox on green", "")))
        guider.set_cfg(cfg)
        return guider


def uniform(steps: int) -> torch.Tensor:
    return NODES["RectiflowUniformFlowSigmas"]().execute(steps=steps, start=1.0, end=0.0)[0]


def empty(batch: int) -> dict:
    return {"samples": torch.zeros(batch, 16, 16, 16)}



def analytic(flow, noise: torch.Tensor, steps: int):
    record = PathRecord()
    sample_recorded(flow, noise, torch.linspace(1, 0, steps + 1, dtype=torch.float64), disable=True, record=record)
    return straightness(record)


def bench_straightness(tiny: Tiny, quick: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for name, flow in (("Gaussian, mean .7, sd .5", GaussianFlow()), ("mixture of 4 in R^16", MixtureFlow())):
        noise = torch.randn(512, 16, generator=generator, dtype=torch.float64)
        fine = analytic(flow, noise, 1000).value
        for steps in (10, 20, 40):
            found = analytic(flow, noise, steps)
            rows.append([name, steps, f"{found.value:.5f}", f"{found.relative:.4f}", f"{abs(found.value / fine - 1):.2%}"])
    steps, paths = (8, 2) if quick else (20, 8)
    for cfg in (1.0, 2.0, 3.0):
        value, relative, *_ = NODES["RectiflowFlowStraightness"]().execute(
            noise=Noise(), guider=tiny.guider(cfg), sigmas=uniform(steps), latent_image=empty(paths)
        )
        rows.append([f"tiny model, cfg {cfg:g}, {paths} paths", steps, f"{value:.5f}", f"{relative:.4f}", ""])
    write_table("metrics_straightness", ["flow", "steps", "S", "relative", "off_1000_steps"], rows)


def bench_solvers(tiny: Tiny, quick: bool) -> None:
    *_, table, report = NODES["RectiflowSolverCompare"]().execute(
        noise=Noise(), guider=tiny.guider(1.0), latent_image=empty(1 if quick else 4), vae=tiny.vae,
        solvers="euler, ab2, fireflow, rf_solver, heun, rk4", nfe="4, 8" if quick else "4, 8, 16, 32", scheduler="uniform",
        reference_steps=8 if quick else 40, scale=1,
    )  # fmt: skip
    header, *rows = csv.reader(table.splitlines())
    write_table("metrics_solvers", header, rows)
    print("  " + report.splitlines()[-1])


def changes(picture: torch.Tensor) -> dict[str, torch.Tensor]:
    grain = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    planes = picture.movedim(-1, 1)
    return {
        "brightness × 0.9": picture * 0.9,
        "noise 0.05": (picture + 0.05 * grain).clamp(0, 1),
        "noise 0.2": (picture + 0.2 * grain).clamp(0, 1),
        "5×5 blur": torch.nn.functional.avg_pool2d(planes, 5, 1, 2, count_include_pad=False).movedim(1, -1),
        "shift by 2 pixels": picture.roll(2, 2),
        "mirrored": picture.flip(2),
        "colours swapped": picture[..., [1, 2, 0]],
    }


def bench_distances(tiny: Tiny, quick: bool) -> None:
    cat, face = (NODES["RectiflowExamplePicture"]().execute(picture=name)[0] for name in ("smiling cat", "smiling face"))
    rows = []
    for name, changed in (changes(cat) | {"another thing (face)": face}).items():
        found = figures(changed, cat)
        distance, *_ = NODES["RectiflowFeatureDistance"]().execute(
            image=changed, reference=cat, sigma=0.2, blocks="double:1-2, single:0-2", seed=0
        )
        rows.append([name, f"{float(found.psnr):.2f}", f"{float(found.ssim):.4f}", f"{distance:.4f}"])
    write_table("metrics_distances", ["change to the cat", "psnr_db", "ssim", "feature_distance"], rows)


def seconds_of(call, rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def bench_cost(tiny: Tiny, quick: bool) -> None:
    rows = []
    for side in (64, 512, 1024):
        one, other = torch.rand(2, 1, side, side, 3, generator=torch.Generator().manual_seed(0))
        for name, figure in (("psnr", psnr), ("ssim", ssim)):
            rows.append([f"{name} {side}×{side}", f"{1000 * seconds_of(partial(figure, one, other), 3):.2f}"])
    watched, stopwatch = NODES["RectiflowStopwatch"]().execute(model=tiny.model)
    latent, sigmas, times = empty(1)["samples"], uniform(4), {"without": [], "with": []}
    for _ in range(2 if quick else 12):  # in turn, so that other work on the machine meets both alike
        for name, model in (("without", tiny.model), ("with", watched)):
            start = time.process_time()
            tiny.guider(1.0, model).sample(prepare_noise(latent, 7), latent, sampler_object("euler"), sigmas, disable_pbar=True, seed=7)
            times[name].append(time.process_time() - start)
    for name, values in times.items():
        rows.append([f"run of 4 calls {name} stopwatch, fastest", f"{1000 * min(values):.2f}"])
    write_table("metrics_cost", ["what", "milliseconds"], rows)


TABLES = {"straightness": bench_straightness, "solvers": bench_solvers, "distances": bench_distances, "cost": bench_cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few paths, calls and rounds: shows that it runs, not what it measures")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        tiny = Tiny()
        for name in options.tables:
            TABLES[name](tiny, options.quick)


if __name__ == "__main__":
    main()
