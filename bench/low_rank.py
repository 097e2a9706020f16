"""Modulation in factors by rank: `python bench/low_rank.py [--seeds 4]`; writes bench/results/low_rank.csv.

The tiny model, float32, CFG 3, 10 Euler steps. bytes: of the modulation layers over those of the whole matrices, and of the model over the
whole model's. error: ‖Ŵ − W‖/‖W‖, mean and largest over layers. velocity: SQNR in dB along the plain run; latent: distance of final
latents, ‖z − z₀‖/‖z₀‖, mean over seeds. Ranks without the shared matrix are those that take as many bytes as the ones with it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.accel.prune.low_rank import factor_modulation
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.metrics.fidelity import relative_errors
from rectiflow.tests.contract.tiny_runs import TinyRuns
from table import write_table

RANKS = {True: (4, 8, 16, 32, 64, 96, 128, 256), False: (16, 32, 60, 64, 72, 87, 118, 149, 180, 256)}
PROMPTS = ("noto cat on white", "twemoji rocket on black")
STEPS, CFG = 10, 3.0
HEADER = (
    "shared", "rank", "modulation_bytes", "model_bytes", "mean_error", "largest_error", "velocity_sqnr_db", "latent_error", "seeds",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    given = parser.parse_args()
    host = make_host(Path(tempfile.mkdtemp()), settings=HostSettings(device="cpu", dtype="fp32"))
    rows = []
    with use_host(host), torch.inference_mode():
        runs = TinyRuns(host)
        noise, prompts = runs.noise(range(given.seeds)), [PROMPTS[i % 2] for i in range(given.seeds)]

        def latent(model) -> torch.Tensor:
            return runs.sample(prompts, noise, model=model, steps=STEPS, cfg=CFG)

        shown = {
            "positive": runs.conditioning(PROMPTS[0]), "negative": runs.conditioning(""), "sigmas": torch.linspace(1, 0, STEPS + 1),
            "latent_image": {"samples": torch.zeros(1, 16, 16, 16)}, "cfg": CFG, "seed": 3,
        }  # fmt: skip
        exact = latent(runs.model)
        for shared, rank in ((shared, rank) for shared, ranks in RANKS.items() for rank in ranks):
            model, layers = factor_modulation(runs.model, rank, "bench", shared)
            before, after = (sum(getattr(layer, side) for layer in layers) for side in ("before", "after"))
            *_, decibels = NODES["RectiflowQuantReport"]().execute(reference=runs.model, model=model, **shown)
            found = latent(model)
            far = relative_errors(found, exact).mean()
            errors, share = [layer.error for layer in layers], model.model_size() / runs.model.model_size()
            rows.append((
                shared, rank, f"{after / before:.3f}", f"{share:.3f}", f"{statistics.mean(errors):.4f}",
                f"{max(errors):.4f}", f"{decibels:.1f}", f"{float(far):.4f}", given.seeds,
            ))  # fmt: skip
            print(*rows[-1], flush=True)
    write_table("low_rank", HEADER, rows)


if __name__ == "__main__":
    main()
