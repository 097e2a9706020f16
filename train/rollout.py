"""Back-propagation through a whole sampling run that keeps one latent a step ("time-step gradient checkpointing" of EcoDiff,
arXiv 2412.02852).

    forward, without a graph:  x_0 … x_T are kept
    g ← ∂L/∂x_T;  for t = T … 1:  x_t = F_t(x_{t−1}; θ) again with a graph,  ∂L/∂θ += (∂x_t/∂θ)ᵀ g,  g ← (∂x_t/∂x_{t−1})ᵀ g

Memory is that of one step and T latents, for one more forward pass. What F draws must be drawn before: the released code of the paper draws
its masks again in the second pass, so that its gradient belongs to another run than its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Step", "add_grad", "rollout_gradient", "single_step_gradient"]

Step = Callable[[Tensor, int], Tensor]  # (latents before step i, i) → latents after it


def rollout_gradient(step: Step, start: Tensor, count: int, wanted: Tensor, leaves: Sequence[Tensor], scale: float = 1.0) -> float:
    """Adds scale·∂L/∂leaf to the `grad` of each leaf, L = mean (x_T − wanted)²; returns L.

    start, wanted: (b, …). count: steps of the run.
    """
    latents = [start]
    with torch.no_grad():
        for index in range(count):
            latents.append(step(latents[-1], index))
    difference = latents.pop() - wanted
    gradient = difference * (2.0 * scale / difference.numel())
    for index in reversed(range(count)):
        x = latents.pop().detach()
        with torch.enable_grad():
            out = step(x.requires_grad_(index > 0), index)
        found = torch.autograd.grad(out, [*leaves, x] if index else list(leaves), gradient, allow_unused=True)
        add_grad(leaves, found[: len(leaves)])
        gradient = found[-1]  # of no use after the first step
    return float(difference.square().mean())


def single_step_gradient(
    step: Step, path: Sequence[Tensor], widths: Sequence[float], leaves: Sequence[Tensor], scale: float = 1.0
) -> float:
    """The same for L = mean over steps of mean ((x_{i+1} − wanted_{i+1}) / width_i)², each step from where the whole model had come.

    path: T + 1 latents of the whole model. widths: Δσ of each step, so that velocities are compared.
    """
    total, count = 0.0, len(path) - 1
    for index, width in enumerate(widths):
        with torch.enable_grad():
            error = ((step(path[index], index) - path[index + 1]) / width).square().mean() / count
        add_grad(leaves, torch.autograd.grad(error * scale, list(leaves), allow_unused=True))
        total += float(error.detach())
    return total


def add_grad(leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
    for leaf, gradient in zip(leaves, found):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
