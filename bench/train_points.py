"""DiT-3D as a flow on a toy set, by the trainer: `python bench/train_points.py`; writes bench/results/train_points.csv.

Clouds of 256 points on tori, ellipsoids and boxes of random sizes, every cloud of unit variance in the mean over the set. The network of
bench/point_flow.py, plain and ours, learns for so many seconds of one thread; 48 clouds by 40 Euler steps are compared with 48 that nobody
trained on. Told: how often the nearest of 95 clouds is of the own kind, drawn or real (1-NNA: 50 is perfect, 100 can be told apart), and
the mean Chamfer distance of a drawn cloud to the nearest real one over that of a real cloud to the nearest of another real set. Noise of
the same size is measured beside them.
"""

from __future__ import annotations

import argparse

import torch
from point_flow import PointFlow, devoxelise, own_places, voxelise
from rectiflow.samplers.solvers import sample_euler
from small_flow import trained_for
from table import write_table

CLASSES, POINTS, CLOUDS, JUDGED, BATCH, EULER = 3, 256, 6000, 48, 16, 40


def clouds(count: int, seed: int) -> torch.Tensor:
    """(count, 3, 256): class i modulo 3 is a torus, an ellipsoid, a box."""
    draw = torch.Generator().manual_seed(seed)
    n = -(-count // CLASSES)
    u, v = (2.0 * torch.pi * torch.rand((n, POINTS), generator=draw) for _ in range(2))
    ring, tube = 0.8 + 0.4 * torch.rand((n, 1), generator=draw), 0.2 + 0.25 * torch.rand((n, 1), generator=draw)
    torus = torch.stack(((ring + tube * v.cos()) * u.cos(), (ring + tube * v.cos()) * u.sin(), tube * v.sin()), dim=1)
    on_sphere = torch.nn.functional.normalize(torch.randn((n, 3, POINTS), generator=draw), dim=1)
    ellipsoid = on_sphere * (0.5 + 0.8 * torch.rand((n, 3, 1), generator=draw))
    inside = 2.0 * torch.rand((n, 3, POINTS), generator=draw) - 1.0
    face = torch.randint(3, (n, 1, POINTS), generator=draw)
    on_cube = inside.scatter(1, face, inside.gather(1, face).sign())
    box = on_cube * (0.4 + 0.7 * torch.rand((n, 3, 1), generator=draw))
    every = torch.stack((torus, ellipsoid, box), dim=1).flatten(0, 1)[:count]
    return every / 0.58  # unit variance of all numbers


def chamfer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(m, 3, n), (k, 3, n) → (m, k): mean distance of a point to the other cloud, both ways."""
    rows = [torch.cdist(each.T[None].expand(len(b), -1, -1), b.transpose(1, 2)) for each in a]
    return torch.stack([(row.amin(2).mean(1) + row.amin(1).mean(1)) / 2.0 for row in rows])


def told_apart(drawn: torch.Tensor, real: torch.Tensor) -> float:
    every = torch.cat((drawn, real))
    distances = chamfer(every, every)
    distances.fill_diagonal_(float("inf"))
    kind = torch.arange(len(every)) < len(drawn)
    return 100.0 * float((kind[distances.argmin(1)] == kind).float().mean())


class Clouds:
    def __init__(self, seed: int):
        self.latents, self.fingerprint = clouds(CLOUDS, seed), f"clouds {seed}"

    def buckets(self):
        return [list(range(CLOUDS))]

    def batch(self, rows, draws):
        from rectiflow.train.loop import Batch

        return Batch(self.latents[rows], [row % CLASSES for row in rows.tolist()])


def check_operators() -> None:
    """Cell means equal a loop; constant and linear fields are read back; the order of points does not matter."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 50), generator=draw, dtype=torch.float64)
    places = own_places(x, 8)
    grid, _ = voxelise(x, places, 8)
    for b in range(2):
        for cell in places[b].round().long().T.unique(dim=0).tolist():
            mine = (places[b].round().long().T == torch.tensor(cell)).all(1)
            assert torch.allclose(grid[b, :, cell[0], cell[1], cell[2]], x[b][:, mine].mean(1), atol=1e-12)
    axis = torch.arange(8, dtype=torch.float64)
    linear = (1.0 + 2.0 * axis[:, None, None] - axis[None, :, None] + 0.5 * axis[None, None])[None, None].expand(2, -1, -1, -1, -1)
    expected = 1.0 + 2.0 * places[:, :1] - places[:, 1:2] + 0.5 * places[:, 2:]
    assert torch.allclose(devoxelise(linear, places), expected, atol=1e-10)
    model, order = PointFlow(CLASSES, ours=True), torch.randperm(50, generator=draw)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
        x, sigma = x.float(), torch.tensor([0.3, 0.8])
        assert torch.allclose(model.velocity(x, sigma, [0, 1])[:, :, order], model.velocity(x[:, :, order], sigma, [0, 1]), atol=1e-5)


def main() -> None:
    from rectiflow.train.config import TrainConfig
    from rectiflow.train.densities import Density
    from rectiflow.train.optim import Optim

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=270.0, help="of one thread, for each training")
    parser.add_argument("--steps", type=int, default=4000, help="at most; the rate falls over them")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    check_operators()
    real, other = clouds(JUDGED, 1000), clouds(JUDGED, 1001)
    floor = float(chamfer(other, real).amin(1).mean())
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1002))
    rows = [
        (name, "", "", f"{told_apart(found, real):.1f}", f"{float(chamfer(found, real).amin(1).mean()) / floor:.3f}", "")
        for name, found in (("real against real", other), ("noise", noise))
    ]
    for seed in range(given.seeds):
        for ours in (False, True):
            torch.manual_seed(seed)
            model = PointFlow(CLASSES, ours=ours)
            config = TrainConfig(
                steps=given.steps, batch=BATCH, seed=seed, density=Density("logit_normal"), dropout=0.0, ema=0.99, save_every=0,
                validate_every=0, optim=Optim(lr=1e-3, warmup=50),
            )  # fmt: skip
            trainer, seconds = trained_for(given.seconds, model, Clouds(seed), config)
            labels = [row % CLASSES for row in range(JUDGED)]

            def denoised(x, sigma, model=model, labels=labels, **extra):
                return x - sigma.view(-1, 1, 1) * model.velocity(x, sigma, labels)

            with trainer.averaged(), torch.no_grad():
                drawn = sample_euler(denoised, noise, torch.linspace(1.0, 0.0, EULER + 1), disable=True)
            away = float(chamfer(drawn, real).amin(1).mean()) / floor
            name, apart = "ours" if ours else "plain", told_apart(drawn, real)
            rows.append((name, seed, trainer.done, f"{apart:.1f}", f"{away:.3f}", f"{seconds:.0f}"))
            print(*rows[-1], flush=True)
    write_table("train_points", ("network", "seed", "steps", "one_nn_percent", "chamfer_over_real", "processor_seconds"), rows)


if __name__ == "__main__":
    main()
