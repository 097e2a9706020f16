"""A small MMDiT that trains in a minute on a CPU, for benches of training: a Flux of one double and two single blocks."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import torch
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.samplers.solvers import sample_euler
from rectiflow.tiny.weights import FLUX_SIZES
from rectiflow.train.config import TrainConfig
from rectiflow.train.loop import Batch, Callbacks, Trainer
from rectiflow.train.recipes.tiny import TinyTrainee, initialise
from torch import Tensor, nn


def small_flow(channels: int, hidden: int, seed: int) -> TinyTrainee:
    """Heads of 32, patches of 2×2, fp32; random weights of `seed`. It is trained and asked under the empty prompt."""
    sizes = {
        **FLUX_SIZES, "in_channels": channels, "out_channels": channels, "hidden_size": hidden, "num_heads": hidden // 32, "depth": 1,
        "depth_single_blocks": 2, "axes_dim": [4, 14, 14],
    }  # fmt: skip
    model = TinyTrainee(Flux(FluxParams(**sizes)), 1, torch.float32)
    initialise(model, seed)
    return model


class Table:
    """Latents (n, c, h, w), and the noise of each where they are pairs."""

    def __init__(self, latents: Tensor, noise: Tensor | None = None):
        self.latents, self.noise, self.fingerprint = latents, noise, str(float(latents.double().sum()))

    def buckets(self) -> list[list[int]]:
        return [list(range(len(self.latents)))]

    def batch(self, rows: Tensor, draws) -> Batch:
        return Batch(self.latents[rows], [None] * len(rows), noise=None if self.noise is None else self.noise[rows])


def trained_for(seconds: float, model: nn.Module, data: Any, config: TrainConfig) -> tuple[Trainer, float]:
    """(A trainer that has run for at most so many seconds of the processor, those it took)."""
    started = time.process_time()

    def interrupt() -> None:
        if time.process_time() - started > seconds:
            raise TimeoutError

    trainer = Trainer(model, data, config, callbacks=Callbacks(interrupt=interrupt))
    with suppress(TimeoutError):
        trainer.run()
    return trainer, time.process_time() - started


@torch.no_grad()
def drawn(model: TinyTrainee, noise: Tensor, steps: int, rows: int = 64) -> Tensor:
    """Where `steps` Euler steps from `noise` (n, c, h, w) end."""

    def denoised(x: Tensor, sigma: Tensor, **extra) -> Tensor:
        return x - sigma.view(-1, 1, 1, 1) * model.velocity(x, sigma, [None] * len(x))

    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    return torch.cat([sample_euler(denoised, part, sigmas, disable=True) for part in noise.split(rows)])
