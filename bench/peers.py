"""Measure our caches beside those that people use: `python bench/peers.py [--prompts 16] [--seeds 2] [--steps 28 50] [--raw FILE]`.

One model, one set of weights, one machine, one run: the tiny model on our host, and the same network in diffusers (bench/diffusers_flux.py)
under diffusers' FirstBlockCache, TaylorSeerCache and MagCache and under cache-dit's DBCache. With COMFYUI_PATH (and COMFYUI_PYTHON)
also ComfyUI's EasyCache and LazyCache, and ours inside ComfyUI. Needs `pip install diffusers==0.42.1 cache-dit==1.5.3`, which are no
requirement of the pack: put them into a virtual environment of their own.

Pictures are drawn one by one, Euler, guidance 3, and every cache in turn on each picture. Times are the processor's (OMP_NUM_THREADS=1
makes them those of one thread), which other work on the machine hardly disturbs. Writes bench/results/peers_<steps>.csv, a row a setting:
time ratio to the same engine without a cache (median over pictures, quartiles), PSNR, SSIM and feature distance to that engine's uncached
picture (mean and worst), evaluations made, bytes kept; and bench/results/peers_<steps>_at_ratio.csv: the PSNR of each family of settings at
1.5×, 2× and 3×, read off its own curve. --raw keeps what was measured a picture, and goes on behind the last one that is in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from our_caches import Ours
from peer_caches import CacheDit, Diffusers, Picture, Run, Setting
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.host import calculate_sigmas, prepare_noise
from rectiflow.metrics.fidelity import psnr, ssim
from rectiflow.nodes.metrics import RectiflowFeatureDistance, tiny_eye
from table import write_table

from host import Child

PROMPTS = (  # things that neither the presets nor the searched schedules were made or chosen with
    "noto ghost on black", "twemoji bus on yellow", "noto sunflower on white", "twemoji crab on white",
    "noto robot on red", "twemoji guitar on white", "noto penguin on yellow", "twemoji cactus on red",
    "noto umbrella on white", "twemoji dolphin on black", "noto tiger on green", "twemoji helicopter on blue",
    "noto mushroom on blue", "twemoji lemon on white", "noto panda on yellow", "twemoji tulip on green",
)  # fmt: skip
RATIOS = (1.5, 2.0, 3.0)
AXES = (8, 28, 28)


class Taken(NamedTuple):
    """One picture under one setting. ratio: plain seconds over the setting's; calls of asked; kept: bytes."""

    steps: int
    picture: str
    engine: str
    family: str
    value: str
    ratio: float
    psnr: float
    ssim: float
    features: float
    calls: int
    asked: int
    kept: int


class InComfyUI:
    """The same pictures in a process of ComfyUI's; it answers with latents and seconds."""

    def __init__(self):
        self._child = Child(os.environ.get("COMFYUI_PYTHON", sys.executable), "peers_comfyui.py", "comfyui")
        self.version = self._child.versions["version"]

    def run(self, setting: Setting | None, picture: Picture, sigmas: Sequence[float], weigh: bool = False) -> Run:
        order = {"prompt": picture.prompt, "noise": picture.noise.tolist(), "sigmas": list(sigmas), "make": setting and setting.make}
        answer = self._child.round(json.dumps(order))
        return Run(torch.tensor(answer["latent"]), answer["seconds"], answer["calls"], answer["asked"], 0)

    @staticmethod
    def settings() -> list[Setting]:
        found = [
            Setting(node, f"{threshold:g}", {"node": node, "reuse_threshold": threshold, "start_percent": 0.15, "end_percent": 0.95})
            for node in ("EasyCache", "LazyCache") for threshold in (0.05, 0.2, 0.8)
        ]  # fmt: skip
        ours = {"node": "RectiflowTaylorForecastCache", "order": 1, "warmup_steps": 3, "tail_steps": 1, "granularity": "last_block"}
        return [*found, Setting("TaylorSeer order 1 last_block", "2", ours | {"interval": 2})]

    def close(self) -> None:
        self._child.close()


class Bench:
    def __init__(self):
        self.model, self.clip, self.vae = NODES["RectiflowLoadTiny"]().execute()
        self.eye = tiny_eye()
        self.negative = self._condition("")

    def _condition(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, extra = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0]
        return tokens, extra["pooled_output"]

    def picture(self, prompt: str, seed: int) -> Picture:
        return Picture(prompt, seed, prepare_noise(torch.zeros(1, 16, 16, 16), seed), self._condition(prompt), self.negative)

    def sigmas(self, steps: int) -> list[float]:
        return calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", steps).tolist()

    def engines(self) -> dict[str, object]:
        from diffusers_flux import diffusers_twin

        state = self.model.get_model_object("diffusion_model").float().state_dict()
        engines = {
            "rectiflow": Ours(self.model, self.picture, self.sigmas),
            "diffusers": Diffusers(diffusers_twin(state, AXES)),
            "cache-dit": CacheDit(diffusers_twin(state, AXES)),
        }
        return {**engines, "ComfyUI": InComfyUI()} if os.environ.get("COMFYUI_PATH") else engines

    def measure(
        self, name: str, engine, settings: Sequence[Setting], picture: Picture, sigmas: Sequence[float], weigh: bool
    ) -> list[Taken]:
        """One picture through every setting, between two plain runs that its ratios are to."""
        first = engine.run(None, picture, sigmas)
        runs = [engine.run(setting, picture, sigmas) for setting in settings]
        plain = (first.seconds + engine.run(None, picture, sigmas).seconds) / 2
        if weigh:
            runs = [run._replace(kept=run.kept or engine.run(setting, picture, sigmas, True).kept) for setting, run in zip(settings, runs)]
        images = self.vae.decode(torch.cat([run.latent for run in runs]))
        reference = self.vae.decode(first.latent)
        decibels, similar = psnr(images, reference, where="bench"), ssim(images, reference, where="bench")
        found = []
        for i, (setting, run) in enumerate(zip(settings, runs)):
            away = RectiflowFeatureDistance().run(images[i : i + 1], reference, 0.2, "double:1-2, single:0-2", 0, **self.eye)[0]
            near = min(float(decibels[i]), 99.0)  # equal pictures are infinitely near; 99 keeps the means finite
            found.append(Taken(
                len(sigmas) - 1, picture.name, name, setting.family, setting.value, plain / run.seconds, near, float(similar[i]), away,
                run.calls, run.asked, run.kept,
            ))  # fmt: skip
        return found


def at_ratio(points: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """PSNR at a ratio of times, between its neighbours on a family's curve; settings slower and farther than another are no part."""
    best: list[tuple[float, float]] = []
    for ratio, decibels in sorted(points, reverse=True):
        if not best or decibels > best[-1][1]:
            best.append((ratio, decibels))
    best.reverse()
    for (low, high_psnr), (high, low_psnr) in zip(best, best[1:]):
        if low <= wanted <= high:
            share = (math.log(wanted) - math.log(low)) / (math.log(high) - math.log(low)) if high > low else 0.0
            return high_psnr + share * (low_psnr - high_psnr)
    return best[0][1] if best and best[0][0] >= wanted else None


def summary(taken: Sequence[Taken]) -> list:
    """The row of one setting."""
    first, ratios = taken[0], [one.ratio for one in taken]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    decibels, similar, away = ([getattr(one, name) for one in taken] for name in ("psnr", "ssim", "features"))
    return [
        first.steps, first.engine, first.family, first.value, f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}",
        f"{statistics.mean(decibels):.2f}", f"{min(decibels):.2f}", f"{statistics.mean(similar):.4f}", f"{min(similar):.4f}",
        f"{statistics.mean(away):.4f}", f"{max(away):.4f}", f"{statistics.mean(one.calls for one in taken):.1f}", first.asked,
        max(one.kept for one in taken) >> 10, len(taken),
    ]  # fmt: skip


HEADER = (
    "steps engine family value time_ratio ratio_q1 ratio_q3 psnr_mean psnr_worst ssim_mean ssim_worst features_mean features_worst "
    "evaluations of kept_kib pictures"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--engines", nargs="+", default=None, help="only these, for a quick look; nothing is written then")
    parser.add_argument("--raw", type=Path, default=None, help="JSON lines, a measured picture and setting each")
    parser.add_argument("--name", default="peers", help="first word of the tables' names")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # cache-dit reports every hook it sets
    bench = Bench()
    engines = {name: engine for name, engine in bench.engines().items() if arguments.engines is None or name in arguments.engines}
    pictures = [bench.picture(prompt, 1 + seed) for seed in range(arguments.seeds) for prompt in PROMPTS[: arguments.prompts]]
    for steps in arguments.steps:
        rows, curves = tables(compare(bench, engines, pictures, steps, arguments.raw))
        version = engines["ComfyUI"].version if "ComfyUI" in engines else ""
        write = write_table if arguments.engines is None else show
        name, header = f"{arguments.name}_{steps}", ["steps", "engine", "family", *(f"psnr_at_{ratio:g}" for ratio in RATIOS)]
        write(name, HEADER, rows, version)
        write(f"{name}_at_ratio", header, curves, version)
    if "ComfyUI" in engines:
        engines["ComfyUI"].close()


def compare(bench: Bench, engines: dict, pictures: Sequence[Picture], steps: int, raw: Path | None) -> list[Taken]:
    """Every picture through every engine and setting."""
    sigmas, lines = bench.sigmas(steps), raw.read_text().splitlines() if raw is not None and raw.exists() else []
    taken = [one for one in (Taken(*json.loads(line)) for line in lines) if one.steps == steps and one.engine in engines]
    done = {one.picture for one in taken}
    missing = [picture for picture in pictures if picture.name not in done]
    settings: dict[str, list[Setting]] = {}
    if missing and "diffusers" in engines:
        engines["diffusers"].calibrate(bench.picture("noto dog on white", 0), sigmas)
    if missing:
        settings = {name: engine.settings(steps) if name == "rectiflow" else engine.settings() for name, engine in engines.items()}
    for picture in missing:
        found = []
        for name, engine in engines.items():
            engine.run(None, picture, sigmas[:3])  # warm
            found += bench.measure(name, engine, settings[name], picture, sigmas, weigh=not taken and name != "ComfyUI")
        taken += found
        if raw is not None:
            with raw.open("a") as file:
                file.writelines(json.dumps(one) + "\n" for one in found)
        print(f"{steps} steps, {picture.name}", file=sys.stderr, flush=True)
    return taken


def tables(taken: Sequence[Taken]) -> tuple[list, list]:
    """(rows of settings, rows of families at the wanted ratios); a setting that skips nothing is no point of its family's curve."""
    settings: dict[tuple, list[Taken]] = {}
    for one in taken:
        settings.setdefault((one.engine, one.family, one.value), []).append(one)
    rows, families = [], {}
    for (engine, family, _), group in settings.items():
        row = summary(group)
        rows.append(row)
        points = families.setdefault((engine, family), [])
        if float(row[13]) < row[14]:
            points.append((float(row[4]), float(row[7])))
    curves = []
    for (engine, family), points in families.items():
        found = [at_ratio(points, ratio) for ratio in RATIOS]
        curves.append([taken[0].steps, engine, family, *("" if value is None else f"{value:.1f}" for value in found)])
    return rows, curves


def show(name: str, header: Sequence[str], rows: Sequence[Sequence], _comfyui: str) -> None:
    print(name, *header)
    for row in rows:
        print(*row, flush=True)


if __name__ == "__main__":
    main()
