"""Rotary positions beyond the training size on a MODEL: one object patch on the embedder, one wrapper that says which call is running.

The patch asks the model's own embedder for its table and exchanges the channels of rows and columns whose scale is above 1, so that every
other channel, and every table inside the training size, is the model's own bit for bit. The scale follows the latent of each call, which
makes another size after an interrupt, or two sizes in one graph, plain cases; the time of the flow follows the call's sigma, per sample.

Attention length scale: with N tokens of the picture and N₀ of the training size, logits are multiplied by a factor through cos and sin of
queries and keys, √factor each:

    paper_log     max(1, log N / log N₀)            FiTv2, arXiv 2410.13925, eq. 15
    fit_code      max(1, log 2N / log N₀)           FiTv2's code, with which its figures were made
    lumina_sqrt   max(1, √(log N / log N₀))         Lumina-Next, arXiv 2406.18583

Both papers have the picture's tokens alone in the attention. Here text stands beside them and its table is scaled too; where N ≤ N₀ the
table is untouched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import input_error
from ...families.rotary import RotarySpec, rotary_spec
from .rope_spectrum import RopeScaling, amplitude, scaled_frequencies

__all__ = ["LENGTH_SCALES", "RopePlan", "ScaledRotary", "attach", "length_factor"]

KEY = "rectiflow_rope"
LENGTH_SCALES = ("off", "paper_log", "fit_code", "lumina_sqrt")


@dataclass(frozen=True)
class RopePlan:
    """What to scale: the frequencies, and the logits by the number of tokens."""

    scaling: RopeScaling
    length_scale: str = "off"

    def check(self, where: str) -> None:
        self.scaling.check(where)
        if self.length_scale not in LENGTH_SCALES:
            raise input_error(where, "attention_scale", self.length_scale, ", ".join(LENGTH_SCALES), "Choose one of these.")


@dataclass(frozen=True)
class RopeCall:
    """The model call that is running: tokens (rows, columns) of its picture, and sigma (b) of its samples."""

    tokens: tuple[int, int]
    sigma: torch.Tensor


_RUNNING: ContextVar[RopeCall | None] = ContextVar("rectiflow_rope_call", default=None)


@contextmanager
def running(call: RopeCall) -> Iterator[None]:
    token = _RUNNING.set(call)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def length_factor(kind: str, tokens: int, trained: int) -> float:
    """What logits of `tokens` image tokens are multiplied by; 1 for no more than `trained`."""
    if kind == "off" or tokens <= trained:
        return 1.0
    asked = 2 * tokens if kind == "fit_code" else tokens
    ratio = math.log(asked) / math.log(trained)
    return math.sqrt(ratio) if kind == "lumina_sqrt" else ratio


def _rotations(positions: torch.Tensor, omega: torch.Tensor, size: float) -> torch.Tensor:
    """size·[[cos, −sin], [sin, cos]] of positions (b, n) at omega (k) or (b, k): (b, 1, n, k, 2, 2) fp32, first columns contiguous."""
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    omega = omega.to(positions.device, wide)
    angles = positions.to(wide)[..., None] * (omega if omega.ndim == 1 else omega[:, None])
    cos, sin = (angles.cos() * size).float(), (angles.sin() * size).float()
    return torch.stack((cos, sin, -sin, cos), dim=-1).unflatten(-1, (2, 2)).transpose(-1, -2).unsqueeze(1)


class ScaledRotary(nn.Module):
    """The model's embedder with our frequencies on the axes that are longer than in training; it keeps the original's attributes."""

    def __init__(self, original: nn.Module, spec: RotarySpec, plan: RopePlan):
        super().__init__()
        self.original, self.spec, self.plan = original, spec, plan
        self.dim, self.theta, self.axes_dim = getattr(original, "dim", sum(spec.axes)), original.theta, original.axes_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        call = _RUNNING.get()
        if call is None:
            return self.original(ids)
        scaling = self.plan.scaling
        scales = scaling.scales(call.tokens)
        factor = length_factor(self.plan.length_scale, math.prod(call.tokens), math.prod(scaling.trained))
        if scales == (1.0, 1.0):
            table = self.original(ids)
        else:
            table = self._table(ids, call, scales)
        return table if factor == 1.0 else table * math.sqrt(factor)

    def _table(self, ids: torch.Tensor, call: RopeCall, scales: tuple[float, float]) -> torch.Tensor:
        times = (1.0 - call.sigma.float()).clamp(0.0, 1.0).tolist() if self.plan.scaling.timed else [1.0]
        if len(set(times)) == 1:
            times = times[:1]
        shared = ids.shape[0] > 1 and ids.stride(0) == 0 and len(times) == 1
        used = ids[:1] if shared else ids
        sizes = amplitude(self.plan.scaling, scales)
        parts = list(self.original(used).split([channels // 2 for channels in self.spec.axes], dim=-3))
        for place, (scale, length, size) in enumerate(zip(scales, self.plan.scaling.trained, sizes)):
            axis = len(parts) - 2 + place
            if scale > 1.0 or size != 1.0:
                found = _rotations(used[..., axis], self._frequencies(axis, length, scale, times), size).to(parts[axis].dtype)
                parts[axis] = found.reshape(found.shape[0], *parts[axis].shape[1:])  # HiDream has the axis of heads behind the tokens
        # Joined along the pair axis of the transposed matrices, so that the embedded host can read a table as complex numbers.
        table = torch.cat([part.transpose(-1, -2) for part in parts], dim=-3).transpose(-1, -2)
        return table.expand(ids.shape[0], *table.shape[1:]) if shared else table

    def _frequencies(self, axis: int, length: int, scale: float, times: list[float]) -> torch.Tensor:
        found = [scaled_frequencies(self.plan.scaling, self.spec.axes[axis], self.spec.theta, length, scale, t) for t in times]
        return found[0] if len(found) == 1 else torch.stack(found)


def attach(model: Any, plan: RopePlan, where: str) -> Any:
    """A clone of MODEL `model` whose rotary positions follow `plan`.

    Raises: NodeInputError for settings out of range, a family whose positions cannot be exchanged, or a model that has this patch already.
    """
    plan.check(where)
    spec = rotary_spec(model.get_model_object("diffusion_model"), where)
    path = f"diffusion_model.{spec.name}"
    original = model.get_model_object(path)
    if isinstance(original, ScaledRotary):
        remedy = "Keep one of these nodes between model and sampler."
        raise input_error(where, "model", "a model with scaled rotary positions", "a model without them", remedy)
    patched = model.clone()
    if not hasattr(patched, "add_object_patch"):
        remedy = "Use a host whose models take object patches."
        raise input_error(where, "model", type(patched).__name__, "a model that takes object patches", remedy)
    patched.add_object_patch(path, ScaledRotary(original, spec, plan))

    def around_call(executor, x, t, *args, **kwargs):
        rows, columns = (-(-side // cells) for side, cells in zip(x.shape[-2:], spec.patch))
        with running(RopeCall((rows, columns), t)):
            return executor(x, t, *args, **kwargs)

    patched.add_wrapper_with_key("apply_model", KEY, around_call)
    return patched
