"""The tensors of one call to a host's attention with its heads apart, the way back, and a weight that some keys have more than others."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["Apart", "apart", "joined", "weighted_keys"]

# q, k, v (b, h, n, d), the mask as it came, default(q, k, v, mask) → (b, h, n, d)
Apart = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", Callable[..., torch.Tensor]]


def apart(backend: Callable, args: tuple, kwargs: dict) -> Apart | None:
    """The call `backend(*args, **kwargs)` with its heads apart, or None where it does not say how many there are."""
    heads = kwargs["heads"] if "heads" in kwargs else args[3] if len(args) > 3 else None
    if heads is None or len(args) < 3:
        return None
    q, k, v, *rest = args
    mask = kwargs.get("mask", rest[1] if len(rest) > 1 else None)
    if not kwargs.get("skip_reshape"):  # ComfyUI's SD3 gives queries (b, n, h·d), keys and values (b, n, h, d)
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))

    def default(q, k, v, mask=mask):
        ours = ("heads", "mask", "skip_reshape", "skip_output_reshape")
        changed = {name: value for name, value in kwargs.items() if name not in ours}
        out = backend(q, k, v, heads, mask=mask, skip_reshape=True, **changed)  # (b, n, h·d)
        return out.unflatten(-1, (heads, -1)).transpose(1, 2)

    return q, k, v, mask, default


def joined(out: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """(b, h, n, d) in the form that the call with `kwargs` answers in."""
    return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


def weighted_keys(
    default: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None,
    by_channel: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention with `bias` (m), the log of each key's weight, added to every query's scores: (b, h, n, d).

    by_channel: whether it is added by one more channel of queries and keys, or by a mask. None: by a mask on the CPU, where one row of it
    costs least; elsewhere masks would cost most backends their fast path.
    """
    if k.device.type != "cpu" if by_channel is None else by_channel:
        return _with_channel(default, q, k, v, bias, mask)
    added = bias[None, None, None]
    if mask is not None:
        added = torch.where(mask, added, -torch.inf) if mask.dtype == torch.bool else mask + added[(0,) * max(0, 4 - mask.ndim)]
    return default(q, k, v, added)


def _with_channel(default: Callable, q, k, v, bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The width stays a multiple of 8 for the backends; the scale that they take from it is undone on the queries."""
    d = k.shape[-1]
    more = 8 - d % 8
    width = d + more

    def widened(x: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, channel.to(x.dtype).expand(*x.shape[:3], 1), x.new_zeros(()).expand(*x.shape[:3], more - 1)), dim=-1)

    q = widened(q * math.sqrt(width / d), q.new_ones(()))
    k = widened(k, bias[:, None] * math.sqrt(width))
    return default(q, k, F.pad(v, (0, more)), mask)[..., :d]
