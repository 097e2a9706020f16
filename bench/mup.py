"""µP's two promises on small Flux models: `python bench/mup.py`; writes bench/results/mup_coordinates.csv and mup_rates.csv.

    mup_coordinates   slope of log mean |x| over log width of every block and of the answer after steps 1 to 6, widths 32 to 256: 0 where a
                      layer keeps its scale; the mean of seeds
    mup_rates         the loss on held-out pictures after equal training, by width and learning rate: under µP the best rate is that of
                      the narrowest, at most one step of the grid away

Both with the rules of train/mup.py and without, from the same initial weights and batches. Pictures: those of bench/train_densities.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics

import torch
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.tests.train.widths import initialise, shapes
from rectiflow.tiny.weights import FLUX_SIZES
from rectiflow.train.mup import measured, mup_of, slopes
from rectiflow.train.optim import Optim, Optimizers, lr_factor
from table import write_table
from train_densities import shapes as toy_pictures

HEAD, BASE, WIDTHS, BATCH, EPS = 16, 32, (32, 64, 128, 256), 16, 1e-10
SIZES = {
    **FLUX_SIZES, "in_channels": 3, "out_channels": 3, "context_in_dim": 8, "vec_in_dim": 8, "axes_dim": [4, 6, 6], "depth": 1,
    "depth_single_blocks": 2,
}  # fmt: skip


def build(width: int, device: str = "cpu") -> Flux:
    sizes = {**SIZES, "hidden_size": width, "num_heads": width // HEAD}
    return Flux(FluxParams(**sizes), dtype=torch.float32, device=device)


class Course:
    """A model, its optimiser, and the batches that every course sees alike."""

    def __init__(self, width: int, seed: int, mup: bool, lr: float, steps: int, pictures: torch.Tensor):
        self.model = build(width)
        initialise(self.model, seed)
        params = dict(self.model.named_parameters())
        rule = mup_of(params, *(shapes(build(base, "meta")) for base in (BASE, BASE + HEAD)))
        self.rule = rule if mup else dataclasses.replace(rule, width=1.0)
        self.optim = Optim(lr=lr, eps=EPS, weight_decay=0.0, warmup=1, schedule="linear", floor=0.0)
        self.optimizers = Optimizers(self.rule.optim(self.optim), params)
        self.draw, self.steps, self.pictures = torch.Generator().manual_seed(1000 + seed), steps, pictures

    def loss(self, rows: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        clean, n = self.pictures[rows], len(rows)
        sigma, noise = torch.rand((n, 1, 1, 1), generator=draw), torch.randn(clean.shape, generator=draw)
        answer = self.model((1.0 - sigma) * clean + sigma * noise, sigma.flatten(), torch.zeros(n, 1, 8), torch.zeros(n, 8))
        return (answer - (noise - clean)).square().mean()

    def step(self, number: int) -> None:
        self.loss(torch.randint(len(self.pictures) // 2, (BATCH,), generator=self.draw), self.draw).backward()
        self.optimizers.step(lr_factor(self.optim, number, self.steps))

    @torch.no_grad()
    def held_out(self) -> float:
        rows = torch.arange(len(self.pictures) // 2, len(self.pictures)).split(64)
        draw = torch.Generator().manual_seed(5)
        return statistics.mean(float(self.loss(part, draw)) for part in rows)


def coordinates(pictures: torch.Tensor, seeds: int, lrs: tuple[float, ...], steps: int = 6) -> list[tuple]:
    rows = []
    for lr in lrs:
        for mup in (True, False):
            sizes: list[dict[int, dict[str, float]]] = [{} for _ in range(steps)]
            for width in WIDTHS:
                found: list[dict[str, list[float]]] = [{} for _ in range(steps)]
                for seed in range(seeds):
                    course = Course(width, seed, mup, lr, 10**9, pictures)
                    watched = measured(course.model, lambda name: name == "final_layer" or name.count(".") == 1 and "blocks." in name)
                    with course.rule.scaled(course.model), watched as now:
                        for number in range(steps):
                            course.step(number)
                            course.loss(torch.arange(BATCH), torch.Generator().manual_seed(7))
                            for name, value in now.items():
                                found[number].setdefault(name, []).append(value)
                for number in range(steps):
                    sizes[number][width] = {name: statistics.mean(values) for name, values in found[number].items()}
            for number in range(steps):
                for name, slope in slopes(sizes[number]).items():
                    rows.append((f"2^{round(math.log2(lr))}", "µP" if mup else "standard", number + 1, name, f"{slope:+.3f}"))
    return rows


def rates(pictures: torch.Tensor, seeds: int, exponents: range, steps: int) -> list[tuple]:
    rows = []
    for mup in (True, False):
        for width in WIDTHS:
            for exponent in exponents:
                losses = []
                for seed in range(seeds):
                    course = Course(width, seed, mup, 2.0**exponent, steps, pictures)
                    with course.rule.scaled(course.model):
                        for number in range(steps):
                            course.step(number)
                        losses.append(course.held_out())
                name = "µP" if mup else "standard"
                rows.append((name, width, f"2^{exponent}", steps, seeds, f"{statistics.mean(losses):.4f}"))
                print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pictures = toy_pictures(1024, 1)
    header = ("learning_rate", "rules", "step", "layer", "slope")
    write_table("mup_coordinates", header, coordinates(pictures, given.seeds, (2.0**-9, 2.0**-7)))
    header = ("rules", "width", "learning_rate", "steps", "seeds", "held_out_loss")
    write_table("mup_rates", header, rates(pictures, given.seeds, range(-10, -3), given.steps))


if __name__ == "__main__":
    main()
