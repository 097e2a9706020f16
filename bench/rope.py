"""The tiny model at 2× and 3× its training side with every way of stretching positions.

    python bench/rope.py [--factors 2 3] [--count 16] [--steps 20] [--table] [--sheet FILE] [--keep FOLDER] [--only METHOD:SCALE:ON …]

Real pictures of a size are made from the 32 held-out emoji of bench/pictures: each one enlarged by Lanczos, and as many grids of
factor × factor different ones, untouched. Two distances to them, both with the same prompts, seeds and places for every method:

- `whole`, `part`: the tiny model's features of the picture made smaller and of squares cut from it (feature_distance.py), and their sum,
  `features`, by which methods are compared;
- `sliced`: the sliced Wasserstein distance of 7×7 patches of a Laplacian pyramid down to 16 pixels (Karras et al., arXiv 1710.10196), times
  1000, the mean of its levels; no network judges another, and it knows colours and strokes but no things.

The two spreads: standard deviation over 8 draws of half of the pictures. `of_plain`: features, divided by that of the unscaled model.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from feature_distance import Judge, kernel_distance, views
from held_out import load_held_out
from table import RESULTS, surroundings, write_table

METHODS = (
    "none", "position_interpolation", "ntk", "frequency_aware", "time_aware", "time_switch", "vision_ntk", "vision_yarn", "ntk_by_parts",
    "resonance_yarn",
)  # fmt: skip
PLANS = (  # method, attention scale, what it acts on
    *((method, "off", "all") for method in METHODS), ("none", "paper_log", "all"), ("none", "paper_log", "picture"),
    ("vision_ntk", "paper_log", "all"), ("vision_ntk", "paper_log", "picture"), ("vision_ntk", "fit_code", "all"),
    ("vision_yarn", "paper_log", "all"), ("vision_yarn", "paper_log", "picture"),
)  # fmt: skip
TRAINED = 8  # tokens a side: 64 pixels, 4 a latent cell, 2 cells a token
PATCH, PLACES, DIRECTIONS, SMALLEST = 7, 64, 128, 16
HEADER = (
    "factor", "method", "attention_scale", "apply_to", "pictures", "steps", "features", "features_spread", "of_plain", "whole", "part",
    "sliced", "sliced_spread",
)  # fmt: skip


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


def draw(tiny, plan: tuple[str, str, str], factor: int, count: int, steps: int) -> torch.Tensor:
    """Pictures (count, 3, side, side) in 0…1 of the first held-out captions, CFG 3, Euler, a seed each. plan: one of PLANS."""
    from rectiflow.accel.attention.rope import RopePlan, attach
    from rectiflow.accel.attention.rope_spectrum import RopeScaling

    captions = [entry.caption for entry, _ in load_held_out()][:count]
    model = attach(tiny.model, RopePlan(RopeScaling(plan[0], (TRAINED, TRAINED)), *plan[1:]), "bench")
    latent = tiny.sample(captions, tiny.noise(range(count), (64 * factor, 64 * factor)), model=model, steps=steps)
    return tiny.vae.decode(latent).movedim(-1, 1).float().clamp(0.0, 1.0)


@dataclass(frozen=True)
class Real:
    """Real pictures of a size, (n, 3, side, side), and their features by view."""

    pictures: torch.Tensor
    features: dict[str, torch.Tensor]


def figures(pictures: torch.Tensor, features: dict[str, torch.Tensor], real: Real) -> dict[str, float]:
    """The distances of one method."""

    def seen(chosen: torch.Tensor) -> dict[str, float]:
        return {name: kernel_distance(features[name][chosen], real.features[name]) for name in features}

    def half(seed: int) -> torch.Tensor:
        return torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[: -(-len(pictures) // 2)]

    parts = seen(torch.arange(len(pictures)))
    return {
        **parts, "features": sum(parts.values()),
        "features_spread": statistics.stdev(sum(seen(half(seed)).values()) for seed in range(8)),
        "sliced": statistics.mean(distances(pictures, real.pictures)),
        "sliced_spread": statistics.stdev(statistics.mean(distances(pictures[half(seed)], real.pictures)) for seed in range(8)),
    }  # fmt: skip


def kept_rows(factor: int, count: int, steps: int) -> list[tuple]:
    """The rows of the table of this factor that were drawn with as many pictures and steps, with the machine and versions they have."""
    path = RESULTS / f"rope_{factor}x.csv"
    with open(path, newline="") as file:
        found = [{"apply_to": "all", **row} for row in csv.DictReader(file)]
    return [tuple(row.values()) for row in ordered(found) if (row["pictures"], row["steps"]) == (str(count), str(steps))]


def ordered(rows: list[dict]) -> list[dict]:
    about = [name for name in surroundings() if name in rows[0]]
    return [{name: row[name] for name in (*HEADER, *about)} for row in rows]


def measured(
    tiny, plans: Sequence[tuple[str, str, str]], factor: int, count: int, steps: int, keep: Path | None, plain: float = 0.0
) -> tuple[list[tuple], list[torch.Tensor]]:
    judge, pictures = Judge(tiny), real_pictures(factor)
    real = Real(pictures, {name: judge.features(seen) for name, seen in views(pictures).items()})
    rows, drawn = [], []
    for plan in plans:
        pictures = draw(tiny, plan, factor, count, steps)
        found = figures(pictures, {name: judge.features(seen) for name, seen in views(pictures).items()}, real)
        plain = plain or found["features"]
        found |= {"of_plain": found["features"] / plain}
        rows.append((factor, *plan, count, steps, *(round(found[name], 3) for name in HEADER[6:])))
        print(*rows[-1], flush=True)
        drawn.append(pictures[:2])
        if keep:
            torch.save((pictures * 255.0).round().byte(), keep / f"{factor}x_{'_'.join(plan)}.pt")
    return rows, drawn


def sheet(drawn: Sequence[torch.Tensor], path: Path) -> None:
    """A column a plan, in the order of PLANS; two pictures each, the same two prompts and seeds in a row."""
    from PIL import Image

    columns = [torch.cat(list(pictures), dim=-2) for pictures in drawn]
    Image.fromarray((torch.cat(columns, dim=-1).permute(1, 2, 0) * 255.0).round().byte().numpy()).save(path, quality=85)


def main(arguments: Sequence[str] | None = None) -> None:
    from rectiflow.host.embedded import make_host, use_host
    from rectiflow.tests.contract.tiny_runs import TinyRuns

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--count", type=int, default=16, help="pictures of a method, 4 to 32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--table", action="store_true", help="keep the figures as bench/results/rope_2x.csv and so on")
    parser.add_argument("--only", nargs="+", metavar="METHOD:SCALE:ON", help="measure these, and put them into the table")
    parser.add_argument("--sheet", type=Path, help="write pictures of every plan; the factor is put before the suffix")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the pictures, uint8 tensors, a file a plan")
    given = parser.parse_args(arguments)
    with use_host(make_host()), torch.inference_mode():
        tiny = TinyRuns(make_host())
        for factor in given.factors:
            kept = kept_rows(factor, given.count, given.steps) if given.only else []
            plans = [tuple(name.split(":")) for name in given.only] if given.only else PLANS
            plain = next((float(row[HEADER.index("features")]) for row in kept if row[1:4] == PLANS[0]), 0.0)
            found, drawn = measured(tiny, plans, factor, given.count, given.steps, given.keep, plain)
            if given.sheet:
                sheet(drawn, given.sheet.with_stem(f"{given.sheet.stem}_{factor}x"))
            if given.table:
                about = surroundings()
                now = {row[1:4]: row for row in kept} | {row[1:4]: (*row, *about.values()) for row in found}
                write_table(f"rope_{factor}x", (*HEADER, *about), [now[plan] for plan in PLANS if plan in now])


if __name__ == "__main__":
    main()
