"""UltraFlux's wavelet loss against squares on a small MMDiT: `python bench/train_wavelet.py`; writes bench/results/train_wavelet.csv.

The toy set and the network of bench/train_densities.py, the same steps, seeds and draws for each loss. Judged on pictures that nobody
trained on, at eight sigmas with fixed noise: mean square of the velocity's error in the coarse Haar band and in the three fine ones; then
of 50 Euler steps the energy of the fine bands over that of real pictures, and the sliced Wasserstein distance.

    squares             the trainer's default
    squares, weighted   the wavelet loss with a threshold of 10⁶ and β = 0: its weight over sigma alone
    wavelet             the loss as the page of the node has it, β = 0 and ½
"""

from __future__ import annotations

import argparse
import time

import torch
from small_flow import Table, drawn, small_flow
from table import write_table
from train_densities import BATCH, HIDDEN, JUDGED, PICTURES, shapes, sliced

LOSSES = {
    "squares": {},
    "squares, weighted": {"kind": "huber_wavelet", "c_min": 1e6, "c_max": 1e6},
    "wavelet": {"kind": "huber_wavelet"},
    "wavelet, β = ½": {"kind": "huber_wavelet", "beta": 0.5},
}
SIGMAS = [(part + 0.5) / 8 for part in range(8)]


@torch.no_grad()
def band_errors(model, truth: torch.Tensor, noise: torch.Tensor) -> tuple[float, float]:
    """Mean square error of the velocity in LL and in the other bands, over SIGMAS."""
    from rectiflow.samplers.haar import haar_split

    low, high = 0.0, 0.0
    for sigma in SIGMAS:
        x = (1.0 - sigma) * truth + sigma * noise
        answer = torch.cat([model.velocity(part, torch.full((len(part),), sigma), [None] * len(part)) for part in x.split(64)])
        ll, *rest = haar_split(answer - (noise - truth), "bench")
        low += float(ll.square().mean()) / len(SIGMAS)
        high += float(torch.stack(rest).square().mean()) / len(SIGMAS)
    return low, high


def fine_energy(pictures: torch.Tensor) -> float:
    from rectiflow.samplers.haar import haar_split

    return float(torch.stack(haar_split(pictures, "bench")[1:]).square().mean())


def main() -> None:
    from rectiflow.train.config import TrainConfig
    from rectiflow.train.loop import Trainer
    from rectiflow.train.losses import Loss
    from rectiflow.train.optim import Optim

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    truth = shapes(JUDGED, 1)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))
    rows = []
    for seed in range(given.seeds):
        for name, loss in LOSSES.items():
            model = small_flow(3, HIDDEN, seed)
            config = TrainConfig(
                steps=given.steps, batch=BATCH, seed=seed, loss=Loss(**loss), optim=Optim(lr=3e-3, warmup=50), ema=0.99, dropout=0.0,
                validate_every=0, save_every=0,
            )  # fmt: skip
            started = time.process_time()
            trainer = Trainer(model, Table(shapes(PICTURES, seed + 10)), config)
            trainer.run()
            seconds = time.process_time() - started
            with trainer.averaged():
                low, high = band_errors(model, truth, noise)
                pictures = drawn(model, noise, 50)
            energy = fine_energy(pictures) / fine_energy(truth)
            found = (low, high, energy, sliced(pictures, truth))
            rows.append((name, seed, given.steps, *(f"{value:.4f}" for value in found), f"{seconds:.0f}"))
            print(*rows[-1], flush=True)
    header = ("loss", "seed", "steps", "coarse_error", "fine_error", "fine_energy", "distance_50_steps", "processor_seconds")
    write_table("train_wavelet", header, rows)


if __name__ == "__main__":
    main()
