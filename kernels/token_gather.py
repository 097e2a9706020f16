"""Rows of tokens taken out, put back and written into a cache, with an index of their own for each sample.

The three moves of a forward over part of the tokens ("Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389):

    gather   out[b, j] = x[b, index[b, j]]
    scatter  out[b, index[b, j]] = rows[b, j], zero elsewhere
    write    cache[b, index[b, j]] = rows[b, j], in place

`dim` is the token axis. A batch of one index serves every sample, and is one contiguous copy in torch. Bytes moved are 2·a·d elements,
about a hundredth of the linear layers behind them, so the torch form is the only one: each public function is the place where another
would be chosen.
"""

from __future__ import annotations

import torch

__all__ = ["gather_tokens", "scatter_tokens", "write_tokens"]


def gather_reference(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    if x.shape[0] == 1:
        x = x.expand(index.shape[0], *x.shape[1:])
    return torch.stack([sample.index_select(dim - 1, rows) for sample, rows in zip(x, index)])


def write_reference(cache: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    if cache.dtype.itemsize == 1 and cache.is_floating_point():  # no index_copy for 8-bit floats; their bytes have one
        write_reference(cache.view(torch.uint8), index, rows.view(torch.uint8), dim)
        return cache
    if index.shape[0] == 1:
        return cache.index_copy_(dim, index[0], rows)
    for sample, places, values in zip(cache, index, rows):
        sample.index_copy_(dim - 1, places, values)
    return cache


def _axis(x: torch.Tensor, index: torch.Tensor, dim: int, shared_batch: bool = False) -> int:
    """The token axis counted from the front; refuses an index that does not belong to x."""
    axis = dim % x.ndim
    if axis == 0 or index.ndim != 2 or index.shape[0] not in (1, x.shape[0]) and not (shared_batch and x.shape[0] == 1):
        given = f"token index {tuple(index.shape)} does not fit tokens {tuple(x.shape)} along axis {dim}"
        raise ValueError(f"{given}: (1 or batch, count) is needed")
    return axis


def gather_tokens(x: torch.Tensor, index: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Rows `index` (1 or b, a) of x (b, …, n, …) along `dim`: (b, …, a, …), a tensor of its own."""
    return gather_reference(x, index, _axis(x, index, dim, shared_batch=True))


def scatter_tokens(rows: torch.Tensor, index: torch.Tensor, length: int, dim: int = 1) -> torch.Tensor:
    """(b, …, a, …) → (b, …, length, …) with zeros where no row belongs."""
    axis = _axis(rows, index, dim)
    shape = list(rows.shape)
    shape[axis] = length
    return write_reference(rows.new_zeros(shape), index, rows, axis)


def write_tokens(cache: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Write rows (b, …, a, …), of the cache's dtype, into cache (b, …, n, …); returns the cache."""
    return write_reference(cache, index, rows, _axis(cache, index, dim))
