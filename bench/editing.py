"""Measure inversion and editing on the tiny model: `python bench/editing.py [--quick] [--pictures DIR]` → bench/results/editing_*.csv.

    reconstruction  PSNR, SSIM and feature distance of x0 → z → x0 at 20, 40, 60 and 120 evaluations, every inversion
    editing         likeness inside and outside the edited region, and the class margin, of every method at equal evaluations
    features        bytes and seconds of RF-Edit's bank: held, capped to nothing, and the plain run

Pictures: the two that ship (the model was not trained on them) and their mirror images, under their captions, or every PNG of --pictures,
whose file name is its caption ("noto cat on white.png"). The codec's own loss is taken out: results are compared with the decoded
latent. Everything is on the CPU with seed 0.

The class margin asks the model itself: its velocity error on the result under the source prompt less that under the target prompt,
mean over four sigmas and eight noises, divided by their sum. Above 0 the model finds the target likelier.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.host import KSAMPLER, CFGGuider, calc_cond_batch, cfg_function, sample_custom
from rectiflow.metrics.fidelity import figures
from rectiflow.samplers.edit_methods import EditTask, HostCalls, parse_methods, run_method
from rectiflow.samplers.feature_sharing import EDIT_SOLVERS
from rectiflow.samplers.inversion import INVERTERS, InvertSampler, inversion_sigmas
from rectiflow.samplers.registry import SOLVERS
from rectiflow.samplers.sampler_object import FlowSampler
from table import write_table

BUDGETS = (20, 40, 60, 120)
HOST = HostCalls(sample_custom, calc_cond_batch, cfg_function, CFGGuider, KSAMPLER)
PROMPTS = {"smiling cat": ("noto cat on white", "noto dog on white"), "smiling face": ("noto smile on white", "noto angry on white")}
# About 56 evaluations each; the settings stand in docs/editing.md, chosen on the smiling cat alone.
METHODS = """
euler steps=28 cfg=2
rf_edit steps=14 inject_steps=0 blocks=single:3-5 cfg=2
rf_edit steps=14 inject_steps=8 blocks=single:3-5 cfg=2
fireflow steps=27 inject_steps=15 blocks=single:3-5 cfg=2
rf_inversion steps=28 eta=0.9 end=0.25 cfg=2.5
flow_edit steps=34 skip=6 cfg=3.5
uni_edit steps=23 alpha=0.8 omega=1 cfg=2
"""


class Bench:
    """The model, its codec and prompts."""

    def __init__(self):
        self.model, self.clip, self.vae = NODES["RectiflowLoadTiny"]().execute()
        self.empty = self.prompt("")

    def prompt(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def velocity_error(self, latent: torch.Tensor, conditioning: list, draws: int = 8) -> float:
        """Mean squared error of the velocity at four sigmas, the noises alike for every prompt."""
        generator, total = torch.Generator().manual_seed(0), 0.0
        context, pooled = conditioning[0][0].expand(draws, -1, -1), conditioning[0][1]["pooled_output"].expand(draws, -1)
        with torch.no_grad():
            for sigma in (0.35, 0.5, 0.65, 0.8):
                noise = torch.randn(draws, *latent.shape[1:], generator=generator)
                x = (1 - sigma) * latent + sigma * noise
                denoised = self.model.model.apply_model(x, torch.full((draws,), sigma), c_crossattn=context, y=pooled)
                total += float(((x - denoised) / sigma - (noise - latent)).square().mean())
        return total

    def margin(self, latent: torch.Tensor, source: list, target: list) -> float:
        under_source, under_target = self.velocity_error(latent, source), self.velocity_error(latent, target)
        return (under_source - under_target) / (under_source + under_target)


def load_pictures(folder: str | None) -> list[tuple[str, torch.Tensor]]:
    """(caption, picture (1, h, w, 3) in 0…1) of each."""
    if folder is None:
        shipped = [(caption, NODES["RectiflowExamplePicture"]().execute(picture=name)[0]) for name, (caption, _) in PROMPTS.items()]
        return shipped + [(caption, picture.flip(2)) for caption, picture in shipped]
    import numpy
    from PIL import Image

    found = []
    for path in sorted(Path(folder).glob("*.png")):
        with Image.open(path) as picture:
            rgba = picture.convert("RGBA").resize((64, 64))
        paper = Image.new("RGBA", rgba.size, "white")
        pixels = numpy.asarray(Image.alpha_composite(paper, rgba).convert("RGB"), dtype=numpy.float32) / 255
        found.append((path.stem, torch.from_numpy(pixels)[None]))
    return found


def uniform(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1)


def calls_of(inverter: str, steps: int) -> int:
    """Evaluations of inversion and way back."""
    there = {"uni_inv": steps + 1, "fixed_point": 3 * steps}.get(inverter)
    back = SOLVERS[EDIT_SOLVERS[inverter]].nfe(steps) - (inverter == "heun")
    return (SOLVERS[inverter].nfe(steps) if there is None else there) + back


def reconstructed(bench: Bench, inverter: str, steps: int, latent: torch.Tensor, conditioning: list) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 → z → x0; returns what came back and z."""
    none = torch.zeros_like(latent)
    back = FlowSampler(KSAMPLER(SOLVERS[EDIT_SOLVERS[inverter]].function, {}), "latent")
    for sampler, sigmas in ((InvertSampler(inverter), inversion_sigmas(uniform(steps))), (back, uniform(steps))):
        z, latent = latent, sample_custom(
            bench.model, none, 1.0, sampler, sigmas, conditioning, conditioning, latent, disable_pbar=True, seed=0
        )  # fmt: skip
    return latent, z


def bench_reconstruction(bench: Bench, pictures: list[tuple[str, torch.Tensor]], budgets: tuple[int, ...]) -> None:
    rows = []
    feature_distance = NODES["RectiflowFeatureDistance"]().execute
    for budget in budgets:
        for name in INVERTERS:
            steps = max(count for count in range(1, budget) if calls_of(name, count) <= budget)
            found = []
            for caption, picture in pictures:
                latent = bench.vae.encode(picture)
                decoded = bench.vae.decode(latent)
                back, z = reconstructed(bench, name, steps, latent, bench.prompt(caption))
                result = bench.vae.decode(back)
                near = figures(result, decoded, None, "gaussian", 1.0, "bench")
                apart = feature_distance(image=result, reference=decoded, sigma=0.2, blocks="double:1-2, single:0-2", seed=0)[0]
                found.append([float(near.mse.mean()), float(near.psnr.mean()), float(near.ssim.mean()), apart, float(z.std())])
            mse, psnr, ssim, apart, std = (statistics.mean(column) for column in zip(*found))
            figures_shown = [f"{mse:.6f}", f"{psnr:.2f}", f"{ssim:.4f}", f"{apart:.4f}", f"{std:.3f}"]
            rows.append([budget, name, calls_of(name, steps), steps, *figures_shown])
    header = ["budget", "inversion", "nfe", "steps", "mse", "psnr", "ssim", "feature_distance", "noise_std"]
    write_table("editing_reconstruction", header, rows)


def bench_editing(bench: Bench) -> None:
    rows = []
    for name, (source, target) in PROMPTS.items():
        picture = NODES["RectiflowExamplePicture"]().execute(picture=name)[0]
        latent = bench.vae.encode(picture)
        decoded = bench.vae.decode(latent)
        paper = (decoded.amin(-1) > 0.97).float()  # background: what is white in the picture, (1, h, w)
        task = EditTask(bench.model, bench.prompt(source), bench.prompt(target), bench.empty, latent, uniform(28))
        rows.append([name, "the picture itself", 0, 0, "", "", "", "", f"{bench.margin(latent, task.source, task.target):+.4f}"])
        for method in parse_methods(METHODS, "bench"):
            start = time.perf_counter()
            edited, calls, model_rows = run_method(method, task, HOST)
            seconds = time.perf_counter() - start
            result = bench.vae.decode(edited)
            outside, inside = (figures(result, decoded, part, "gaussian", 1.0, "bench") for part in (paper, 1 - paper))
            shown = [f"{float(figure):.2f}" for figure in (outside.psnr.mean(), inside.psnr.mean())]
            score = f"{bench.margin(edited, task.source, task.target):+.4f}"
            rows.append([name, method.text, calls, model_rows, f"{seconds:.2f}", *shown, f"{float(outside.ssim.mean()):.3f}", score])
    header = ["picture", "method", "calls", "rows", "seconds", "psnr_background", "psnr_inside", "ssim_background", "class_margin"]
    write_table("editing_methods", header, rows)


def bench_features(bench: Bench, rounds: int) -> None:
    """What sharing costs: 14 steps, 8 of them shared, the later half of the single blocks; seconds of the fastest round."""
    latent = bench.vae.encode(NODES["RectiflowExamplePicture"]().execute(picture="smiling cat")[0])
    source, target = (bench.prompt(text) for text in PROMPTS["smiling cat"])
    cases = {"no features": (0, 0, 8.0), "held": (8, 8, 8.0), "made again": (8, 8, 0.0)}
    found: dict[str, list] = {label: [] for label in cases}
    for _ in range(rounds):  # alternating, so that a slow moment of the machine hits all
        for label, (save, inject, cap) in cases.items():
            start = time.perf_counter()
            z, bank, _ = NODES["RectiflowFlowInvert"]().execute(
                model=bench.model, source=source, latent={"samples": latent}, sigmas=uniform(14), solver="rf_solver", save_steps=save,
                blocks="single:3-5", max_gib=cap,
            )
            middle, held = time.perf_counter(), bank.nbytes
            (sampler,) = NODES["RectiflowRFEditSampler"]().execute(
                features=bank, inject_steps=inject, match="interval", tokens="all", rows="cond_and_uncond", strength=1.0
            )
            none = torch.zeros_like(latent)
            sample_custom(bench.model, none, 2.0, sampler, uniform(14), target, bench.empty, z["samples"], disable_pbar=True, seed=0)
            found[label].append((held, bank.remade, middle - start, time.perf_counter() - middle, bank.nbytes))
    rows = []
    for label, runs in found.items():
        held, remade, _, _, after = runs[-1]
        rows.append([label, held, remade, f"{min(run[2] for run in runs):.3f}", f"{min(run[3] for run in runs):.3f}", after])
    write_table("editing_features", ["features", "bytes_held", "made_again", "inversion_s", "edit_s", "bytes_after"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="budgets 20 and 40, one round")
    parser.add_argument("--tables", nargs="+", choices=("reconstruction", "methods", "features"), help="only these")
    parser.add_argument("--pictures", help="a folder of PNG files to reconstruct in place of those that ship")
    arguments = parser.parse_args()
    bench, chosen = Bench(), arguments.tables or ("reconstruction", "methods", "features")
    if "reconstruction" in chosen:
        bench_reconstruction(bench, load_pictures(arguments.pictures), BUDGETS[:2] if arguments.quick else BUDGETS)
    if "methods" in chosen:
        bench_editing(bench)
    if "features" in chosen:
        bench_features(bench, 1 if arguments.quick else 7)


if __name__ == "__main__":
    main()
