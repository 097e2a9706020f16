"""Pictures of several sizes in one sequence (FiTv2, arXiv 2410.13925): one model call a step for all of them, each seeing itself alone.

    sequence   text₁ … text_k, picture₁ … picture_k        text_i: the same prompt, once for each picture
    attention  of text_i and picture_i with text_i and picture_i: block-diagonal, computed as k attentions, so no pair is computed in vain
    positions  of each picture from its own corner, as alone

On a host a latent is a rectangle, so the sequence is a strip: the latent patches of all pictures beside each other, one patch high. A patch
is a token, and all that a sampler does, noise, steps, guidance, goes cell by cell: the strip is a latent like any other, and what comes
back is taken apart again. Ids and text are set by the host's post_input patch, which Flux alone has; the attention by dispatch.py.

All pictures of a strip share prompt, pooled text and sigma. No padding is needed: a size is any multiple of the patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import input_error
from ...families.rotary import rotary_spec
from ...families.tokens import attention_spec
from ..region.binding import RUN as REGION_RUN
from .dispatch import AttentionCall, RunFacts, attach
from .rope import ScaledRotary

__all__ = ["Packing", "attach_packing", "packed_attention"]

KEY = "rectiflow_packing"


@dataclass(frozen=True)
class Packing:
    """sizes: latent cells (rows, columns) of each picture; patch: cells of a token along each axis."""

    sizes: tuple[tuple[int, int], ...]
    patch: tuple[int, int]

    @classmethod
    def of(cls, latents: Sequence[Tensor], patch: tuple[int, int], where: str) -> Packing:
        """Raises: NodeInputError for latents that are no pictures, of unequal batch or channels, or of sides that patches do not fill."""
        first = latents[0]
        for number, latent in enumerate(latents, start=1):
            name, got = f"latent_{number}", tuple(latent.shape)
            if latent.ndim != 4 or latent.shape[:2] != first.shape[:2]:
                allowed = f"pictures of one batch and kind, (b, c, h, w) with b, c = {tuple(first.shape[:2])}"
                raise input_error(where, name, got, allowed, "Link latents of one model with equal batch size.")
            if any(side % cells for side, cells in zip(latent.shape[-2:], patch)):
                allowed = f"sides that are multiples of {patch[0]} and {patch[1]} cells"
                raise input_error(where, name, got, allowed, "Use sides that are multiples of 16 pixels behind a VAE of 8.")
        return cls(tuple(tuple(latent.shape[-2:]) for latent in latents), patch)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Tokens (rows, columns) of each picture."""
        return tuple(tuple(side // cells for side, cells in zip(size, self.patch)) for size in self.sizes)

    @property
    def counts(self) -> list[int]:
        return [math.prod(grid) for grid in self.grids]

    def strip(self, latents: Sequence[Tensor]) -> Tensor:
        """(b, c, h_i, w_i) of each picture → (b, c, p, p·Σn)."""
        high, wide = self.patch
        return torch.cat([x.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).transpose(-3, -4).flatten(-3) for x in latents], dim=-1)

    def pictures(self, strip: Tensor) -> list[Tensor]:
        """The inverse of `strip`."""
        parts = strip.split([count * self.patch[1] for count in self.counts], dim=-1)
        grids = [part.unflatten(-1, (*grid, self.patch[1])) for part, grid in zip(parts, self.grids)]  # (b, c, p, rows, columns, p)
        return [grid.transpose(-3, -4).flatten(-2).flatten(-3, -2).contiguous() for grid in grids]

    def ids(self, like: Tensor) -> Tensor:
        """`like` (b, Σn, 3) with the rows and columns of each picture in the last two."""
        ids = like.clone()
        places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in self.grids]
        ids[..., -2:] = torch.cat(places).to(ids)
        return ids


def packed_attention(call: AttentionCall, counts: Sequence[int]) -> Tensor:
    """Attention (b, h, n, d) of each text and picture with itself, tokens in the order of the sequence above."""
    texts = call.text // len(counts)
    out = torch.empty_like(call.q)
    start = call.text
    for number, count in enumerate(counts):
        spans = (slice(number * texts, (number + 1) * texts), slice(start, start + count))
        found = call.default(*(torch.cat([x[:, :, span] for span in spans], dim=2) for x in (call.q, call.k, call.v)), None)
        for span, part in zip(spans, found.split((texts, count), dim=2)):
            out[:, :, span] = part
        start += count
    return out


@dataclass(frozen=True)
class PackingPlan:
    """Settings of a run."""

    packing: Packing
    where: str

    def open(self, facts: RunFacts) -> PackingHandler:
        shape = (self.packing.patch[0], self.packing.patch[1] * sum(self.packing.counts))
        if tuple(facts.shape[-2:]) != shape:
            raise self.refused(f"a latent of {facts.shape[-1]}×{facts.shape[-2]} cells", f"the strip of {shape[1]}×{shape[0]}")
        return PackingHandler(self)

    def refused(self, got: str, allowed: str) -> Exception:
        return input_error(self.where, "latent", got, allowed, "Sample this model with the latent that came with it.")


class PackingHandler:
    """One run; it keeps nothing."""

    def __init__(self, plan: PackingPlan):
        self.plan, self.counts = plan, plan.packing.counts
        self.alone = plan.where

    def active(self, sigma: float) -> bool:
        return True

    def attend(self, call: AttentionCall) -> Tensor:
        if call.extra or call.mask is not None or math.prod(call.sides) != sum(self.counts) or call.text % len(self.counts):
            raise self.plan.refused("reference pictures, a mask of text, or another number of tokens", "a prompt alone")
        return packed_attention(call, self.counts)

    def close(self) -> None:
        pass


def attach_packing(model: Any, latents: Sequence[Tensor], where: str) -> tuple[Any, Tensor, Packing]:
    """(a clone of MODEL `model` that draws the pictures of `latents` in one sequence, their strip, how to take it apart).

    Raises: NodeInputError for latents that do not go together, a family other than Flux, and positions that another node has scaled.
    """
    transformer = model.get_model_object("diffusion_model")
    spec = attention_spec(transformer, where)
    if spec.family != "Flux" or not hasattr(transformer, "vector_in"):
        allowed = "Flux, whose positions and text a host's patch reaches"
        raise input_error(where, "model", type(transformer).__name__, allowed, "Sample the sizes one by one.")
    if isinstance(model.get_model_object(f"diffusion_model.{rotary_spec(transformer, where).name}"), ScaledRotary):
        got = "a model with RoPE Extrapolation, which reads the size of one picture"
        raise input_error(where, "model", got, "a model without it", "Sample sizes beyond the training size one by one.")
    packing = Packing.of(latents, spec.patch[-2:], where)
    plan = PackingPlan(packing, where)

    def place(args: dict) -> dict:
        """The host's ids are those of a strip, and its text is there once."""
        copies = len(packing.counts)
        texts = {name: args[name].repeat(1, copies, 1) for name in ("txt", "txt_ids")}
        return {**args, **texts, "img_ids": packing.ids(args["img_ids"])}

    def around_call(executor, x, t, *args, **kwargs):
        """Each of these leaves the attention to others, and would let one picture see the next."""
        options = next((value for value in (kwargs.get("transformer_options"), *args[::-1]) if isinstance(value, dict)), {})
        if REGION_RUN in options or bool((t != t.flatten()[0]).any()):
            raise plan.refused("region-adaptive steps, or pictures at different sigmas", "whole steps at one sigma")
        return executor(x, t, *args, **kwargs)

    patched = attach(model, plan, where)
    patched.set_model_patch(place, "post_input")
    patched.add_wrapper_with_key("apply_model", KEY, around_call)
    return patched, packing.strip(latents), packing
