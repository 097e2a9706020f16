"""Attention that is sharper where there are more tokens than in training: logits times a factor, of all tokens or of the picture's alone.

With N tokens of the picture and N₀ of the training size:
    paper_log     max(1, log N / log N₀)            FiTv2, arXiv 2410.13925, eq. 15
    fit_code      max(1, log 2N / log N₀)           FiTv2's code, with which its figures were made
    lumina_sqrt   max(1, √(log N / log N₀))         Lumina-Next, arXiv 2406.18583

Both papers have the picture's tokens alone in the attention; where text stands beside them,
    all           every logit is multiplied, text's too; it goes through the rotary table, see rope.py
    picture       s_ij·f for i and j of the picture, s_ij where either is text or a reference picture
No product of one factor a query and one a key is f for picture with picture and 1 for the other three kinds of pairs. So the picture's
queries look at keys of which the picture's are multiplied, and all other queries at the keys as they are: as many pairs, in two calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import NodeInputError, input_error
from ...families.tokens import SUPPORTED
from .dispatch import AttentionCall, RunFacts, attach

__all__ = ["ACTS_ON", "LENGTH_SCALES", "PictureScale", "attach_picture_scale", "length_factor", "scaled_picture_attention"]

LENGTH_SCALES = ("off", "paper_log", "fit_code", "lumina_sqrt")
ACTS_ON = ("all", "picture")


def length_factor(kind: str, tokens: int, trained: int) -> float:
    """What logits of `tokens` image tokens are multiplied by; 1 for no more than `trained`."""
    if kind == "off" or tokens <= trained:
        return 1.0
    asked = 2 * tokens if kind == "fit_code" else tokens
    ratio = math.log(asked) / math.log(trained)
    return math.sqrt(ratio) if kind == "lumina_sqrt" else ratio


def scaled_picture_attention(call: AttentionCall, factor: float) -> torch.Tensor:
    """Attention (b, h, n, d) whose logits of picture queries and picture keys are multiplied by `factor`."""
    first, last = call.text, call.text + math.prod(call.sides)
    keys = torch.cat((call.k[:, :, :first], call.k[:, :, first:last] * factor, call.k[:, :, last:]), dim=2)
    out = torch.empty_like(call.q)
    for rows, k in ((slice(first, last), keys), (slice(0, first), call.k), (slice(last, call.q.shape[2]), call.k)):
        if rows.stop > rows.start:
            out[:, :, rows] = call.default(call.q[:, :, rows], k, call.v, _mask_of(call.mask, rows))
    return out


def _mask_of(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Rows of a mask (…, n or 1, n) over queries and keys, or a mask of keys alone as it is."""
    return mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., rows, :]


@dataclass(frozen=True)
class PictureScale:
    """Settings. kind: one of LENGTH_SCALES; trained: tokens of the training picture; where: the node's title."""

    kind: str
    trained: int
    where: str

    def open(self, facts: RunFacts) -> PictureHandler:
        return PictureHandler(self)


class PictureHandler:
    """One run; it keeps nothing."""

    def __init__(self, plan: PictureScale):
        self.plan = plan
        self.alone = f"{plan.where} with apply_to picture"

    def active(self, sigma: float) -> bool:
        return True

    def attend(self, call: AttentionCall) -> torch.Tensor | None:
        factor = length_factor(self.plan.kind, math.prod(call.sides[-2:]), self.plan.trained)
        return None if factor == 1.0 else scaled_picture_attention(call, factor)

    def close(self) -> None:
        pass


def attach_picture_scale(model: Any, kind: str, trained: int, where: str) -> Any:
    """A clone of MODEL `model` that scales the logits of its picture's tokens among themselves.

    Raises: NodeInputError for a family whose attention is not known; while sampling, for another node that takes the same attention.
    """
    try:
        return attach(model, PictureScale(kind, trained, where), where)
    except NodeInputError:
        got = f"picture on {type(model.get_model_object('diffusion_model')).__name__}"
        remedy = "Choose all, which goes through the rotary table."
        raise input_error(where, "apply_to", got, f"a model whose attention is known: {SUPPORTED}, HunyuanVideo", remedy) from None
