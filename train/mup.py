"""µP: learning rates, decay and an output multiplier by width, so that the best rate of a narrow model is that of a wide one
("Scaling Diffusion Transformers Efficiently via µP", arXiv 2505.15270; the rules are those of Yang & Hu, arXiv 2203.03466, for Adam).

A width n grows by the number of heads; m = n / n_base. What counts is which sides of a tensor grow with n:

    input-like   fixed → n, vectors    rate lr      decay λ
    hidden       n → n                 rate lr/m    decay λ·m, so that rate · decay stays
    output-like  n → fixed             rate lr      decay λ        its input times α/m
    fixed        neither               rate lr      decay λ

Initial values: hidden layers 1/sqrt(fan_in), output layers zero; a fan_out rule for input layers breaks it. Heads keep their size, so that
attention's 1/sqrt(d) stays. Adam's eps must lie far below the gradients, which shrink with n: 1e-10. Sides are told apart by building
the model at two widths (shapes are enough, so that the meta device will do). Fused projections are hidden as a whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import input_error
from .optim import Optim

__all__ = ["KINDS", "MuP", "measured", "mup_of", "slopes"]

KINDS = ("input", "hidden", "output", "fixed")
Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class MuP:
    """kinds: parameter → one of KINDS. width: m, how many times the base's width. readout: α of the output multiplier."""

    kinds: Mapping[str, str]
    width: float
    readout: float = 1.0

    def optim(self, optim: Optim) -> Optim:
        """`optim`, meant for the base width, for this one. Raises: NodeInputError where it is not Adam's, whose rules these are."""
        if optim.kind not in ("adamw", "adam"):
            raise input_error("µP", "optim", optim.kind, "adamw, adam", "These rules are Adam's; other optimisers have their own.")
        hidden = tuple((f"^{re.escape(name)}$", 1.0 / self.width) for name, kind in self.kinds.items() if kind == "hidden")
        return optim if self.width == 1.0 else replace(optim, factors=(*hidden, *optim.factors), even_decay=True)

    @contextmanager
    def scaled(self, model: nn.Module) -> Iterator[None]:
        """While this is open, the input of every output layer of `model` is times α/m. Weights are not touched, so that nothing can
        be multiplied twice by saving and loading; `folded` gives those of an ordinary model."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if self.kinds.get(f"{name}.weight") == "output":
                    hooks.enter_context(module.register_forward_pre_hook(self._scale))
            yield

    @property
    def multiplier(self) -> float:
        """α/m."""
        return self.readout / self.width

    def _scale(self, module: nn.Module, given: tuple) -> tuple:
        return (given[0] * self.multiplier, *given[1:])

    def folded(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that give the same answers outside of `scaled`."""
        return {
            name: value * self.multiplier if self.kinds[name] == "output" and value.ndim > 1 else value
            for name, value in weights.items()
        }  # fmt: skip


def mup_of(params: Mapping[str, Tensor], base: Shapes, other: Shapes, tables: str = "", readout: float = 1.0) -> MuP:
    """How `params` are to be trained.

    Args:
        base, other: the shapes of the same parameters at the base width and at any other. tables: regular expression over the names of
            look-up tables (words, n), which are input-like although their rows are what is fixed.
    Raises: NodeInputError where the three are not one model at three widths.
    """
    kinds = {name: _kind(name, base, other, tables) for name in params if name in base and name in other}
    if set(params) != set(base) or set(params) != set(other):
        lone = sorted(set(params) ^ set(base) | set(params) ^ set(other))
        raise input_error("µP", "base", f"{lone[0]} in one width alone", "one model at several widths", "Change nothing but the width.")
    widths = {value.shape[1] / base[name][1] for name, value in params.items() if kinds[name] == "hidden"}
    widths |= {value.shape[0] / base[name][0] for name, value in params.items() if kinds[name] == "input" and not _named(tables, name)}
    if len(widths) > 1:
        allowed = "every growing side the same number of times the base's"
        raise input_error("µP", "base", f"widths of {sorted(widths)}", allowed, "Grow all sides by the number of heads.")
    return MuP(kinds, widths.pop() if widths else 1.0, readout)


def _named(tables: str, name: str) -> bool:
    return bool(tables) and re.search(tables, name) is not None


def _kind(name: str, base: Shapes, other: Shapes, tables: str) -> str:
    if len(base[name]) != len(other[name]):
        raise input_error("µP", "other", f"{name} of {tuple(other[name])}", f"{len(base[name])} sides", "Change nothing but the width.")
    grows = [a != b for a, b in zip(base[name], other[name])]
    if any(grows[2:]):
        raise input_error("µP", "other", f"{name} of {tuple(other[name])}", "sides of a kernel that stay", "Change nothing but the width.")
    if not any(grows):
        return "fixed"
    if len(grows) == 1 or _named(tables, name):
        return "input"
    return "hidden" if all(grows[:2]) else "input" if grows[0] else "output"


# The coordinate check: what a layer gives must not depend on the width, at no step of training


@contextmanager
def measured(model: nn.Module, layers: Callable[[str], bool]) -> Iterator[dict[str, float]]:
    """Fills the dictionary it gives: layer of `model` that `layers` names → mean |x| of what it gave last, summed over streams."""
    found: dict[str, float] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, given: tuple, out: Tensor | tuple[Tensor | None, ...]) -> None:
            streams = (out,) if isinstance(out, Tensor) else out
            found[name] = sum(float(stream.detach().abs().mean()) for stream in streams if stream is not None)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if layers(name):
                hooks.enter_context(module.register_forward_hook(keep(name)))
        yield found


def slopes(sizes: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Width → layer → mean |x|, as layer → slope of log mean |x| over log width (least squares): 0 where the layer keeps its scale."""
    widths = sorted(sizes)
    x = torch.tensor([math.log(width) for width in widths], dtype=torch.float64)
    found = {}
    for name in sizes[widths[0]]:
        y = torch.tensor([math.log(sizes[width][name]) for width in widths], dtype=torch.float64)
        found[name] = float((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum())
    return found
