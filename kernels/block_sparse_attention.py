"""Attention in which a block of queries sees only some blocks of keys; what is left out costs neither time nor memory.

    out_i = Σ_j softmax_j(q_i·k_j/√d + bias_j) v_j,   j over the tokens of the blocks that the block of i keeps

A BlockLayout says which tokens make a block and which blocks a block keeps. Blocks may differ in length, so a grid that groups do not
divide needs no padding, and text is a block like any other that keeps all and is kept by all. Tokens are read through the layout's order:
nothing is permuted before or after.

    reference   dense attention under the layout as a mask; for tests
    torch       block_sparse_torch.py: kept keys are gathered for SDPA, as many at a time as a core's cache holds
    Triton      block_sparse_triton.py: one program a tile of queries and a head, an online softmax over the kept blocks
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention_lse import four_axes
from .backend import takes_triton
from .block_layout import BlockLayout
from .block_sparse_torch import torch_path

__all__ = ["BlockLayout", "block_sparse_attention", "reference", "torch_path"]

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
