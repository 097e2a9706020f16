"""Layers that cast their weights to the input's dtype and device when these differ, and pass them through weight functions.

The names and attributes are those a ModelPatcher looks for: `weight_function` and `bias_function` are lists of functions
applied in order at each call (LoRA without merging, weight wrappers), `comfy_cast_weights` marks a layer that may be kept in a
storage dtype such as fp8. Layers are made without initial values, since a checkpoint fills them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["CastWeights", "Conv2d", "GroupNorm", "LayerNorm", "Linear", "RMSNorm", "cast_to_input", "rms_norm"]


def cast_to_input(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`weight` in the dtype and place of `like`; itself where nothing changes."""
    if weight.dtype == like.dtype and weight.device == like.device:
        return weight
    return weight.to(device=like.device, dtype=like.dtype, non_blocking=like.device.type == "cuda")


class CastWeights:
    """Mixed into a torch layer: `weights_for(x)` gives the weight and bias to use with input `x`."""

    comfy_cast_weights = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight_function: list = []
        self.bias_function: list = []
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Initial values would only be overwritten by the checkpoint's."""

    def weights_for(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        weight, bias = self.weight, self.bias
        if weight is not None:
            weight = cast_to_input(weight, x)
            for function in self.weight_function:
                weight = function(weight.clone() if weight is self.weight else weight)  # functions may write in place
        if bias is not None:
            bias = cast_to_input(bias, x)
            for function in self.bias_function:
                bias = function(bias.clone() if bias is self.bias else bias)
        return weight, bias


class Linear(CastWeights, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *self.weights_for(x))


class Conv2d(CastWeights, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, *self.weights_for(x))


class GroupNorm(CastWeights, nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.num_groups, *self.weights_for(x), self.eps)


class LayerNorm(CastWeights, nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, *self.weights_for(x), self.eps)


class RMSNorm(CastWeights, nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019); eps None is the input dtype's own."""

    bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weights_for(x)[0], self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float | None = 1e-6) -> torch.Tensor:
    """RMS norm over the last axis with a bare weight parameter, cast as the layers cast theirs."""
    return F.rms_norm(x, (x.shape[-1],), cast_to_input(weight, x), eps)
