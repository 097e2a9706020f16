"""Examples for the trainer: latents with a condition each, of one size or of several, or pairs of noise and picture."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import input_error
from .draws import Draws
from .loop import Batch

__all__ = ["Dataset", "LatentData"]


@dataclass(frozen=True)
class Dataset:
    """What a data node hands on.

    latents: one (c, …) tensor an example, as a LATENT holds it (not scaled for a model). conditioning: CONDITIONING entries, one an
    example or one for all. weights: (1, h, w) masks in latent cells, one an example, or none. noise: of each latent where they are pairs,
    which are in a model's space already; facts: what joined the pairs. flip: mirror every second pair, noise and picture alike.
    """

    latents: tuple[Tensor, ...]
    conditioning: tuple
    weights: tuple[Tensor, ...] = ()
    noise: tuple[Tensor, ...] = ()
    facts: str = ""
    flip: bool = False

    def __len__(self) -> int:
        return len(self.latents)

    def check(self, where: str) -> None:
        """Raises NodeInputError for no examples, numbers that are not finite, or a count of prompts that does not fit."""
        if not self.latents:
            raise input_error(where, "latents", "no examples", "at least one latent", "Link a LATENT that holds pictures.")
        broken = [row for row, latent in enumerate(self.latents) if not bool(torch.isfinite(latent).all())]
        if broken:
            raise input_error(where, "latents", f"NaN or infinity in example {broken[0]}", "finite numbers", "Remove that example.")
        if len(self.conditioning) not in (1, len(self)):
            allowed = f"1 or {len(self)} prompts for {len(self)} latents"
            raise input_error(where, "positive", f"{len(self.conditioning)} prompts", allowed, "Give one prompt for all, or one each.")


class LatentData:
    """The trainer's view of latents in the space of a model. The condition of a row is its number in `prompts`.

    Args:
        latents: (c, …) fp32 in model space. prompts: conditions there are, 1 or one a latent.
        noise: of each latent where they are pairs. weights: masks of the latents. flip: mirror about every second pair from left to right.
    """

    def __init__(
        self, latents: Sequence[Tensor], prompts: int, noise: Sequence[Tensor] | None = None, weights: Sequence[Tensor] = (),
        facts: str = "", flip: bool = False,
    ):  # fmt: skip
        self.latents, self.prompts, self.noise, self.weights, self.flip = list(latents), prompts, noise, list(weights), flip
        digest = hashlib.sha256(facts.encode() + b"flip" * flip)
        for latent in self.latents:
            digest.update(repr(tuple(latent.shape)).encode() + latent.contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def buckets(self) -> list[list[int]]:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for row, latent in enumerate(self.latents):
            by_shape.setdefault(tuple(latent.shape), []).append(row)
        return list(by_shape.values())

    def batch(self, rows: Tensor, draws: Draws) -> Batch:
        chosen = rows.tolist()
        clean = torch.stack([self.latents[row] for row in chosen])
        noise = torch.stack([self.noise[row] for row in chosen]) if self.noise is not None else None
        if self.flip and noise is not None:
            mirrored = draws.uniform("flip", (len(chosen),)) < 0.5
            clean[mirrored], noise[mirrored] = clean[mirrored].flip(-1), noise[mirrored].flip(-1)
        weight = torch.stack([self.weights[row] for row in chosen]) if self.weights else None
        return Batch(clean, [row if self.prompts > 1 else 0 for row in chosen], weight, noise)
