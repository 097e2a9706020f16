"""Measure steering and guidance: `python bench/steering.py [--quick] [--tables …]` → bench/results/steering_*.csv.

    mixture    share of samples whose hidden half lands in the right component of the mixture flow, by beta and steps
    problems   PSNR and SSIM of restored pictures, and PSNR on what was measured, against doing nothing and against interpolation
    cost       seconds and peak memory of a run: Euler, FlowChef, and steering with the gradient taken through the model
    guidance   the guider's rules on the tiny model: spread of the result, share of burnt pixels, rows that reach the model

Pictures: the two that ship (the model was not trained on them) and their mirror images, one caption each, two seeds. CPU, float32. Seconds
are process time, which other work on the machine barely touches; set OMP_NUM_THREADS=1 so that they are those of one core.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.host import CFGGuider, prepare_noise, sampler_object
from rectiflow.metrics.fidelity import psnr, ssim
from rectiflow.samplers.costs import CostPart, LatentMeasurement, LatentSpace, PixelDecoder, PixelMeasurement
from rectiflow.samplers.guidance import Guidance, flow_guider
from rectiflow.samplers.operators import Blur, Chain, Downsample, Grayscale, Mask, gaussian_kernel, measure, motion_kernel
from rectiflow.samplers.solvers import sample_euler
from rectiflow.samplers.steering import sample_flowchef
from rectiflow.tests.samplers.flows import MixtureFlow
from table import write_table
from torch.nn.functional import interpolate

CAPTIONS = {"smiling cat": "noto cat on white", "smiling face": "noto smile on white"}


def bench_mixture(points: int) -> None:
    flow = MixtureFlow()
    truth, noise = flow.data(points), flow.noise(points)
    component = torch.cdist(truth, flow.means).argmin(1)
    known = torch.tensor([1.0, 0.0]).repeat_interleave(8).reshape(1, 4, 4)
    published = {(100, 0.0): 0.29, (100, 0.02): 0.73, (100, 0.08): 0.99, (100, 0.3): 1.0, (30, 0.08): 0.79, (30, 0.3): 1.0}
    rows = []
    for steps in (100, 30):
        for beta in (0.0, 0.02, 0.08, 0.3, 1.0):
            cost = CostPart(LatentMeasurement(Mask(known), truth.reshape(-1, 1, 4, 4)), beta, beta)
            grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            out = sample_flowchef(
                lambda x, s: flow(x.flatten(1), s).reshape(x.shape), noise.reshape(-1, 1, 4, 4), grid, disable=True, costs=(cost,)
            ).flatten(1)
            right = torch.cdist(out[:, 8:], flow.means[:, 8:]).argmin(1) == component
            rows.append([steps, beta, f"{float(right.double().mean()):.3f}", published.get((steps, beta), "")])
    write_table("steering_mixture", ["steps", "beta", "right_component", "published"], rows)


class Tiny:
    """The tiny model as a denoiser of one caption, its codec and the pictures."""

    def __init__(self):
        self.patcher, self.clip, self.vae = NODES["RectiflowLoadTiny"]().execute()
        self.decoder = PixelDecoder(self.vae, lambda patchers, memory: None)

    def denoiser(self, caption: str):
        conditioning = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))
        context, pooled = conditioning[0][0], conditioning[0][1]["pooled_output"]
        model = self.patcher.model
        return lambda x, sigma, **extra: model.apply_model(x, sigma, c_crossattn=context, y=pooled)

    def pictures(self):
        """(caption, IMAGE, MASK) of four pictures."""
        for name, caption in CAPTIONS.items():
            image, mask = NODES["RectiflowExamplePicture"]().execute(picture=name)
            yield caption, image, mask
            yield caption, image.flip(2), mask.flip(2)


def problems(mask: torch.Tensor) -> dict:
    """Name → (operator, inner steps)."""
    return {
        "inpaint": (Mask(1 - mask), 1),
        "super-resolution 2": (Downsample(2), 1),
        "super-resolution 4": (Downsample(4), 1),
        "gaussian blur 1.0": (Blur(gaussian_kernel(7, 1.0)), 5),
        "gaussian blur 2.0": (Blur(gaussian_kernel(13, 2.0)), 5),
        "motion blur 9": (Blur(motion_kernel(9, 30.0)), 5),
        "grey": (Grayscale(), 3),
        "blur, then 2 times smaller": (Chain((Blur(gaussian_kernel(7, 1.0)), Downsample(2))), 5),
    }


def naive(measured: torch.Tensor, size) -> torch.Tensor:
    """The measurement itself at the picture's size, bicubic where it is smaller."""
    pixels = measured.movedim(-1, 1)
    return interpolate(pixels, size=size, mode="bicubic", align_corners=False).clamp(0, 1).movedim(1, -1)


def restore(tiny: Tiny, operator, image, caption: str, seed: int, steps: int, inner: int, beta: float, latent: bool = False):
    measured = measure(operator, image)
    encoded = tiny.vae.encode(image)
    target = LatentMeasurement(operator, encoded) if latent else PixelMeasurement(operator, measured, tiny.decoder)
    start = prepare_noise(encoded, seed)
    grid = torch.linspace(1, 0, steps + 1)
    out = sample_flowchef(tiny.denoiser(caption), start, grid, disable=True, costs=(CostPart(target, beta, beta),), inner=inner)
    return tiny.vae.decode(out), measured


def bench_problems(tiny: Tiny, seeds: int, steps: int = 30) -> None:
    rows = []
    for name in problems(torch.zeros(1, 64, 64)):
        found: dict[str, list] = {}
        for caption, image, mask in tiny.pictures():
            operator, inner = problems(mask)[name]
            shown = {"measurement": [(naive(measure(operator, image), image.shape[1:3]), measure(operator, image))]}
            for label, beta, latent in (("no steering", 0.0, False), ("steered", 1.0, False), ("steered in latents", 1.0, True)):
                if latent and name != "inpaint":
                    continue
                shown[label] = [restore(tiny, operator, image, caption, seed, steps, inner, beta, latent) for seed in range(seeds)]
            for label, results in shown.items():
                for picture, measured in results:
                    again = measure(operator, picture)
                    found.setdefault(label, []).append(
                        (float(psnr(picture, image)), float(ssim(picture, image)), min(float(psnr(again, measured)), 99.0))
                    )
        for label, values in found.items():
            means = [statistics.fmean(column) for column in zip(*values)]
            rows.append([name, label, f"{means[0]:.2f}", f"{means[1]:.3f}", f"{means[2]:.2f}"])
    write_table("steering_problems", ["problem", "result", "psnr_db", "ssim", "psnr_measured_db"], rows)


def through_the_model(model, x, sigmas, gradient, beta: float):
    """The same steps with the gradient of the cost taken through the model: dD/dx is the model's own. `gradient` is dL/dD."""
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            clean = model(state, s * state.new_ones(len(state)))
            (g,) = torch.autograd.grad(clean, state, gradient(clean.detach()))
        v = (x - clean.detach()) / s
        x = x - beta * g + (s_next - s) * v
    return x.detach()


def peak_bytes(run) -> int:
    """Most bytes of tensors alive during `run` beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def bench_cost(tiny: Tiny, rounds: int, steps: int = 10) -> None:
    caption, image, mask = next(tiny.pictures())
    model, latent = tiny.denoiser(caption), tiny.vae.encode(image)
    x, grid = prepare_noise(latent, 0), torch.linspace(1, 0, steps + 1)
    small = measure(Downsample(4), image)
    masked, shrunk = LatentMeasurement(Mask(1 - mask), latent), PixelMeasurement(Downsample(4), small, tiny.decoder)
    latent_step, pixel_step = masked.bind(LatentSpace(), x), shrunk.bind(LatentSpace(), x)
    runs = {
        "euler": lambda: sample_euler(model, x, grid, disable=True),
        "flowchef, latent mask": lambda: sample_flowchef(model, x, grid, disable=True, costs=(CostPart(masked, 1.0, 1.0),)),
        "through the model, latent mask": lambda: through_the_model(model, x, grid, latent_step, 1.0),
        "flowchef, pixels": lambda: sample_flowchef(model, x, grid, disable=True, costs=(CostPart(shrunk, 1.0, 1.0),)),
        "through the model, pixels": lambda: through_the_model(model, x, grid, pixel_step, 1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):  # in turns, so that a slow moment of the machine hits all
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    base = statistics.median(seconds["euler"])
    memory = {name: peak_bytes(run) for name, run in runs.items()}
    rows = []
    for name in runs:
        median = statistics.median(seconds[name])
        rows.append([name, f"{median:.3f}", f"{median / base:.2f}", f"{memory[name] / 2**20:.2f}", f"{memory[name] / memory['euler']:.3f}"])
    write_table("steering_cost", ["run", "seconds", "times_euler", "peak_mib", "memory_of_euler"], rows)


def bench_guidance(tiny: Tiny, seeds: int, steps: int = 24) -> None:
    captions = ("noto fox on green", "twemoji rocket on black", "noto cat on blue", "twemoji pizza on white")
    rules = {
        "cfg": Guidance(), "interval 0.1 to 0.8": Guidance(sigma_lo=0.1, sigma_hi=0.8), "cfg_zero": Guidance("cfg_zero"),
        "cfg_zero, zero_init 1": Guidance("cfg_zero", zero_init=1), "apg": Guidance("apg"), "apg, limit 0.3": Guidance("apg", limit=0.3),
        "apg, momentum -0.5": Guidance("apg", momentum=-0.5),
    }
    noise = torch.cat([prepare_noise(torch.zeros(1, 16, 16, 16), seed) for seed in range(seeds)])
    prompts = {text: tiny.clip.encode_from_tokens_scheduled(tiny.clip.tokenize(text)) for text in ("", *captions)}
    rows = []
    for cfg in (2.5, 8.0):
        for name, guidance in rules.items():
            spread, burnt, counted = [], [], [0]
            model = tiny.patcher.clone()

            def count(executor, x, *args, counted=counted, **kwargs):
                counted[0] += len(x)
                return executor(x, *args, **kwargs)

            model.add_wrapper_with_key("apply_model", "count", count)
            start = time.process_time()
            for caption in captions:
                guider = flow_guider(CFGGuider, model, guidance)
                guider.set_conds(prompts[caption], prompts[""])
                guider.set_cfg(cfg)
                grid = torch.linspace(1, 0, steps + 1)
                out = guider.sample(noise, torch.zeros_like(noise), sampler_object("euler"), grid, disable_pbar=True, seed=0)
                pixels = (tiny.vae.first_stage_model.decode(out) + 1) / 2
                spread.append(float(out.std()))
                burnt.append(float(((pixels < -0.02) | (pixels > 1.02)).double().mean()))
            asked = counted[0] / (len(captions) * seeds * steps)
            seconds = time.process_time() - start
            row = [cfg, name, f"{statistics.fmean(spread):.3f}", f"{100 * statistics.fmean(burnt):.1f}", f"{asked:.2f}", f"{seconds:.1f}"]
            rows.append(row)
    write_table("steering_guidance", ["cfg", "rule", "latent_spread", "burnt_percent", "rows_per_step", "seconds"], rows)


def main() -> None:
    tables = ("mixture", "problems", "cost", "guidance")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 points, one seed and 3 rounds instead of 1000, 2 and 7")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    arguments = parser.parse_args()
    quick, wanted = arguments.quick, arguments.tables
    tiny = Tiny()
    if "mixture" in wanted:
        bench_mixture(200 if quick else 1000)
    if "problems" in wanted:
        bench_problems(tiny, 1 if quick else 2)
    if "cost" in wanted:
        bench_cost(tiny, 3 if quick else 7)
    if "guidance" in wanted:
        bench_guidance(tiny, 1 if quick else 2)


if __name__ == "__main__":
    main()
