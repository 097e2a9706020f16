"""Measure inversion and editing on the tiny model: `python bench/editing.py [--quick] [--tables …]` → bench/results/editing_*.csv.

    reconstruction  PSNR, SSIM and feature distance of x0 → z → x0 at 20, 40 and 60 evaluations: every inversion, caption and empty prompt
    steepness       why the empty prompt is hard: what each half of the round trip errs, and how the way down enlarges it
    methods         likeness inside and outside the edited region, and the class margin inside, of every method at its best setting and at
                    equal evaluations (edit_methods.py says how they are chosen)
    figure          docs/inversion_prompts.png, drawn from the table of reconstruction
    features        bytes and seconds of RF-Edit's bank: held, capped to nothing, and the plain run

Pictures to reconstruct: the 32 held-out ones of bench/pictures under their captions, or every PNG of --pictures, whose file name is its
caption ("noto cat on white.png"). The codec's own loss is taken out: results are compared with the decoded latent. Everything is on the CPU
with seed 0, cfg 1; seconds are process time, so set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from edit_methods import bench_methods, prompt_rows
from held_out import load_held_out
from PIL import Image
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.host import KSAMPLER, sample_custom
from rectiflow.metrics.fidelity import figures
from rectiflow.metrics.plot import Chart, Series, line_chart
from rectiflow.samplers.feature_sharing import EDIT_SOLVERS
from rectiflow.samplers.inversion import INVERTERS, InvertSampler, inversion_sigmas
from rectiflow.samplers.registry import SOLVERS
from rectiflow.samplers.sampler_object import FlowSampler
from table import RESULTS, write_table

BUDGETS = (20, 40, 60)
ROWS = 8  # pictures in one model call
PROMPTS = {"smiling cat": ("noto cat on white", "noto dog on white")}


class Bench:
    """The model, its codec and prompts."""

    def __init__(self):
        self.model, self.clip, self.vae = NODES["RectiflowLoadTiny"]().execute()
        self.empty = self.prompt("")

    def prompt(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))


@dataclass(frozen=True)
class Pictures:
    """captions: one a picture; latent: `(b, 16, h, w)`; decoded: what the codec makes of it, `(b, h, w, 3)` in 0…1."""

    captions: tuple[str, ...]
    latent: torch.Tensor
    decoded: torch.Tensor

    @classmethod
    def load(cls, bench: Bench, folder: str | None, count: int | None) -> Pictures:
        if folder is None:
            found = [(entry.caption, picture) for entry, picture in load_held_out()]
        else:
            found = [(path.stem, on_white(path)) for path in sorted(Path(folder).glob("*.png"))]
        found = found[:count]
        latent = bench.vae.encode(torch.from_numpy(numpy.stack([picture for _, picture in found])).float() / 255)
        return cls(tuple(caption for caption, _ in found), latent, bench.vae.decode(latent))

    def conditioning(self, bench: Bench, kind: str) -> list:
        """One row a picture: its caption, or the empty prompt."""
        return prompt_rows(bench, [caption if kind == "caption" else "" for caption in self.captions])

    def split(self) -> list[Pictures]:
        """The same, ROWS at a time."""
        places = range(0, len(self.captions), ROWS)
        return [Pictures(self.captions[at : at + ROWS], self.latent[at : at + ROWS], self.decoded[at : at + ROWS]) for at in places]


def on_white(path: Path) -> numpy.ndarray:
    with Image.open(path) as picture:
        rgba = picture.convert("RGBA").resize((64, 64))
    return numpy.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def uniform(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1)


def calls_of(inverter: str, steps: int) -> int:
    """Evaluations of inversion and way back."""
    there = {"uni_inv": steps + 1, "fixed_point": 3 * steps}.get(inverter)
    back = SOLVERS[EDIT_SOLVERS[inverter]].nfe(steps) - (inverter == "heun")
    return (SOLVERS[inverter].nfe(steps) if there is None else there) + back


def walked(bench: Bench, sampler, sigmas: torch.Tensor, latent: torch.Tensor, conditioning: list) -> torch.Tensor:
    none = torch.zeros_like(latent)
    return sample_custom(bench.model, none, 1.0, sampler, sigmas, conditioning, conditioning, latent, disable_pbar=True, seed=0)


def down(solver: str) -> FlowSampler:
    return FlowSampler(KSAMPLER(SOLVERS[solver].function, {}), "latent")


def reconstructed(bench: Bench, inverter: str, steps: int, latent: torch.Tensor, conditioning: list) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 → z → x0; returns what came back and z."""
    z = walked(bench, InvertSampler(inverter), inversion_sigmas(uniform(steps)), latent, conditioning)
    return walked(bench, down(EDIT_SOLVERS[inverter]), uniform(steps), z, conditioning), z


def round_trip(bench: Bench, pictures: Pictures, prompt: str, inverter: str, steps: int) -> tuple[torch.Tensor, list[float]]:
    """PSNR of each picture, and means of mse, psnr, ssim, feature distance and the noise's spread."""
    feature_distance = NODES["RectiflowFeatureDistance"]().execute
    psnr, rest = [], []
    for part in pictures.split():
        back, z = reconstructed(bench, inverter, steps, part.latent, part.conditioning(bench, prompt))
        result = bench.vae.decode(back)
        near = figures(result, part.decoded, None, "gaussian", 1.0, "bench")
        apart = feature_distance(image=result, reference=part.decoded, sigma=0.2, blocks="double:1-2, single:0-2", seed=0)[0]
        psnr.append(near.psnr)
        rest.append([float(near.mse.mean()), float(near.psnr.mean()), float(near.ssim.mean()), float(apart), float(z.std())])
    return torch.cat(psnr), [statistics.mean(column) for column in zip(*rest)]


def bench_reconstruction(bench: Bench, pictures: Pictures, budgets: tuple[int, ...]) -> None:
    rows = []
    for prompt in ("caption", "empty"):
        for budget in budgets:
            plain = None
            for name in sorted(INVERTERS, key=lambda name: name != "euler"):  # Euler first, the others are compared with it
                steps = max(count for count in range(1, budget) if calls_of(name, count) <= budget)
                psnr, (mse, mean, ssim, apart, std) = round_trip(bench, pictures, prompt, name, steps)
                plain = psnr if plain is None else plain
                better = f"{int((psnr > plain).sum())}/{len(psnr)}"
                shown = [f"{mse:.6f}", f"{mean:.2f}", f"{float(psnr.min()):.2f}", f"{ssim:.4f}", f"{apart:.4f}", f"{std:.3f}", better]
                rows.append([prompt, budget, name, calls_of(name, steps), steps, *shown])
                print("  ".join(map(str, rows[-1])), flush=True)
    header = ["prompt", "budget", "inversion", "nfe", "steps", "mse", "psnr", "psnr_worst", "ssim", "feature_distance", "noise_std"]
    write_table("editing_reconstruction", [*header, "better_than_euler"], rows)


def draw_figure() -> None:
    """PSNR over evaluations of the reconstruction table: the caption's lines beside those of the empty prompt."""
    with open(RESULTS / "editing_reconstruction.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for prompt, name in itertools.product(("caption", "empty"), ("euler", "rf_solver", "heun")):
        points = [(float(row["nfe"]), float(row["psnr"])) for row in rows if (row["prompt"], row["inversion"]) == (prompt, name)]
        lines.append(Series(f"{name}, {prompt}", tuple(points)))
    chart = Chart("32 held-out pictures: noise and back", "evaluations", "PSNR, dB", x_ticks=(20.0, 40.0, 60.0), width=760)
    pixels = (line_chart(lines, chart)[0] * 255).round().byte().numpy()
    Image.fromarray(pixels).save(Path(__file__).parents[1] / "docs" / "inversion_prompts.png", optimize=True)


def bench_steepness(bench: Bench, pictures: Pictures, fine: int) -> None:
    """Where the round trip errs. Truth is RF-Solver at `fine` steps.

    up       RMS error of the noise that the solver finds
    growth   RMS error of x0 over that of the noise, when that noise is brought back exactly: the flow's own factor
    down     RMS error of x0 when the solver brings back the true noise
    round    RMS error of x0 when it brings back its own
    """
    rows, part = [], pictures.split()[0]
    for prompt in ("caption", "empty"):
        conditioning = part.conditioning(bench, prompt)
        z = walked(bench, InvertSampler("rf_solver"), inversion_sigmas(uniform(fine)), part.latent, conditioning)
        truth = walked(bench, down("rf_solver"), uniform(fine), z, conditioning)
        for solver, steps in (("euler", 20), ("rf_solver", 10), ("heun", 10)):
            found = walked(bench, InvertSampler(solver), inversion_sigmas(uniform(steps)), part.latent, conditioning)
            exactly = walked(bench, down("rf_solver"), uniform(fine), found, conditioning)
            below, both = (walked(bench, down(solver), uniform(steps), start, conditioning) for start in (z, found))
            up = rms(found - z)
            errors = [up, rms(exactly - truth) / up, rms(below - truth), rms(both - part.latent)]
            medians = [f"{float(error.median()):.4f}" for error in errors]
            rows.append([prompt, solver, steps, *medians, f"{float(rms(truth - part.latent).median()):.4f}"])
    write_table("editing_steepness", ["prompt", "solver", "steps", "up", "growth", "down", "round", "round_of_truth"], rows)


def rms(x: torch.Tensor) -> torch.Tensor:
    """Of each row, `(b,)`."""
    return x.square().flatten(1).mean(1).sqrt()


def bench_features(bench: Bench, rounds: int) -> None:
    """What sharing costs: 14 steps, 8 of them shared, the later half of the single blocks; seconds of the fastest round."""
    latent = bench.vae.encode(NODES["RectiflowExamplePicture"]().execute(picture="smiling cat")[0])
    source, target = (bench.prompt(text) for text in PROMPTS["smiling cat"])
    cases = {"no features": (0, 0, 8.0), "held": (8, 8, 8.0), "made again": (8, 8, 0.0)}
    found: dict[str, list] = {label: [] for label in cases}
    for _ in range(rounds):  # alternating, so that a slow moment of the machine hits all
        for label, (save, inject, cap) in cases.items():
            start = time.process_time()
            z, bank, _ = NODES["RectiflowFlowInvert"]().execute(
                model=bench.model, source=source, latent={"samples": latent}, sigmas=uniform(14), solver="rf_solver", save_steps=save,
                blocks="single:3-5", max_gib=cap,
            )
            middle, held = time.process_time(), bank.nbytes
            (sampler,) = NODES["RectiflowRFEditSampler"]().execute(
                features=bank, inject_steps=inject, match="interval", tokens="all", rows="cond_and_uncond", strength=1.0
            )
            none = torch.zeros_like(latent)
            sample_custom(bench.model, none, 2.0, sampler, uniform(14), target, bench.empty, z["samples"], disable_pbar=True, seed=0)
            found[label].append((held, bank.remade, middle - start, time.process_time() - middle, bank.nbytes))
    rows = []
    for label, runs in found.items():
        held, remade, _, _, after = runs[-1]
        rows.append([label, held, remade, f"{min(run[2] for run in runs):.3f}", f"{min(run[3] for run in runs):.3f}", after])
    write_table("editing_features", ["features", "bytes_held", "made_again", "inversion_s", "edit_s", "bytes_after"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("reconstruction", "figure", "steepness", "methods", "features")
    parser.add_argument("--quick", action="store_true", help="8 pictures, budgets 20 and 40, one round")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables, help="only these")
    parser.add_argument("--pictures", help="a folder of PNG files to reconstruct in place of the held-out ones")
    arguments = parser.parse_args()
    bench, chosen = Bench(), arguments.tables
    pictures = Pictures.load(bench, arguments.pictures, 8 if arguments.quick else None)
    if "reconstruction" in chosen:
        bench_reconstruction(bench, pictures, BUDGETS[:2] if arguments.quick else BUDGETS)
    if "figure" in chosen:
        draw_figure()
    if "steepness" in chosen:
        bench_steepness(bench, pictures, 40 if arguments.quick else 60)
    if "methods" in chosen:
        bench_methods(bench, arguments.quick)
    if "features" in chosen:
        bench_features(bench, 1 if arguments.quick else 7)


if __name__ == "__main__":
    main()
