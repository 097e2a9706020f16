"""The torch path of block_sparse_attention.py: kept keys are copied side by side for SDPA, in the order of the layout's plan.

Copies are what a sparse attention has beside a dense one, so they are few and near. A large block's keys stay in a buffer for the next
block, which replaces those that it does not see; of small blocks as many run together as a core's cache holds keys of. A cross of small
groups is summed over its lines, whose keys need hardly any copy. Products with a softmax between, written into tensors that
are there, are no faster than SDPA for any number of queries and keys of `bench/attention.py tiles`, so there is one way to attend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .attention_lse import attention_with_lse, four_axes
from .block_layout import BlockLayout, Plan

__all__ = ["torch_path"]

CACHED = 1 << 17  # elements of keys of small blocks that are gathered at a time for each core: with the values 1 MiB in fp32, its L2 cache
GATHERED = 1 << 23  # on other devices: 32 MiB of keys in fp32


@dataclass(frozen=True, eq=False)
class _Step:
    """One call of SDPA for some heads. shape, keys: blocks and their length (g, l), tokens of their keys (g, m); the rest are views of the
    buffers: tokens `moves` are copied to their places in them, then q sees k and v, None for all keys where they lie."""

    shape: tuple[int, int]
    keys: torch.Tensor
    q: torch.Tensor  # (h, g, l, d)
    k: torch.Tensor | None = None  # (h, g, m, d)
    v: torch.Tensor | None = None
    moves: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] = ()


def _steps(plan: Plan, rows: torch.Tensor, buffers: torch.Tensor) -> Iterator[_Step]:
    """All steps in the plan's order, for queries `rows` (h, n, d) in that order and buffers (2, elements) of keys and values."""
    heads, tokens, width = rows.shape
    done = 0

    def queries(*shape: int) -> torch.Tensor:
        nonlocal done
        done += math.prod(shape)
        return rows[:, done - math.prod(shape) : done].view(heads, *shape, width)

    def room(count: int) -> list[torch.Tensor]:
        return [buffer[: heads * count * width].view(heads, count, width) for buffer in buffers]

    if plan.dense:
        yield _Step((1, plan.dense), torch.arange(tokens)[None], queries(1, plan.dense))
    held = room(plan.most)
    for turn in plan.turns:
        moves = tuple((index.to(rows.device), *(x[:, place : place + len(index)] for x in held)) for place, index in turn.new)
        k, v = (x[:, None, : len(turn.keys)] for x in held)
        yield _Step((1, turn.length), turn.keys[None], queries(1, turn.length), k, v, moves)
    for length, keys in plan.classes:
        for index in keys.split(buffers.shape[1] // (heads * keys.shape[1] * width)):
            parts = room(index.numel())
            k, v = (x.view(heads, *index.shape, width) for x in parts)
            shape = (len(index), length)
            yield _Step(shape, index, queries(*shape), k, v, ((index.flatten().to(rows.device), *parts),))


def _bias_of(bias: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Part of a mask (h, n, n), whose first two axes may be 1, for queries (g, l) and keys (g, m): (h or 1, g, l or 1, m)."""
    rows = queries if bias.shape[-2] > 1 else torch.zeros_like(queries[:, :1])
    return bias[..., rows[:, :, None], keys.to(bias.device)[:, None, :]]


def _run(step: _Step, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, with_lse: bool) -> torch.Tensor | None:
    """Put what the queries of a step get in their place; the logarithms of their sums (h, g, l) with `with_lse`."""
    for index, *places in step.moves:
        for x, place in zip((k, v), places):
            if place.is_contiguous():
                torch.index_select(x, 1, index, out=place)
            else:  # of several heads: written element by element, which takes longer than a copy more
                place.copy_(x.index_select(1, index))
    given = (step.q, k[:, None], v[:, None]) if step.k is None else (step.q, step.k, step.v)
    found, sums = attention_with_lse(*given, mask) if with_lse else (F.scaled_dot_product_attention(*given, attn_mask=mask), None)
    step.q.copy_(found)
    return sums


def torch_path(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None = None, with_lse: bool = False
):  # fmt: skip
    """(b, h, n, d), and with `with_lse` the fp32 logarithm of each query's sum of exponentials (b, h, n) too.

    A CPU takes at most as many heads at a time as it has threads, so that each core has one, whose keys stay in its cache.
    """
    bias = four_axes(bias)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad) and not with_lse:
        return _differentiable(q, k, v, layout, bias)
    if layout.in_terms:
        out, lse = _summed(q, k, v, layout, bias)
        return (out, lse) if with_lse else out
    batch, heads, tokens, width = q.shape
    plan, threads = layout.plan, torch.get_num_threads()
    at_once, room = (-(-heads // -(-heads // threads)), CACHED * threads) if q.device.type == "cpu" else (heads, GATHERED)
    rows = q.new_empty(at_once, tokens, width)  # queries, each of which gives way to what it gets
    sums = q.new_empty(at_once, tokens, dtype=torch.float32)
    steps = list(_steps(plan, rows, k.new_empty(2, max(room, at_once * plan.most * width))))
    order, back = plan.order.to(q.device), plan.back.to(q.device)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32) if with_lse else None
    for sample, first in itertools.product(range(batch), range(0, heads, at_once)):
        first = min(first, heads - at_once)  # as many heads every time
        some = slice(first, first + at_once)
        part_q, part_k, part_v = (x[sample, some].contiguous() for x in (q, k, v))
        part_bias = None if bias is None else bias[sample % len(bias), some if bias.shape[1] > 1 else slice(None)]
        torch.index_select(part_q, 1, order, out=rows)
        done = 0
        for step in steps:
            here = slice(done, done := done + math.prod(step.shape))
            mask = None if part_bias is None else _bias_of(part_bias, order[here].view(step.shape), step.keys)
            found = _run(step, part_k, part_v, mask, with_lse)
            if found is not None:
                sums[:, here] = found.flatten(1)
        torch.index_select(rows, 1, back, out=out[sample, some])
        if lse is not None:
            torch.index_select(sums, 1, back, out=lse[sample, some])
    return out if lse is None else (out, lse)


def _summed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_t ± exp(lse_t) out_t / Σ_t ± exp(lse_t). No term is above the whole, so that nothing is lost where one is taken away."""
    most = q.new_full(q.shape[:3], torch.finfo(torch.float32).min, dtype=torch.float32)  # of lse so far; −∞ − −∞ is no number
    total, out = torch.zeros_like(most), q.new_zeros(q.shape, dtype=torch.float32)
    for term in layout.terms:
        here = slice(term.first, term.first + term.layout.tokens)
        part = None if bias is None else bias[:, :, here if bias.shape[2] > 1 else slice(None), here]
        found, lse = torch_path(*(x[:, :, here] for x in (q, k, v)), term.layout, part, with_lse=True)
        before, now = most[:, :, here], torch.maximum(most[:, :, here], lse)
        fade, weight = (before - now).exp_(), (lse - now).exp_().mul_(term.sign)
        total[:, :, here].mul_(fade).add_(weight)
        out[:, :, here].mul_(fade[..., None]).addcmul_(found.float(), weight[..., None])
        before.copy_(now)
    out /= total.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return out.to(q.dtype), most + total.log()


def _differentiable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None) -> torch.Tensor:
    """Block by block without buffers that are written again, for tensors that want a gradient."""
    found = []
    for queries, row in zip(layout.blocks, layout.kept):
        keys = torch.cat([layout.blocks[i] for i in row])
        mask = None if bias is None else _bias_of(bias, queries[None], keys[None]).squeeze(2)
        found.append(F.scaled_dot_product_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=mask))
    return torch.cat(found, dim=2)[:, :, torch.cat(layout.blocks).argsort()]
