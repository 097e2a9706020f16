"""Pairs kept while they are made, so that a generation that was interrupted goes on: nothing is made twice, no seed is lost.

Every batch becomes a shard, a file of its own that appears whole or not at all, in a folder named by what joins the pairs. A later run of
the same description takes the shards up to the first gap and makes the rest; when all are there they become one file and the folder goes.
What a header cannot describe, such as a LoRA on the model, is held by a probe: the model's answer at the first noise, asked again on
resuming.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import NodeInputError
from .pairs import FlowPairs, load_pairs, make_pairs, save_pairs

__all__ = ["PairStore"]

CLOSE = 1e-3  # relative difference of probes: rounding between thread counts is below it, a LoRA that does anything is above


@dataclass(frozen=True)
class PairStore:
    """A generation that can be resumed.

    Args:
        root: folder for the unfinished shards. facts: of samplers.pairs.facts_of. like: one latent `(1, …)` of the shape. seed: of pair 0.
        probe: the model's answer at that noise, any shape.
    """

    root: Path
    facts: Mapping[str, str]
    like: Tensor
    seed: int
    probe: Tensor

    @property
    def folder(self) -> Path:
        text = json.dumps([sorted(self.facts.items()), list(self.like.shape[1:]), self.seed])
        return self.root / f".pairs-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def make(self, sample: Callable[[Tensor, int], Tensor], count: int, batch: int) -> tuple[FlowPairs, int]:
        """All `count` pairs, and how many of them an earlier run had left. What interrupts passes through; whole batches stay."""
        parts = self._kept(count)
        kept = sum(map(len, parts))
        for clean, seeds in make_pairs(sample, self.like, count - kept, batch, self.seed + kept):
            made = FlowPairs(clean, seeds, self.facts)
            save_pairs(made, self.folder / f"{int(seeds[0]) - self.seed:09d}.safetensors")
            parts.append(made)
        clean, seeds = (torch.cat([getattr(part, name) for part in parts]) for name in ("clean", "seeds"))
        return FlowPairs(clean[:count], seeds[:count], self.facts), min(kept, count)

    def forget(self) -> None:
        """Remove the shards, once their pairs are in a file of their own."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kept(self, count: int) -> list[FlowPairs]:
        """Shards of an earlier run without a gap; where the probe has changed they are of another model, and go."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        probe = self.folder / "probe.safetensors"
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            before, now = load_file(str(probe))["probe"], self.probe.float().cpu()
            if before.shape == now.shape and (before - now).norm() <= CLOSE * now.norm():
                return self._shards(count)
        self.forget()
        self.folder.mkdir(parents=True)
        save_file({"probe": self.probe.float().cpu().contiguous()}, str(probe))
        return []

    def _shards(self, count: int) -> list[FlowPairs]:
        parts, done = [], 0
        while done < count:
            file = self.folder / f"{done:09d}.safetensors"
            if not file.is_file():
                break
            try:
                part = load_pairs(file, "Flow Pair Generator")
            except NodeInputError:  # damaged: made again
                break
            if part.clean.shape[1:] != self.like.shape[1:] or int(part.seeds[0]) != self.seed + done:
                break
            parts.append(part)
            done += len(part)
        return parts
