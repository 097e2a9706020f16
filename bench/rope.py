"""The tiny model at 2× and 3× its training side with every way of stretching positions.

    python bench/rope.py [--factors 2 3] [--count 16] [--steps 20] [--table] [--sheet FILE]

Real pictures of a size are made from the 32 held-out emoji of bench/pictures: each one enlarged by Lanczos, and as many grids of
factor × factor different ones, untouched. Distance: the sliced Wasserstein distance of 7×7 patches of a Laplacian pyramid down to 16 pixels
(Karras et al., arXiv 1710.10196), times 1000, the mean of its levels; the coarsest level is layout, the finest texture. No network judges
another, and every method has the same prompts, seeds and patch places. `spread`: standard deviation of the distance over 8 draws of half of
the pictures.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from held_out import load_held_out
from table import write_table

METHODS = (
    "none", "position_interpolation", "ntk", "frequency_aware", "time_aware", "time_switch", "vision_ntk", "vision_yarn", "ntk_by_parts",
    "resonance_yarn",
)  # fmt: skip
PLANS = (*((method, "off") for method in METHODS), ("none", "paper_log"), ("vision_ntk", "paper_log"), ("vision_ntk", "fit_code"))
TRAINED = 8  # tokens a side: 64 pixels, 4 a latent cell, 2 cells a token
PATCH, PLACES, DIRECTIONS, SMALLEST = 7, 64, 128, 16
HEADER = ("factor", "method", "attention_scale", "pictures", "steps", "distance", "spread", "coarsest", "finest", "against_plain")


def real_pictures(factor: int) -> torch.Tensor:
    """(64, 3, 64·factor, 64·factor) in 0…1: the 32 enlarged, then 32 grids."""
    small = torch.stack([torch.from_numpy(pixels.copy()) for _, pixels in load_held_out()]).permute(0, 3, 1, 2).float() / 255.0
    side = 64 * factor
    enlarged = torch.stack([_enlarged(picture, side) for picture in small])
    chosen = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(seed))[: factor**2] for seed in range(32)])
    tiles = small[chosen].unflatten(1, (factor, factor))  # (32, f, f, 3, 64, 64)
    return torch.cat((enlarged, tiles.permute(0, 3, 1, 4, 2, 5).reshape(32, 3, side, side)))


def _enlarged(picture: torch.Tensor, side: int) -> torch.Tensor:
    import numpy
    from PIL import Image

    pixels = Image.fromarray((picture.permute(1, 2, 0) * 255.0).round().byte().numpy())
    return torch.from_numpy(numpy.asarray(pixels.resize((side, side), Image.Resampling.LANCZOS)).copy()).permute(2, 0, 1).float() / 255.0


def _pyramid(pictures: torch.Tensor) -> list[torch.Tensor]:
    """Differences between a level and the next, enlarged, from fine to coarse; the last level is the picture itself."""
    levels = []
    while pictures.shape[-1] // 2 >= SMALLEST:
        coarse = F.avg_pool2d(pictures, 2)
        levels.append(pictures - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False))
        pictures = coarse
    return [*levels, pictures]


def _patches(level: torch.Tensor, seed: int) -> torch.Tensor:
    """(b, PLACES, 3·49) at places that depend on the seed and the size alone."""
    room = level.shape[-1] - PATCH + 1
    places = torch.randint(room, (PLACES, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.stack([level[..., y : y + PATCH, x : x + PATCH].flatten(1) for y, x in places], dim=1)


def distances(pictures: torch.Tensor, real: torch.Tensor) -> list[float]:
    """The distance of each level, from fine to coarse, times 1000."""
    found = []
    for number, (ours, theirs) in enumerate(zip(_pyramid(pictures), _pyramid(real))):
        ours, theirs = _patches(ours, number).flatten(0, 1), _patches(theirs, number).flatten(0, 1)
        mean, deviation = theirs.mean(), theirs.std()
        directions = F.normalize(torch.randn(ours.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(number)), dim=0)
        shares = torch.linspace(0.0, 1.0, 257)
        both = [torch.quantile((rows - mean) / deviation @ directions, shares, dim=0) for rows in (ours, theirs)]
        found.append(1000.0 * float((both[0] - both[1]).abs().mean()))
    return found


def draw(method: str, attention_scale: str, factor: int, count: int, steps: int) -> torch.Tensor:
    """Pictures (count, 3, side, side) in 0…1 of the first held-out captions, CFG 3, Euler, a seed each."""
    from rectiflow.accel.attention.rope import RopePlan, attach
    from rectiflow.accel.attention.rope_spectrum import RopeScaling
    from rectiflow.host.embedded import make_host, use_host
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    captions = [entry.caption for entry, _ in load_held_out()][:count]
    with use_host(make_host()):
        tiny = TinyRuns(make_host())
        model = attach(tiny.model, RopePlan(RopeScaling(method, (TRAINED, TRAINED)), attention_scale), "bench")
        noise = tiny.noise(range(count), (64 * factor, 64 * factor))
        latent = tiny.sample(captions, noise, model=model, steps=steps)
        return tiny.vae.decode(latent).movedim(-1, 1).float().clamp(0.0, 1.0)


def spread(pictures: torch.Tensor, real: torch.Tensor) -> float:
    halves = [torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[: -(-len(pictures) // 2)] for seed in range(8)]
    return statistics.stdev(statistics.mean(distances(pictures[half], real)) for half in halves)


def measured(factor: int, count: int, steps: int) -> tuple[list[tuple], list[torch.Tensor]]:
    real, rows, drawn, plain = real_pictures(factor), [], [], 0.0
    for method, attention_scale in PLANS:
        pictures = draw(method, attention_scale, factor, count, steps)
        levels = distances(pictures, real)
        mean = statistics.mean(levels)
        plain = plain or mean
        figures = (mean, spread(pictures, real), levels[-1], levels[0], mean / plain)
        rows.append((factor, method, attention_scale, count, steps, *(round(figure, 3) for figure in figures)))
        print(*rows[-1], flush=True)
        drawn.append(pictures[:4])
    return rows, drawn


def sheet(drawn: Sequence[torch.Tensor], path: Path) -> None:
    """One row a plan, in the order of PLANS, four pictures each."""
    from PIL import Image

    rows = [torch.cat(list(pictures), dim=-1) for pictures in drawn]
    Image.fromarray((torch.cat(rows, dim=-2).permute(1, 2, 0) * 255.0).round().byte().numpy()).save(path, quality=90)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--table", action="store_true", help="keep the figures as bench/results/rope.csv")
    parser.add_argument("--sheet", type=Path, help="write pictures of every plan; the factor is put before the suffix")
    given = parser.parse_args(arguments)
    rows = []
    for factor in given.factors:
        found, drawn = measured(factor, given.count, given.steps)
        rows += found
        if given.sheet:
            sheet(drawn, given.sheet.with_stem(f"{given.sheet.stem}_{factor}x"))
    if given.table:
        write_table("rope", HEADER, rows)


if __name__ == "__main__":
    main()
