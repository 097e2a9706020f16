"""Measure masked runs: `python bench/masks.py`. Prints one table, writes bench/results/masks_interpolation.csv.

Five-frame Gaussian videos with known correlations (tests/samplers/video_flow.py), first and last frame given: how far the frames between
them are from the exact conditional, for every way of showing the given part, at 40 steps. On the CPU, some seconds.
"""

from __future__ import annotations

import torch
from rectiflow.host import KSAMPLER, sampler_object
from rectiflow.samplers.known_part import present_known
from rectiflow.samplers.repaint import sample_repaint
from rectiflow.tests.samplers.video_flow import FrameTimes, Interpolation, OneTime, calls, draw
from table import write_csv

HEADER = ["model", "known", "sampler", "model_calls", "error_of_coefficients", "spread_over_exact"]


def cases():
    heun = sampler_object("heun")
    yield FrameTimes, "clean_t0", "heun", heun
    yield FrameTimes, "noised", "heun", heun
    yield OneTime, "clean_shared", "heun", heun
    yield OneTime, "noised", "heun", heun
    for resample in (0, 2, 5, 10, 20):
        yield OneTime, "noised", f"repaint {resample}", KSAMPLER(sample_repaint, {"resample": resample})


def main() -> None:
    rows = []
    for kind, known, name, sampler in cases():
        truth = Interpolation(kind)
        mask = torch.ones(1, 1, 5, 1, 1)
        mask[:, :, truth.GIVEN] = 0
        latent = {"samples": truth.video, "noise_mask": mask.expand(1, 1, 5, 40, 60)}
        out = draw(present_known(truth.model, known), latent, sampler, torch.linspace(1, 0, 41))
        coefficients, spread = truth.errors(out)
        rows.append([kind.__name__, known, name, len(calls(truth.model)), f"{coefficients:.3f}", f"{spread:.3f}"])
        print("  ".join(str(value).ljust(12) for value in rows[-1]))
    write_csv("masks_interpolation", HEADER, rows)


if __name__ == "__main__":
    main()
