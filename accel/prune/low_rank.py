"""Modulation in few numbers: the layers that make a block's shifts, scales and gates from the time embedding, as one shared matrix and a
low-rank difference each (FiTv2's AdaLN-LoRA, arXiv 2410.13925, taken from weights that were trained without it).

    W_i ≈ W_g + B_i A_i        W_g = mean_i W_i,    B_i A_i the r largest singular values of W_i − W_g

for the layers i of equal part and shape in all blocks: of Flux the picture's and the text's in double blocks, those of single blocks. In
the Frobenius norm no other B_i A_i of rank r is nearer to W_i − W_g; at full rank nothing is lost, and nothing is gained either. A layer of
m × d numbers becomes r·(m + d), and each group keeps one m × d. FiTv2 trains with r = d/4. Ours, `shared` off: W_g = 0 and not kept. Blocks
that were trained apart have little in common, so that its numbers may be better spent on the rank.

A LoRA on such a layer, in front of the node or behind it, is kept beside the factors as quantised layers keep theirs. The product with W_g
is computed in every block as before: memory falls, time does not.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import input_error
from ...families.modulation import modulation_groups
from ..modules import NETWORK, seen_modules
from ..quant.linear import factors
from .identity import original_weight

__all__ = ["FactoredLayer", "LowRankLinear", "SharedMatrix", "factored", "factor_modulation", "low_rank_parts"]


class SharedMatrix:
    """W_g (m, d), one object for all layers of its group, moved with the first of them."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class LowRankLinear(nn.Module):
    """y = x W_gᵀ + (x Aᵀ) Bᵀ + bias, in the place of a host's linear layer.

    Args:
        shared: W_g (m, d), or None for none. up: B (m, r), the parameter that hosts see as `weight`. down: A (r, d). bias: (m,) or None.
        first: whether this layer answers for the bytes of W_g.
    """

    comfy_cast_weights = True

    def __init__(self, shared: SharedMatrix | None, up: Tensor, down: Tensor, bias: Tensor | None, first: bool):
        super().__init__()
        self.shared, self.first = shared, first
        self.out_features, self.in_features = up.shape[0], down.shape[1]
        self.weight = nn.Parameter(up, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("down", down)
        self.weight_function: list = []
        self.bias_function: list = []
        self._added: tuple[nn.Parameter, Tensor, Tensor] | None = None
        self._handing_out = False

    def __deepcopy__(self, memo: dict) -> LowRankLinear:
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LowRankLinear:
        super()._apply(fn, recurse)
        if self.shared is not None:
            self.shared.tensor = fn(self.shared.tensor)  # where another layer of the group has moved it already: the same tensor
        return self

    @property
    def handed_out(self) -> tuple[int, int]:
        """Shape of the weight that functions on it are given."""
        return self.out_features, self.in_features

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def held_bytes(self) -> int:
        """Of what is no parameter and no buffer: W_g, once a group."""
        return self.shared.tensor.nbytes if self.shared is not None and self.first else 0

    @property
    def nbytes(self) -> int:
        """Of everything but the bias."""
        return self.weight.nbytes + self.down.nbytes + self.held_bytes

    def numbers(self, up: Tensor | None = None) -> Tensor:
        """The weight (m, d) float32 that the layer stands for, without what is beside it."""
        own = (self.weight.data if up is None else up).float() @ self.down.float()
        return own if self.shared is None else self.shared.tensor.float() + own

    def beside(self) -> tuple[Tensor, Tensor] | None:
        """Factors (a, b) of a LoRA that was set with the parameter that is there now."""
        return self._added[1:] if self._added is not None and self._added[0] is self.weight else None

    # What a patcher calls: it sums a LoRA at full size, exchanges `weight`, and puts the old tensor back later

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """B, in whatever dtype it was cast to → W_g + B A."""
        return weight if self._handing_out else self.numbers(weight.to(self.down.device)).to(weight.device)

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, seed: int | None = None, return_weight: bool = False, **kwargs: Any
    ) -> Tensor | None:
        """Take a patched weight (m, d): the factors stay, what was added is kept beside them."""
        if self._handing_out:
            return weight
        if inplace_update or return_weight:
            raise ValueError("Low-Rank Modulation: this host writes LoRAs into weights in place; link the LoRA's model before this node.")
        base = self.numbers()
        a, b = factors(weight.float() - base, float(base.norm()))
        self.weight = nn.Parameter(self.weight.data, requires_grad=False)
        self._added = (self.weight, a.to(base.device), b.to(base.device))
        return None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x)
        for function in self.bias_function if bias is not None else ():
            bias = function(bias.clone())
        if self.weight_function:
            weight, self._handing_out = self.numbers().to(x), True
            try:
                for function in self.weight_function:
                    weight = function(weight)
            finally:
                self._handing_out = False
            return F.linear(x, weight, bias)
        if self.shared is None:
            out = F.linear(F.linear(x, self.down.to(x)), self.weight.to(x), bias)
        else:
            out = F.linear(x, self.shared.tensor.to(x), bias) + F.linear(F.linear(x, self.down.to(x)), self.weight.to(x))
        pair = self.beside()
        if pair is not None:
            a, b = (part.to(x) for part in pair)
            out = out + (F.linear(F.linear(x, a), b) if len(a) else F.linear(x, b))
        return out

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, rank {self.rank}"


@dataclass(frozen=True)
class FactoredLayer:
    """What became of one layer. error: ‖Ŵ − W‖/‖W‖; before, after: bytes of its weight, W_g's with the first of a group."""

    name: str
    rank: int
    error: float
    before: int
    after: int


def factored(weights: list[Tensor], rank: int, shared: bool = True) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """W_g (m, d), None without `shared`, and (B (m, r), A (r, d)) of each of `weights` (m, d), float32; r is at most min(m, d).

    Each factor carries the root of the singular values, so that a narrow float type serves both alike.
    """
    mean = torch.stack([weight.float() for weight in weights]).mean(0) if shared else None
    pairs = []
    for weight in weights:
        u, s, vh = torch.linalg.svd(weight.float() if mean is None else weight.float() - mean, full_matrices=False)
        root = s[:rank].sqrt()
        pairs.append(((u[:, :rank] * root).contiguous(), (root[:, None] * vh[:rank]).contiguous()))
    return mean, pairs


def low_rank_parts(model: Any) -> dict[str, LowRankLinear]:
    """The factored layers of MODEL as this clone sees them, by name, in the network's order."""
    return {name: module for name, module in seen_modules(model) if isinstance(module, LowRankLinear)}


def factor_modulation(model: Any, rank: int, where: str, shared: bool = True) -> tuple[Any, list[FactoredLayer]]:
    """(a clone of MODEL with factored modulation layers, what became of each). rank: 0 for a quarter of the layer's inputs, as in FiTv2.
    shared: whether the layers of a group have a matrix in common.

    Raises: NodeInputError for a rank below 0, a model without such layers, with quantised ones, or with factored ones.
    """
    if not 0 <= rank <= 65536:
        raise input_error(where, "rank", rank, "0 (a quarter of the width) to 65536", "Enter 0.")
    if low_rank_parts(model):
        raise input_error(where, "model", "a model whose modulation is factored", "one whose is not", "Take one of the two nodes out.")
    modules = dict(seen_modules(model))
    groups = modulation_groups(modules, where)
    for name in (name for names in groups for name in names):
        layer = modules[name]
        if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point() or layer.weight.element_size() < 2:
            remedy = "Link this node before Quantize, to a model in 16 or 32 bits."
            raise input_error(where, "model", f"{name}, a {type(layer).__name__}", "plain linear layers", remedy)
    patched, report, saved = model.clone(), [], 0
    with torch.inference_mode(False):
        for names in groups:
            weights = [original_weight(model, name) for name in names]
            kind = weights[0].dtype
            mean, pairs = factored(weights, rank or max(1, weights[0].shape[1] // 4), shared)
            matrix = None if mean is None else SharedMatrix(mean.to(kind))
            for name, weight, (up, down) in zip(names, weights, pairs):
                bias = original_weight(model, name, "bias")
                layer = LowRankLinear(matrix, up.to(kind), down.to(kind), None if bias is None else bias.clone(), name == names[0])
                error = float((layer.numbers() - weight.float()).norm() / weight.float().norm())
                report.append(FactoredLayer(name, layer.rank, error, weight.nbytes, layer.nbytes))
                saved += weight.nbytes - layer.nbytes
                patched.add_object_patch(NETWORK + name, layer)
    patched.size = model.model_size() - saved
    patched.patches_uuid = uuid.uuid4()  # an object patch alone does not tell the host that the network changes
    return patched, report
