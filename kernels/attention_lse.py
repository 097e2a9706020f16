"""Attention that also says the logarithm of each query's sum of exponentials, by which attentions over other keys are weighed against it.

    out_i = Σ_j exp(s_ij − lse_i) v_j,   lse_i = log Σ_j exp s_ij,   s_ij = q_i·k_j/√d + bias_ij

    flash    torch's own kernel for the CPU, which has both in one pass
    scores   elsewhere: the scores of some queries at a time, so that memory is linear
"""

from __future__ import annotations

import torch

__all__ = ["attention_with_lse", "four_axes", "from_scores"]

SCORES = 1 << 24  # at a time: 64 MiB


def four_axes(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as hosts give it, (q, k), (b, q, k) or (b, h, q, k), bool or added to scores, as (b, h, q, k)."""
    if bias is None or bias.ndim == 4:
        return bias
    return bias[None, None] if bias.ndim == 2 else bias[:, None]


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, h, q, d) and fp32 (b, h, q). A query that sees no key has 0 and −∞.

    Args:
        q, k, v: (b, h, q, d), (b, h, k, d), (b, h, k, d).
        bias: (q or 1, k), (b, q or 1, k) or (b or 1, h or 1, q or 1, k); bool with True where a key is seen, else added to scores.
    """
    bias = four_axes(bias)
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill_(~bias, -torch.inf)
    if q.device.type != "cpu":
        return from_scores(q, k, v, bias)
    bias = None if bias is None else bias.to(q.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    return out, lse if bias is None else lse.masked_fill((bias == -torch.inf).all(dim=-1), -torch.inf)


def from_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on any device, for a bias that is added."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    keys = k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    size = max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], size):
        rows = slice(start, start + size)
        scores = q[:, :, rows].float() @ keys
        if bias is not None:
            scores += bias if bias.shape[2] == 1 else bias[:, :, rows]
        sums = lse[:, :, rows] = scores.logsumexp(dim=-1)
        finite = sums.clamp_min(torch.finfo(torch.float32).min)  # −∞ − −∞ is no number
        out[:, :, rows] = (scores - finite[..., None]).exp().to(v.dtype) @ v
    return out, lse
