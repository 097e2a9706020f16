"""How weight patches change a weight: differences, replacements, low-rank updates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from .model_management import cast_to_device

__all__ = ["calculate_weight", "pad_tensor_to_shape", "WeightAdapterBase", "LoRAAdapter"]


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def pad_tensor_to_shape(tensor: torch.Tensor, new_shape: list[int]) -> torch.Tensor:
    """`tensor` in the first corner of zeros of `new_shape`, which must be at least as large on every axis."""
    if len(new_shape) != tensor.ndim or any(new < old for new, old in zip(new_shape, tensor.shape)):
        raise ValueError(f"a weight of shape {list(tensor.shape)} cannot be padded to {list(new_shape)}")
    padded = tensor.new_zeros(list(new_shape))
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


class WeightAdapterBase:
    """A patch that computes its own update. `weights` are the tensors as the file has them."""

    name: str
    weights: Any

    def calculate_weight(
        self, weight: torch.Tensor, key: str, strength: float, strength_model: float, offset: Any, function: Callable,
        intermediate_dtype: torch.dtype = torch.float32, original_weight: Any = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """The patched weight (the argument may be changed in place), or None when the patch does not fit it."""
        raise NotImplementedError


class LoRAAdapter(WeightAdapterBase):
    """W + strength · (alpha / rank) · up @ down (Hu et al. 2022).

    weights: (up, down, alpha or None, mid or None, dora scale or None, reshape or None), ComfyUI's order. `mid` (LoCon's Tucker
    core) and the DoRA magnitude belong to convolutional and newer formats; they are refused rather than ignored.
    """

    name = "lora"

    def __init__(self, loaded_keys: set[str], weights: tuple):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self, weight: torch.Tensor, key: str, strength: float, strength_model: float, offset: Any, function: Callable,
        intermediate_dtype: torch.dtype = torch.float32, original_weight: Any = None,
    ) -> torch.Tensor | None:  # fmt: skip
        up, down, alpha, mid, dora_scale, reshape = self.weights
        if mid is not None or dora_scale is not None:
            raise ValueError(f"{key}: LoRA with a {'Tucker core' if mid is not None else 'DoRA scale'} is not supported; use a plain LoRA")
        if reshape is not None:
            weight = pad_tensor_to_shape(weight, reshape)
        up = cast_to_device(up, weight.device, intermediate_dtype).flatten(start_dim=1)  # (out, rank)
        down = cast_to_device(down, weight.device, intermediate_dtype).flatten(start_dim=1)  # (rank, in)
        scale = strength if alpha is None else strength * (alpha / down.shape[0])
        update = up @ down
        if update.nelement() != weight.nelement():
            return None
        weight += function((scale * update.reshape(weight.shape)).type(weight.dtype))
        return weight


def _difference(weight: torch.Tensor, key: str, values: tuple, strength: float, function: Callable) -> torch.Tensor:
    difference = values[0]
    if len(values) > 1 and values[1]["pad_weight"] and difference.shape != weight.shape:
        weight = pad_tensor_to_shape(weight, list(difference.shape))
    if difference.shape != weight.shape:
        logging.warning("%s: a patch of shape %s does not fit %s; the weight is left as it is", key, [*difference.shape], [*weight.shape])
    elif strength != 0.0:
        weight += function(strength * cast_to_device(difference, weight.device, weight.dtype))
    return weight


def calculate_weight(
    patches: list[tuple], weight: torch.Tensor, key: str, intermediate_dtype: torch.dtype = torch.float32,
    original_weights: dict | None = None,
) -> torch.Tensor:  # fmt: skip
    """Apply patches to a weight, in order; the given tensor may be changed in place.

    Args:
        patches: tuples (strength, patch, strength of the weight itself, (axis, start, length) or None, function or None). A patch is
            a WeightAdapterBase, ("diff", (tensor,)) or (tensor,), ("set", (tensor,)), ("model_as_lora", (tensor,)), or a list
            [(base weight, convert), patches…] whose own result is the difference.
        weight: in `intermediate_dtype`.
        original_weights: key → [(weight, convert)], needed by "model_as_lora".
    """
    for strength, patch, strength_model, offset, function in patches:
        function = function or _unchanged
        part = weight if offset is None else weight.narrow(*offset)
        if strength_model != 1.0:
            part *= strength_model
        if isinstance(patch, list):
            base, convert = patch[0]
            base = convert(cast_to_device(base, weight.device, intermediate_dtype, copy=True), inplace=True)
            patch = (calculate_weight(patch[1:], base, key, intermediate_dtype=intermediate_dtype),)
        if isinstance(patch, WeightAdapterBase):
            patched = patch.calculate_weight(part, key, strength, strength_model, offset, function, intermediate_dtype, original_weights)
            if patched is None:
                logging.warning("%s patch does not fit %s of shape %s; the weight is left as it is", patch.name, key, list(part.shape))
            elif offset is None:
                weight = patched
            continue
        kind, values = ("diff", patch) if len(patch) == 1 else patch
        if kind == "diff":
            patched = _difference(part, key, values, strength, function)
        elif kind == "set":
            patched = part.copy_(values[0])
        elif kind == "model_as_lora":
            difference = cast_to_device(values[0], part.device, intermediate_dtype)
            difference = difference - cast_to_device(original_weights[key][0][0], part.device, intermediate_dtype)
            patched = _difference(part, key, (difference,), strength, function)
        else:
            raise ValueError(f"{key}: weight patch '{kind}' is unknown; known are diff, set, model_as_lora and adapters")
        if offset is None:
            weight = patched
    return weight
