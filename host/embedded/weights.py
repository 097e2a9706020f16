"""From a state dict to a module: no copy where the dtype stays, a clear word where a weight is missing or has another shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["fill", "load_into", "without_fp8_scales"]


def _list(keys: list[str]) -> str:
    return ", ".join(repr(key) for key in keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def load_into(
    module: torch.nn.Module, weights: Mapping[str, torch.Tensor], what: str, dtype: torch.dtype | None = None,
    may_miss: tuple[str, ...] = (), may_ignore: tuple[str, ...] = (), strict: bool = False,
) -> torch.nn.Module:  # fmt: skip
    """Put `weights` into a module made on the "meta" device, or over what it holds.

    Args:
        what: the model's name for messages.
        dtype: floating weights are cast to it; without a cast the file's memory is used as it is.
        may_miss: prefixes of weights that may be absent. may_ignore: prefixes of tensors that are known not to be weights.
        strict: refuse unknown tensors instead of logging them.

    Raises: ValueError naming missing weights, and weights of another shape.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in weights and not key.startswith(may_miss or "\0")]
    if missing:
        raise ValueError(f"{what}: {len(missing)} weights are missing: {_list(missing)}. The file is not a whole model; fetch it again.")
    unknown = [key for key in weights if key not in own and not key.startswith(may_ignore or "\0")]
    if unknown and strict:
        raise ValueError(f"{what}: {len(unknown)} tensors do not belong to this model: {_list(unknown)}.")
    if unknown:
        logging.warning("%s: %d tensors of the file are not used: %s", what, len(unknown), _list(unknown))
    taken = {}
    for key in own:
        if key not in weights:
            continue
        weight = weights[key]
        if weight.shape != own[key].shape:
            shapes = f"{list(weight.shape)} in the file, {list(own[key].shape)} expected"
            raise ValueError(f"{what}: the weight '{key}' has another shape: {shapes}. The file belongs to another variant.")
        taken[key] = weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight
    module.load_state_dict(taken, strict=False, assign=True)
    return module.eval().requires_grad_(False)


def fill(
    make: Callable[..., torch.nn.Module], *args: Any, weights: Mapping[str, torch.Tensor], what: str, may_miss: tuple[str, ...] = ()
) -> torch.nn.Module:  # fmt: skip
    """`make(*args)` with `weights`. A part that the file lacks altogether (an encoder, say) is None in the module.

    may_miss: prefixes that may be absent as a whole; a part that is there must be whole.
    """
    with torch.device("meta"):
        module = make(*args)
    absent = tuple(prefix for prefix in may_miss if not any(key.startswith(prefix) for key in weights))
    load_into(module, weights, what, may_miss=absent)
    for prefix in absent:
        part = prefix.rstrip(".")
        if any(True for _ in getattr(module, part, torch.nn.Identity()).parameters()):
            setattr(module, part, None)
    return module


def without_fp8_scales(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Multiply the scale factors of "scaled fp8" files into their weights, in `dtype`; other state dicts as they are."""
    scales = {key: scale for key, scale in weights.items() if key.endswith(".scale_weight")}
    out = {key: weight for key, weight in weights.items() if not key.endswith((".scale_weight", ".scale_input")) and key != "scaled_fp8"}
    for key, scale in scales.items():
        name = key[: -len("scale_weight")] + "weight"
        if name in out:
            out[name] = (out[name].float() * scale.float()).to(dtype)
    return out
