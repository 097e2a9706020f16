"""Which MLPs of a host's MODEL are nearly linear, measured on its own samples, and the model with maps in their place."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ..accel.prune.linear_mlps import STREAMS, MlpTokens, fitted_map, mlp_paths, with_maps
from ..accel.prune.scores import Dispatcher
from ..errors import input_error
from .pool import Calibration
from .prune_scores import on_samples

__all__ = ["Linearised", "MapRequest", "linearise"]


@dataclass(frozen=True)
class MapRequest:
    """count: MLPs to exchange, those with the least residual. streams: of linear_mlps.STREAMS. at: points of the flow that are asked;
    tokens: kept of each MLP over all of them."""

    count: int
    streams: str = "both"
    at: int = 16
    tokens: int = 2048


@dataclass(frozen=True)
class Linearised:
    """model; residual of every MLP that was asked, by path; the paths that were exchanged; a report for people."""

    model: Any
    residuals: dict[str, float]
    exchanged: tuple[str, ...]
    report: str


def linearise(model: Any, request: MapRequest, calibration: Calibration, guider: Callable, where: str) -> Linearised:
    """Raises: NodeInputError for a family without such MLPs and more maps than MLPs."""
    started = time.perf_counter()
    paths = [path for path, stream in mlp_paths(model, where).items() if request.streams in (STREAMS[0], stream)]
    if not 1 <= request.count <= len(paths):
        allowed = f"1 to {len(paths)}, the MLPs of {request.streams if request.streams != STREAMS[0] else 'image and text'}"
        raise input_error(where, "count", request.count, allowed, "Lower it, or take both streams.")
    recorded = MlpTokens(max(1, request.tokens // request.at), calibration.seed)

    def measure(gate: Dispatcher, ask: Callable) -> None:
        with ExitStack() as hooks:
            for path in paths:
                module = model.model.diffusion_model.get_submodule(path)  # as it lies there during the run
                hooks.enter_context(module.register_forward_hook(recorded.hook(path)))
            ask()

    on_samples(model, calibration, guider, request.at, where, measure)
    with torch.inference_mode(False), torch.no_grad():
        found = {path: fitted_map(*recorded.tokens(path)) for path in paths}
        residuals = {path: residual for path, (_, _, residual) in found.items()}
        exchanged = tuple(sorted(paths, key=residuals.__getitem__)[: request.count])
        patched = with_maps(model, {path: found[path][:2] for path in exchanged})
    sizes = f"{model.model_size() / 2**20:.2f} → {patched.model_size() / 2**20:.2f} MiB"
    lines = [f"{len(exchanged)} of {len(paths)} MLPs are linear maps; {sizes}; {time.perf_counter() - started:.2f} s", "",
             "| MLP | residual | |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {path} | {residual:.4f} | {'map' if path in exchanged else ''} |" for path, residual in residuals.items()]
    return Linearised(patched, residuals, exchanged, "\n".join(lines))
