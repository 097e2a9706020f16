"""Examples without a data set: a model's own samples, drawn once or given as pairs, and fixed points of its flow around them.

The pool holds x̂0 = ODE_teacher(noise) by Euler steps, with the teacher's guidance; a training step noises these again. The same seed
gives the same pool, so that a run that is resumed has the examples it had.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import input_error
from ..samplers.pairs import FlowPairs
from .draws import Draws, seeded
from .host_model import train_inside, trainable_weights
from .loop import Batch

__all__ = [
    "CALL", "HELD_OUT", "Calibration", "PoolData", "Switched", "checked_pool", "inside", "parted", "points", "sample_pool", "velocities",
]  # fmt: skip

CALL = 8  # rows a model call has at most
HELD_OUT = 4  # of so many prompts, or points, one
COMPARED = 16  # pairs that are drawn again to see how far a model is from them


@dataclass(frozen=True)
class Calibration:
    """What a model is shown where there is no data set.

    Args:
        positive: CONDITIONING, one entry a prompt. negative: for guidance, or None.
        size: (c, h, w) of a latent of the model. count: samples in the pool. steps, cfg: how the teacher draws them.
        pairs: FlowPairs of the teacher that stand for the pool; then count is how many of them are drawn again to compare with.
    """

    positive: list
    negative: list | None
    size: tuple[int, ...]
    count: int = 16
    steps: int = 12
    cfg: float = 1.0
    seed: int = 0
    pairs: FlowPairs | None = None

    @classmethod
    def from_pairs(
        cls, teacher: Any, positive: list, negative: list | None, pairs: FlowPairs, where: str, seed: int = 0
    ) -> Calibration:  # fmt: skip
        """Pairs in place of samples that `teacher`, a MODEL, would draw.

        Raises: NodeInputError for several prompts, which pairs cannot be told by, and for pairs of another latent space's channels.
        """
        if len(positive) != 1:
            allowed = "the one prompt that the pairs were made with"
            raise input_error(where, "positive", f"{len(positive)} prompts", allowed, "Link that one.")
        channels = teacher.get_model_object("latent_format").latent_channels
        if pairs.clean.shape[1] != channels:
            allowed = f"pairs of {channels} channels, as this model's latents have"
            remedy = "Link pairs that Flow Pair Generator made with it."
            raise input_error(where, "pairs", f"{pairs.clean.shape[1]} channels", allowed, remedy)
        cfg, count = float(pairs.facts["cfg"]), min(len(pairs), COMPARED)
        return cls(positive, negative, tuple(pairs.clean.shape[1:]), count, cfg=cfg, seed=seed, pairs=pairs)

    def noise(self) -> Tensor:
        if self.pairs is not None:
            return self.pairs.noise(slice(0, self.count))
        return torch.randn((self.count, *self.size), generator=seeded(self.seed, "pool"))

    def sigmas(self) -> Tensor:
        """Of the Euler steps, from 1 to 0; those that made the pairs."""
        return torch.linspace(1.0, 0.0, self.steps + 1) if self.pairs is None else torch.tensor(json.loads(self.pairs.facts["sigmas"]))


class PoolData:
    """The pool as the trainer's data: row i has prompt i modulo the number of prompts."""

    def __init__(self, latents: Tensor, prompts: int):
        self.latents, self.prompts = latents, prompts
        self.fingerprint = hashlib.sha256(repr(tuple(latents.shape)).encode() + latents.contiguous().numpy().tobytes()).hexdigest()

    def buckets(self) -> list[list[int]]:
        return [list(range(len(self.latents)))]

    def batch(self, rows: Tensor, draws: Draws) -> Batch:
        return Batch(self.latents[rows], [row % self.prompts for row in rows.tolist()])


@dataclass
class Switched:
    """A trainee as it answers inside `off`, without a gradient: the whole model, on the network of the one that learns."""

    trainee: Any
    off: Callable[[], AbstractContextManager]

    def velocity(self, x: Tensor, sigma: Tensor, cond: list) -> Tensor:
        with self.off(), torch.no_grad():
            return self.trainee.velocity(x, sigma, cond)


def checked_pool(teacher: Any, calibration: Calibration, where: str) -> Tensor:
    """sample_pool of `teacher`, or the pictures of pairs. Raises: NodeInputError for samples that are not finite."""
    pool = sample_pool(teacher, calibration) if calibration.pairs is None else calibration.pairs.clean
    if not bool(torch.isfinite(pool).all()):
        raise input_error(where, "model", "samples with NaN or infinity", "a model whose samples are finite", "Try fp32, or another seed.")
    return pool


def inside(
    guider: Callable, model: Any, calibration: Calibration, body: Callable, additions: Any = None, about: dict | None = None
) -> None:
    """body(trainee) inside a run of `model` under the calibration's conditions. guider(model) → CFGGuider.

    Weights are made ordinary tensors first, and no patch of the run stays on the network behind it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        trainable_weights(model)
        guided = guider(model)
        guided.set_conds(_ordinary(calibration.positive), _ordinary(calibration.negative or calibration.positive[:1]))
        try:
            train_inside(guided, torch.zeros(1, *calibration.size), additions, about or {}, body)
        finally:
            model.detach()


def _ordinary(conditioning: list) -> list:
    from .host_model import ordinary

    return ordinary(list(conditioning))


@torch.no_grad()
def sample_pool(trainee: Any, calibration: Calibration) -> Tensor:
    """x̂0 (count, c, h, w) fp32 on the CPU, in model space."""
    count, prompts = calibration.count, len(trainee.positive)
    noise, sigmas = calibration.noise(), calibration.sigmas()
    parts = []
    for start in range(0, count, CALL):
        x = noise[start : start + CALL]
        cond = [row % prompts for row in range(start, start + len(x))]
        for sigma, following in zip(sigmas, sigmas[1:]):
            x = x + (following - sigma) * guided(trainee, x, sigma.expand(len(x)), cond, calibration.cfg).cpu()
        parts.append(x)
    return torch.cat(parts)


def guided(trainee: Any, x: Tensor, sigma: Tensor, cond: list, cfg: float) -> Tensor:
    velocity = trainee.velocity(x, sigma, cond)
    if cfg == 1.0:
        return velocity
    empty = trainee.velocity(x, sigma, [None] * len(cond))
    return empty + cfg * (velocity - empty)


def points(data: PoolData, count: int, seed: int) -> list[tuple[Tensor, Tensor, list]]:
    """`count` fixed points (x, sigma, cond) in calls of at most 8: sigma in the middles of equal parts of [0, 1], in mixed order."""
    draws = Draws(seed, -2)  # no step is numbered so
    sigma = (torch.randperm(count, generator=draws.generator("order")) + 0.5) / count
    rows = torch.arange(count) % len(data.latents)
    batch, noise = data.batch(rows, draws), draws.normal("noise", (count, *data.latents.shape[1:]))
    s = sigma.view(-1, *[1] * (noise.ndim - 1))
    x = (1.0 - s) * batch.clean + s * noise
    return _calls(x, sigma, batch.cond)


def parted(at: list[tuple[Tensor, Tensor, list]]) -> tuple[list, list]:
    """Points for a fit, and points that judge it: every fourth prompt, or where there are fewer every fourth point, is held out."""
    x, sigma, conds = zip(*at)
    x, sigma, cond = torch.cat(x), torch.cat(sigma), [number for each in conds for number in each]
    by_prompt = max(cond) >= HELD_OUT - 1
    held = [(number if by_prompt else place) % HELD_OUT == HELD_OUT - 1 for place, number in enumerate(cond)]
    parts = [[place for place, out in enumerate(held) if out == judges] for judges in (False, True)]
    shown, judged = (_calls(x[part], sigma[part], [cond[place] for place in part]) for part in parts)
    return shown, judged


def _calls(x: Tensor, sigma: Tensor, cond: list) -> list[tuple[Tensor, Tensor, list]]:
    return [(x[i : i + CALL], sigma[i : i + CALL], cond[i : i + CALL]) for i in range(0, len(x), CALL)]


@torch.no_grad()
def velocities(trainee: Any, at: list[tuple[Tensor, Tensor, list]]) -> Tensor:
    """The trainee's answers at the points, (count, c, h, w) fp32 on the CPU."""
    return torch.cat([trainee.velocity(*point).cpu() for point in at])
