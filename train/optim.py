"""Optimisers and their schedules.

AdamW (Loshchilov & Hutter 2019) for everything, or Muon (Jordan et al. 2024) for the matrices of the blocks and AdamW for the rest:
Muon replaces the momentum of a matrix by the nearest orthogonal matrix, found by five Newton-Schulz steps, so that every direction of
the matrix learns at one rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import input_error

__all__ = ["KINDS", "SCHEDULES", "Muon", "Optim", "Optimizers", "lr_factor", "orthogonal"]

KINDS = ("adamw", "adam", "sgd", "muon")
SCHEDULES = ("constant", "cosine", "linear", "decay_at_end")

# Coefficients of x → a·x + b·x³ + c·x⁵ that lift singular values from 0.01 into 0.7…1.2 within five steps (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Optim:
    """How parameters move.

    Args:
        kind: one of KINDS; "muon" takes the weights that `muon_for` matches (where they are matrices) and gives AdamW the rest.
        lr: of AdamW, Adam or SGD. muon_lr: of Muon's matrices, whose updates all have singular values near 1.
        betas, eps, weight_decay: AdamW's; decay is decoupled and times lr. sgd reads betas[0] as its momentum.
        warmup: steps of linear rise. schedule: one of SCHEDULES; "decay_at_end" is constant and falls linearly over the last
            `decay_steps`, so that a run may be prolonged or cut short at any step before these begin.
        floor: fraction of lr at the end. clip: largest gradient norm, 0 for none.
        factors: (regular expression over parameter names, multiple of lr); the first that matches counts. Not for Muon's matrices.
        even_decay: AdamW's decay is times lr alone, not times a parameter's own multiple of it.
    """

    kind: str = "adamw"
    lr: float = 1e-4
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 20
    schedule: str = "cosine"
    decay_steps: int = 0
    floor: float = 0.02
    clip: float = 1.0
    muon_for: str = r"blocks\..*weight$"
    muon_not_for: str = r"mod"
    factors: tuple[tuple[str, float], ...] = ()
    even_decay: bool = False

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "factors", tuple((name, float(factor)) for name, factor in self.factors))
        for name, allowed in (("kind", KINDS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise input_error("Train", name, getattr(self, name), ", ".join(allowed), "Choose one of these.")
        checks = (
            ("lr", 0.0 <= self.lr <= 10.0, "0 to 10"),
            ("muon_lr", 0.0 <= self.muon_lr <= 10.0, "0 to 10"),
            ("betas", len(self.betas) == 2 and all(0.0 <= beta < 1.0 for beta in self.betas), "two numbers from 0 to below 1"),
            ("eps", 0.0 < self.eps <= 1.0, "above 0, at most 1"),
            ("weight_decay", 0.0 <= self.weight_decay <= 1.0, "0 to 1"),
            ("warmup", self.warmup >= 0, "0 or more steps"),
            ("decay_steps", self.decay_steps >= 0, "0 or more steps"),
            ("floor", 0.0 <= self.floor <= 1.0, "0 to 1"),
            ("clip", 0.0 <= self.clip < math.inf, "0 (no clipping) or more"),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise input_error("Train", name, getattr(self, name), allowed, "Correct the number.")


def lr_factor(optim: Optim, step: int, steps: int) -> float:
    """What lr is multiplied by in step `step` (from 0) of `steps`."""
    rise = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    if optim.schedule == "constant":
        return rise
    if optim.schedule == "decay_at_end":
        left = min(1.0, (steps - step) / optim.decay_steps) if optim.decay_steps else 1.0
        return rise * (optim.floor + (1.0 - optim.floor) * max(0.0, left))
    done = min(1.0, max(0.0, (step - optim.warmup) / max(1, steps - optim.warmup)))
    fall = 0.5 * (1.0 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1.0 - done
    return rise * (optim.floor + (1.0 - optim.floor) * fall)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, r, c) → about U Vᵀ of each singular value decomposition: singular values land in 0.7…1.2.

    In bf16, which is enough, but for processors that have no bf16 products and emulate them more slowly than fp32.
    """
    a, b, c = NEWTON_SCHULZ
    emulated = matrices.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    x = matrices.float() if emulated else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def square_tiles(matrix: Tensor) -> Tensor:
    """(r, c) → squares (n, m, m) of its shorter side m where that divides the longer one, else (1, r, c).

    A fused projection (q, k, v and the MLP's input in one weight) is several maps, and one of its tiles belongs to one of them.
    """
    rows, columns = matrix.shape
    side = min(rows, columns)
    if max(rows, columns) % side:
        return matrix[None]
    return matrix.unflatten(0, (-1, side)) if rows >= columns else matrix.unflatten(1, (-1, side)).transpose(0, 1)


def from_tiles(tiles: Tensor, like: Tensor) -> Tensor:
    """The inverse of square_tiles."""
    if len(tiles) == 1:
        return tiles[0]
    return tiles.flatten(0, 1) if like.shape[0] >= like.shape[1] else tiles.transpose(0, 1).flatten(1, 2)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised tile by tile: W ← (1 − lr·decay)·W − lr·orthogonal(g + μ·m), m ← μ·m + g, 2-D weights only."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight, dtype=torch.float32)
                momentum = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                tiles = square_tiles(torch.add(weight.grad, momentum, alpha=group["momentum"]))
                by_shape.setdefault(tuple(tiles.shape[1:]), []).append((weight, tiles))
            for pairs in by_shape.values():
                updates = orthogonal(torch.cat([tiles for _, tiles in pairs])).split([len(tiles) for _, tiles in pairs])
                for (weight, _), update in zip(pairs, updates):
                    weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                    weight.add_(from_tiles(update, weight).to(weight.dtype), alpha=-group["lr"])


class Optimizers:
    """The optimisers of one run behind one face, with state by parameter name."""

    def __init__(self, optim: Optim, params: Mapping[str, nn.Parameter]):
        self.optim = optim
        self.names = {id(parameter): name for name, parameter in params.items()}
        wanted, refused = re.compile(optim.muon_for), re.compile(optim.muon_not_for)
        matrices = [
            name for name, value in params.items()
            if optim.kind == "muon" and value.ndim == 2 and wanted.search(name) and not (optim.muon_not_for and refused.search(name))
        ]  # fmt: skip
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            muon = Muon([params[name] for name in matrices], optim.muon_lr, weight_decay=optim.weight_decay)
            self.parts.append((muon, optim.muon_lr))
        if len(matrices) < len(params):
            self.parts.append((_torch_optimizer(optim, _by_factor(optim, params, set(matrices))), optim.lr))

    def step(self, factor: float) -> None:
        """Move every parameter by its gradient at `factor` times its learning rate, and forget the gradients."""
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor * group.get("factor", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        for optimizer, _ in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """"<parameter>.<state>" → tensor; numbers become scalars."""
        found = {}
        for optimizer, _ in self.parts:
            for parameter, entries in optimizer.state.items():
                for key, value in entries.items():
                    if value is not None:
                        found[f"{self.names[id(parameter)]}.{key}"] = torch.as_tensor(value)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Parameters that were never stepped have none."""
        for optimizer, _ in self.parts:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    prefix = f"{self.names[id(parameter)]}."
                    entries = {key[len(prefix) :]: value.clone() for key, value in state.items() if key.startswith(prefix)}
                    entries = {key: value for key, value in entries.items() if "." not in key}
                    if entries:
                        optimizer.state[parameter] = entries


def _by_factor(optim: Optim, params: Mapping[str, nn.Parameter], others: set[str]) -> list[dict]:
    """Parameter groups of all but `others`, one a factor, in the order of the parameters."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in params.items():
        if name not in others:
            factor = next((factor for pattern, factor in optim.factors if re.search(pattern, name)), 1.0)
            groups.setdefault(factor, []).append(parameter)
    made = [{"params": members, "factor": factor} for factor, members in groups.items()]
    if optim.even_decay and optim.kind not in ("adam", "sgd"):  # these two have no decay
        for group in made:
            group["weight_decay"] = optim.weight_decay / group["factor"] if group["factor"] else 0.0
    return made


def _torch_optimizer(optim: Optim, params: list[dict]) -> torch.optim.Optimizer:
    if optim.kind == "sgd":
        return torch.optim.SGD(params, lr=optim.lr, momentum=optim.betas[0], weight_decay=optim.weight_decay)
    if optim.kind == "adam":
        return torch.optim.Adam(params, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    return torch.optim.AdamW(params, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True)
