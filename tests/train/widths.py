"""Models of several widths: their shapes, and first weights as µP wants them. For the tests and bench/mup.py."""

from __future__ import annotations

import torch


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.named_parameters()}


def initialise(model: torch.nn.Module, seed: int) -> None:
    """1/sqrt(fan_in) for every matrix, the last layer, modulation and positions zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.buffers():
            value.zero_()
        for name, value in model.named_parameters():
            value.requires_grad_(True)
            if name.endswith(("norm.scale", "ln_q.weight", "ln_k.weight")):
                value.fill_(1.0)
            elif value.ndim < 2 or "mod" in name.lower() or "final_layer" in name:
                value.zero_()
            else:
                value.copy_(torch.randn(value.shape, generator=draw) * value[0].numel() ** -0.5)
