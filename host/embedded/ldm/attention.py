"""The one attention function that every transformer here calls, with ComfyUI's override protocol.

`transformer_options["optimized_attention_override"]` is f(func, q, k, v, heads, **kwargs) → output. It is called once an
attention: kwargs already hold `_inside_attn_wrapper`, so `func(…, **kwargs)` runs the default without coming back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["attention_pytorch", "get_attention_function", "optimized_attention", "optimized_attention_masked", "wrap_attn"]

_MAX_BATCH = 2**15  # CUDA's fused kernels put the batch into a grid axis of 2^16 - 1


def wrap_attn(function: Callable) -> Callable:
    """Let a model's attention override stand in for `function` where the call carries transformer_options."""

    @functools.wraps(function)
    def with_override(*args, **kwargs):
        if "_inside_attn_wrapper" in kwargs:
            return function(*args, **kwargs)
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        if override is None:
            return function(*args, **kwargs)
        return override(function, *args, **kwargs, _inside_attn_wrapper=True)

    return with_override


def _full_mask(mask: torch.Tensor) -> torch.Tensor:
    """(q, k) or (b, q, k) → (b or 1, heads or 1, q, k)."""
    if mask.ndim == 2:
        return mask[None, None]
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


@wrap_attn
def attention_pytorch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None, skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs,
) -> torch.Tensor:  # fmt: skip
    """softmax(q kᵀ / sqrt(d) + mask) v.

    Args:
        q, k, v: (b, n, heads·d), or (b, heads, n, d) with `skip_reshape`.
        mask: added to the scores, or bool with True where attention is allowed; (q, k), (b, q, k) or (b, heads, q, k).
        attn_precision: part of the protocol; torch's kernels choose their own accumulator.
        skip_output_reshape: return (b, heads, n, d) instead of (b, n, heads·d).
    """
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (b, h, n, d)
    if mask is not None:
        mask = _full_mask(mask)
    if q.shape[0] <= _MAX_BATCH:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        per_sample = mask is not None and mask.shape[0] > 1
        out = torch.cat([
            F.scaled_dot_product_attention(
                q[i : i + _MAX_BATCH], k[i : i + _MAX_BATCH], v[i : i + _MAX_BATCH],
                attn_mask=mask[i : i + _MAX_BATCH] if per_sample else mask,
            )
            for i in range(0, q.shape[0], _MAX_BATCH)
        ])  # fmt: skip
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


optimized_attention = attention_pytorch
optimized_attention_masked = attention_pytorch


def get_attention_function(name: str) -> Callable:
    """The attention called `name`; this host has one, torch's, which is also the "optimized" one."""
    if name not in ("optimized", "pytorch"):
        raise ValueError(f"attention '{name}' is not here; allowed: optimized, pytorch")
    return attention_pytorch
