"""What enters each linear layer during a short run: the largest magnitude of every channel, its sum of squares, and rows.

"LRQ-DiT", arXiv 2508.03485, keeps the largest magnitudes. Sum of squares and count give their J, the root mean square of a layer's input
that tells its rotation; a few rows of the first calls let a rotation be chosen by the error it leaves, and a sample over all calls tells
how channels move together, for rounding that makes up for its errors (compensated.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import input_error

__all__ = ["LayerInputs", "QuantStats", "watching"]

ROWS = 96  # kept of each layer: enough to rank rotations, 1.2 MB of a layer of 3072 channels
ROWS_A_CALL = 8


@dataclass
class LayerInputs:
    """peaks (k,), squares (k,) float64, count of tokens, rows (r, k) float32; spread_rows (at most `limit`, k) bfloat16, of all calls, each
    token as likely as any other: those with the smallest of the keys (r,) that were drawn for all; all on the CPU."""

    peaks: torch.Tensor
    squares: torch.Tensor
    limit: int = 0
    count: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)
    spread_rows: torch.Tensor | None = None
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    draws: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    def take(self, x: torch.Tensor) -> None:
        tokens = x.detach().reshape(-1, x.shape[-1])
        self.peaks = torch.maximum(self.peaks, tokens.abs().amax(0).float().cpu())
        self.squares += tokens.float().square().sum(0).double().cpu()
        if sum(map(len, self.rows)) < ROWS:
            step = max(1, len(tokens) // ROWS_A_CALL)
            self.rows.append(tokens[self.count % step :: step][:ROWS_A_CALL].float().cpu().clone())
        self.count += len(tokens)
        if self.limit:
            self._sample(tokens)

    def _sample(self, tokens: torch.Tensor) -> None:
        keys = torch.rand(len(tokens), generator=self.draws)
        chosen = keys < self.keys[-1] if len(self.keys) == self.limit else torch.ones(len(keys), dtype=torch.bool)
        fresh = tokens[chosen.to(tokens.device)].to("cpu", torch.bfloat16)
        rows = fresh if self.spread_rows is None else torch.cat((self.spread_rows, fresh))
        self.keys, order = torch.cat((self.keys, keys[chosen])).sort()
        self.keys, self.spread_rows = self.keys[: self.limit], rows[order[: self.limit]]

    @property
    def sample(self) -> torch.Tensor:
        return torch.cat(self.rows)[:ROWS]

    @property
    def channel_rms(self) -> torch.Tensor:
        """Root mean square of each channel over tokens, (k,) float64."""
        return (self.squares / max(self.count, 1)).sqrt()

    @property
    def spread(self) -> float:
        """J, the root mean square over tokens and channels."""
        return float((self.squares.sum() / (self.count * len(self.squares))).sqrt())


@dataclass(frozen=True)
class QuantStats:
    """Layer name → what entered it."""

    layers: Mapping[str, LayerInputs]

    def check(self, where: str) -> None:
        """Raises: NodeInputError for stats without any token, and for NaN or infinity in any layer."""
        remedy = "Calibrate with a model, prompt and schedule that sample pictures."
        if not any(inputs.count for inputs in self.layers.values()):
            raise input_error(where, "stats", "a calibration without a single token", "one that saw the model run", remedy)
        for name, inputs in self.layers.items():
            if inputs.count and not bool(torch.isfinite(inputs.squares).all()):
                raise input_error(where, "stats", f"NaN or infinity entering {name}", "finite activations", remedy)

    def of(self, name: str, columns: int, where: str) -> LayerInputs | None:
        """What entered layer `name` with this many channels; None where it was not watched or not run.

        Raises: NodeInputError for a layer of another width: stats of another model.
        """
        inputs = self.layers.get(name)
        if inputs is None or not inputs.count:
            return None
        if len(inputs.peaks) != columns:
            got = f"{len(inputs.peaks)} channels for {name}, which has {columns}"
            raise input_error(where, "stats", got, "a calibration of this model", "Link Quant Calibrate to the same model.")
        return inputs

    def table(self) -> str:
        lines = ["| layer | tokens | largest | J |", "|---|---|---|---|"]
        lines += [f"| {name} | {i.count} | {float(i.peaks.max()):.3g} | {i.spread:.3g} |" for name, i in self.layers.items() if i.count]
        return "\n".join(lines)


@contextmanager
def watching(layers: Mapping[str, nn.Linear], limit: int = 0) -> Iterator[QuantStats]:
    """Note what enters these layers until the end of the block, whatever ends it. limit: rows kept of each over all calls."""
    widths = {name: module.in_features for name, module in layers.items()}
    stats = QuantStats({n: LayerInputs(torch.zeros(k), torch.zeros(k, dtype=torch.float64), limit) for n, k in widths.items()})

    def noting(inputs: LayerInputs):
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.take(args[0])

        return hook

    with ExitStack() as hooks:
        for name, module in layers.items():
            hooks.enter_context(module.register_forward_pre_hook(noting(stats.layers[name])))
        yield stats
