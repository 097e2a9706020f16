"""Rotary positions beyond the training size on a MODEL: one object patch on the embedder, one wrapper that says which call is running.

The patch asks the model's own embedder for its table and exchanges the channels of rows and columns whose scale is above 1, so that every
other channel, and every table inside the training size, is the model's own bit for bit. The scale follows the latent of each call, which
makes another size after an interrupt, or two sizes in one graph, plain cases; the time of the flow follows the call's sigma, per sample.

The attention length scale (length_scale.py) of all tokens goes through the table too: cos and sin of queries and keys, √factor each; where
there are no more tokens than in training the table is untouched. That of the picture's tokens alone is attached beside it.
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
from .length_scale import ACTS_ON, LENGTH_SCALES, attach_picture_scale, length_factor
from .rope_spectrum import RopeScaling, amplitude, scaled_frequencies

__all__ = ["RopePlan", "ScaledRotary", "attach"]

KEY = "rectiflow_rope"


@dataclass(frozen=True)
class RopePlan:
    """What to scale: the frequencies, and the logits by the number of tokens; acts_on: which logits, one of ACTS_ON."""

    scaling: RopeScaling
    length_scale: str = "off"
    acts_on: str = "all"

    def check(self, where: str) -> None:
        self.scaling.check(where)
        for name, got, known in (("attention_scale", self.length_scale, LENGTH_SCALES), ("apply_to", self.acts_on, ACTS_ON)):
            if got not in known:
                raise input_error(where, name, got, ", ".join(known), "Choose one of these.")

    @property
    def through_the_table(self) -> str:
        """The length scale that the rotary table carries."""
        return self.length_scale if self.acts_on == "all" else "off"


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
        factor = length_factor(self.plan.through_the_table, math.prod(call.tokens), math.prod(scaling.trained))
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
    if plan.acts_on == "picture" and plan.length_scale != "off":
        patched = attach_picture_scale(patched, plan.length_scale, math.prod(plan.scaling.trained), where)
    return patched
