"""Attention in which a block of queries sees only some blocks of keys; what is left out costs neither time nor memory.

    out_i = Σ_j softmax_j(q_i·k_j/√d + bias_j) v_j,   j over the tokens of the blocks that the block of i keeps

A BlockLayout says which tokens make a block and which blocks a block keeps. Blocks may differ in length, so a grid that groups do not
divide needs no padding, and text is a block like any other that keeps all and is kept by all. Tokens are read through the layout's order:
nothing is permuted before or after.

    reference   dense attention under the layout as a mask; for tests
    torch       blocks of equal length and equal number of keys are gathered and run together by SDPA; memory is linear in kept blocks
    Triton      block_sparse_triton.py: one program a tile of queries and a head, an online softmax over the kept blocks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from .backend import takes_triton

__all__ = ["BlockLayout", "block_sparse_attention", "reference", "torch_path"]

GATHERED = 1 << 23  # elements of keys that are gathered at a time: 32 MiB in fp32, of which a block's share stays in a core's cache


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """blocks: the tokens of each block, every token of the sequence in one of them; kept: for each block the blocks it sees, none twice."""

    blocks: tuple[torch.Tensor, ...]
    kept: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        order = torch.cat(self.blocks).sort().values
        if not torch.equal(order, torch.arange(len(order))):
            raise ValueError("block_sparse_attention: blocks must hold every token once")
        if len(self.kept) != len(self.blocks) or not all(len(set(row)) == len(row) > 0 for row in self.kept):
            raise ValueError("block_sparse_attention: every block must keep at least one block, and none twice")

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(block) for block in self.blocks)

    @cached_property
    def keys(self) -> tuple[int, ...]:
        """Keys that a query of each block sees."""
        return tuple(sum(self.lengths[i] for i in row) for row in self.kept)

    @property
    def pairs(self) -> int:
        """Pairs of query and key that are computed."""
        return sum(length * keys for length, keys in zip(self.lengths, self.keys))

    @property
    def share(self) -> float:
        """Of all pairs, those that are computed: 1 − sparsity."""
        return self.pairs / self.tokens**2

    @property
    def dense(self) -> bool:
        return all(len(row) == len(self.blocks) for row in self.kept)

    def mask(self) -> torch.Tensor:
        """(n, n), True where a query sees a key."""
        owner = torch.empty(self.tokens, dtype=torch.long)
        table = torch.zeros(len(self.blocks), len(self.blocks), dtype=torch.bool)
        for i, (block, row) in enumerate(zip(self.blocks, self.kept)):
            owner[block] = i
            table[i, list(row)] = True
        return table[owner][:, owner]

    @cached_property
    def classes(self) -> tuple[tuple[torch.Tensor, tuple[tuple[int, ...], ...]], ...]:
        """Blocks of equal length and equal number of keys: (their tokens (g, l), what each keeps)."""
        members: dict[tuple[int, int], list[int]] = {}
        for i, shape in enumerate(zip(self.lengths, self.keys)):
            members.setdefault(shape, []).append(i)
        return tuple((torch.stack([self.blocks[i] for i in found]), tuple(self.kept[i] for i in found)) for found in members.values())

    def key_index(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Tokens of the kept blocks of each row (g, m), rows of equal length."""
        return torch.stack([torch.cat([self.blocks[i] for i in row]) for row in rows])


def four_axes(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as hosts give it, (q, k), (b, q, k) or (b, h, q, k), bool or added to scores, as (b, h, q, k)."""
    if bias is None or bias.ndim == 4:
        return bias
    return bias[None, None] if bias.ndim == 2 else bias[:, None]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Dense attention under the mask, (b, h, n, d); memory grows with n²."""
    allowed = layout.mask().to(q.device)
    bias = four_axes(bias)
    if bias is None:
        mask = allowed
    elif bias.dtype == torch.bool:
        mask = allowed & bias
    else:
        mask = torch.where(allowed, bias.to(q.dtype), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _bias_of(bias: torch.Tensor | None, queries: torch.Tensor, keys: torch.Tensor, batch: int, heads: int) -> torch.Tensor | None:
    """Part of a mask for queries (g, l) and keys (g, m): (b·h, g, l or 1, m)."""
    if bias is None:
        return None
    if bias.shape[2] == 1:
        part = bias[:, :, 0][:, :, keys].unsqueeze(3)  # (b, h, g, 1, m)
    else:
        part = bias[:, :, queries[:, :, None], keys[:, None, :]]  # (b, h, g, l, m)
    return part.expand(batch, heads, *part.shape[2:]).flatten(0, 1)


def _with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.float()
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def torch_path(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None = None, with_lse: bool = False
):  # fmt: skip
    """(b, h, n, d), and with `with_lse` the fp32 logarithm of each query's sum of exponentials (b, h, n) too."""
    batch, heads, tokens, width = q.shape
    bias = four_axes(bias)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (b·h, n, d)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32) if with_lse else None
    for members, rows in layout.classes:
        many_keys = sum(layout.lengths[i] for i in rows[0])
        scores = members.shape[1] * many_keys if with_lse else 0
        size = max(1, GATHERED // (q.shape[0] * max(many_keys * width, scores)))
        for start in range(0, len(rows), size):
            queries = members[start : start + size].to(q.device)
            keys = layout.key_index(rows[start : start + size]).to(q.device)
            parts = [x.index_select(1, index.flatten()).unflatten(1, index.shape) for x, index in ((q, queries), (k, keys), (v, keys))]
            part_bias = _bias_of(bias, queries, keys, batch, heads)
            if with_lse:
                found, sums = _with_lse(*parts, part_bias)
                lse.index_copy_(1, queries.flatten(), sums.flatten(1, 2))
            else:
                if part_bias is not None and part_bias.dtype != torch.bool:
                    part_bias = part_bias.to(q.dtype)
                found = F.scaled_dot_product_attention(*parts, attn_mask=part_bias)
            out.index_copy_(1, queries.flatten(), found.flatten(1, 2))
    out = out.unflatten(0, (batch, heads))
    return (out, lse.unflatten(0, (batch, heads))) if with_lse else out


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, bias: torch.Tensor | None = None, with_lse: bool = False,
    backend: str = "auto",
):  # fmt: skip
    """Attention over q, k, v (b, h, n, d) in which each block of `layout` sees the blocks it keeps.

    Args:
        bias: (q or 1, k), (b, q or 1, k) or (b or 1, h or 1, q or 1, k); bool with True where allowed, else added to scores.
        with_lse: return the logarithm of each query's sum of exponentials (b, h, n), fp32, too.
        backend: auto (Triton on CUDA where it is installed and the bias is one of keys, else torch), torch or triton.

    Raises: ValueError for tensors that do not fit the layout, or a backend that is not there.
    """
    if not q.shape == k.shape == v.shape or q.ndim != 4 or q.shape[2] != layout.tokens:
        raise ValueError(f"block_sparse_attention: q, k, v {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; {layout.tokens} tokens")
    bias = four_axes(bias)

    def unfit() -> str:
        from . import block_sparse_triton  # Triton is imported where it is asked for

        return block_sparse_triton.unfit(q, bias)

    if takes_triton("block_sparse_attention", backend, q.is_cuda, unfit):
        from .block_sparse_triton import launch

        return launch(q, k, v, layout, bias, with_lse)
    return torch_path(q, k, v, layout, bias, with_lse)
