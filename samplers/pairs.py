"""Pairs (noise, picture) that a flow's own ODE joined: what reflow and one-step distillation train on.

"Flow Straight and Fast", arXiv 2209.03003; InstaFlow, arXiv 2309.06380. A file holds the pictures as latents in model space, float32, and
the seed of each noise; a noise is drawn again from its seed on the CPU, to the last bit, so it need not be stored and cannot lose the
coupling to rounding. The header says what joined the pairs, since pairs of another guidance or sampler are another coupling.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import input_error
from .stochastic import RowNoise

__all__ = ["FORMAT", "FlowPairs", "conditioning_hash", "facts_of", "load_pairs", "make_pairs", "save_pairs"]

FORMAT = "rectiflow.flow_pairs.1"
_FACTS = ("conditioning", "cfg", "sampler", "sigmas")


@dataclass(frozen=True)
class FlowPairs:
    """clean: `(n, …)` float32 latents in model space; seeds: `(n,)` int64, of their noises; facts: conditioning (a hash), cfg, sampler and
    sigmas that joined them, as texts."""

    clean: torch.Tensor
    seeds: torch.Tensor
    facts: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.clean)

    def noise(self, rows: slice | None = None) -> torch.Tensor:
        """The noises `(n, …)` of all pairs, or of these rows, drawn again."""
        clean, seeds = (self.clean, self.seeds) if rows is None else (self.clean[rows], self.seeds[rows])
        drawn = [RowNoise(picture[None], int(seed)).draw() for picture, seed in zip(clean, seeds)]
        return torch.cat(drawn) if drawn else torch.empty_like(clean)

    def line(self) -> str:
        """What they are, in one line."""
        size = "×".join(map(str, self.clean.shape[1:]))
        return f"{len(self)} pairs of {size}, {self.facts['sampler']} in {self.facts['sigmas'].count(',')} steps, cfg {self.facts['cfg']}"


def conditioning_hash(*conditionings: list) -> str:
    """Of the tensors and plain options in CONDITIONINGs: equal prompts of one text encoder give equal hashes."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(repr(tuple(value.shape)).encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value):
                digest.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for part in value:
                feed(part)
        elif value is None or isinstance(value, (str, int, float, bool)):
            digest.update(repr(value).encode())

    feed(conditionings)
    return digest.hexdigest()


def make_pairs(sample: Callable[[torch.Tensor, int], torch.Tensor], like: torch.Tensor, count: int, batch: int, seed: int) -> Iterator:
    """(clean, seeds) of `count` pairs, `batch` at a time. Row i draws its noise from seed + i, whatever the batch is.

    Args:
        sample: noise `(b, …)` and its first seed → latents in model space.
        like: one latent `(1, …)`, whose shape the noises have.
    """
    for start in range(0, count, batch):
        rows = min(batch, count - start)
        noise = RowNoise(like.float().cpu().expand(rows, *like.shape[1:]), seed + start).draw()
        yield sample(noise, seed + start).float().cpu(), torch.arange(seed + start, seed + start + rows)


def save_pairs(pairs: FlowPairs, path: Path) -> None:
    """Write one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    hidden = path.with_name(f".{secrets.token_hex(8)}.part")
    header = {"format": FORMAT, "space": "model", **pairs.facts}
    try:
        save_file({"clean": pairs.clean.contiguous(), "seeds": pairs.seeds}, str(hidden), header)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def load_pairs(path: Path, where: str, count: int = 0) -> FlowPairs:
    """The first `count` pairs of a file, all with 0.

    Raises: NodeInputError for a file that is not there or holds no pairs.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "Give the path that Flow Pair Generator reported, below the output folder."
    try:
        with safe_open(str(path), "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT or not set(_FACTS) <= facts.keys():
                raise input_error(where, "path", path.name, f"a file of format {FORMAT}", remedy)
            clean, seeds = file.get_tensor("clean"), file.get_tensor("seeds")
    except (OSError, SafetensorError) as error:
        raise input_error(where, "path", f"{path.name} ({error})", "a readable file of pairs", remedy) from error
    whole = clean.dtype == torch.float32 and clean.ndim > 1 and seeds.dtype == torch.int64 and seeds.shape == clean.shape[:1]
    if not whole or not bool(torch.isfinite(clean).all()):
        got = f"clean {tuple(clean.shape)} {clean.dtype}, seeds {tuple(seeds.shape)} {seeds.dtype}"
        raise input_error(where, "path", got, "finite float32 latents (n, …) and n int64 seeds", "Make the pairs again.")
    keep = count or len(clean)
    return FlowPairs(clean[:keep], seeds[:keep], {name: facts[name] for name in _FACTS})


def facts_of(positive: list, negative: list, cfg: float, sampler: Any, sigmas: torch.Tensor) -> dict[str, str]:
    """What joined the pairs, as a header holds it. Without guidance the negative prompt does not count."""
    prompts = (positive,) if cfg == 1 else (positive, negative)
    function = getattr(sampler, "sampler_function", None) or getattr(getattr(sampler, "sampler", None), "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
    values = json.dumps([float(sigma) for sigma in sigmas.float()])
    return {"conditioning": conditioning_hash(*prompts), "cfg": f"{cfg:g}", "sampler": name, "sigmas": values}
