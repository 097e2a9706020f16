"""A linear layer on a stored weight, in the place of a host's own.

    y = (x·diag(m)·R) Ŵ'ᵀ + bias,      Ŵ' ≈ W·diag(1/m)·R

m smooths (1 where there is none), R is orthogonal. Activations are quantised a token at their own range, so that the product is that of
8-bit integers; 16 bits leave them as they are and the product in floating point. Where a gradient is asked of it, or it is told to
simulate, the integers' numbers are multiplied in floating point, and the gradient passes the rounding of x as if it were not there
(straight through, Bengio et al., arXiv 1308.3432): what trains on such a model learns beside the errors that the integers will make.
A few directions of x may go beside the codes, unrounded (directions.py).

What a patcher does with a layer, and what this one answers:
- it copies options deeply: a copy of this layer is the layer itself;
- it moves models with `.to(device)` and `.to(dtype)`: places change, dtypes of codes and scales never do;
- it exchanges `weight` for a LoRA's sum and puts the old tensor back later: `convert_weight` gives the numbers in the basis the LoRA was
  trained in, `set_weight` takes the sum. Policy requant: codes move on the same grids, as far along the LoRA as it is long. Policy
  bypass: the codes stay and what was added is kept beside them in factors of its rank, y += (x Aᵀ) Bᵀ. The factors belong to the parameter
  that was set with them; once the host puts its backup back they are gone;
- it leaves functions in `weight_function` where memory is short: then the weight is handed out as numbers, the functions run on those, and
  the product is in floating point. Inside, `convert_weight` and `set_weight` pass on what they are given: such a LoRA is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.int8_linear import Int8Weight, int8_linear
from ...kernels.quantise_tokens import NOTHING, quantise_tokens
from ..prune.compact import LayerCut, narrowed, spread
from .directions import Directions
from .rotation import Rotation
from .stored import StoredWeight

__all__ = ["LORA_POLICIES", "QuantLinear", "factors", "product"]

LORA_POLICIES = ("bypass", "requant")
FULL = 16  # bits of activations that are left alone


def factors(added: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """added (n, k) → (a (r, k), b (n, r)) with b a = added to a thousandth of it, or to the rounding of the sum it was taken from.

    A random sketch of growing width (Halko, Martinsson and Tropp, arXiv 0909.4061); beyond a third of full rank factors save nothing, and
    `added` itself is returned as b.

    scale: norm of the weights in the sum.
    """
    rows, columns = added.shape
    limit = max(1e-3 * float(added.norm()), 1e-6 * scale)
    generator, rank = torch.Generator().manual_seed(0), 8
    while rank <= min(rows, columns) // 3:
        sketch = added @ torch.randn(columns, rank, generator=generator).to(added)
        basis, _ = torch.linalg.qr(sketch)
        a = basis.t() @ added
        if float((added - basis @ a).norm()) <= limit:
            return a, basis
        rank *= 2
    return torch.empty(0, columns), added


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `factors` took apart, (n, k) float32."""
    return b.float() @ a.float() if len(a) else b.float()


def _with_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """out (…, n) + x (…, r)·weightᵀ, in place where no gradient asks for both."""
    rows, factor = out.view(-1, len(weight)), x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (out.requires_grad or x.requires_grad):
        return torch.addmm(rows, factor, weight.t()).view_as(out)
    return rows.addmm_(factor, weight.t()).view_as(out)


class QuantLinear(nn.Module):
    """Made by `recipe.quantised_layer`, or by a file.

    Args:
        stored: codes of W·diag(1/m)·R.
        bias: (n,) or None. act_bits: 2 to 8, or 16. smooth: m (k,) float32 or None. lora: one of LORA_POLICIES.
        added: factors (a, b) as `factors` gives them, of what bypasses the codes for good: a file's LoRA. simulate: see above.
        directions: of x that are not rounded, or None.
    """

    comfy_cast_weights = True

    def __init__(
        self, stored: StoredWeight, bias: torch.Tensor | None, act_bits: int, rotation: Rotation, smooth: torch.Tensor | None, lora: str,
        added: tuple[torch.Tensor, torch.Tensor] | None = None, simulate: bool = False, directions: Directions | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = stored.columns, stored.codes.shape[0]
        self.act_bits, self.lora, self.simulate = act_bits, lora, simulate
        self.layout, self.bits = stored.layout, stored.bits
        self.weight = nn.Parameter(stored.codes, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("weight_scale", stored.scale)
        self.register_buffer("tlq_codebook", stored.book)
        self.register_buffer("weight_s_rel", stored.group_scale)
        self.register_buffer("smooth", smooth)
        self.register_buffer("lora_down", None if added is None else added[0])
        self.register_buffer("lora_up", None if added is None else added[1])
        self.register_buffer("directions_down", None if directions is None else directions.down)
        self.register_buffer("directions_residual", None if directions is None else directions.residual)
        self.rotation = rotation
        self.cut: LayerCut | None = None
        self.full = (self.out_features, self.in_features)
        self.weight_function: list = []
        self.bias_function: list = []
        self._added: tuple[nn.Parameter, torch.Tensor, torch.Tensor] | None = None
        self._along: tuple[nn.Parameter, int, torch.Tensor] | None = None  # P of `directions`, of the codes it was made of
        self._handing_out = False

    def __deepcopy__(self, memo: dict) -> QuantLinear:
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        def place(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(place, recurse)
        self._along = None
        self.rotation = self.rotation.to(self.weight.device)
        return self

    @property
    def stored(self) -> StoredWeight:
        tensors = (self.weight.data, self.weight_scale, self.tlq_codebook, self.weight_s_rel)
        return StoredWeight(self.layout, self.bits, self.in_features, *tensors)

    @property
    def handed_out(self) -> tuple[int, int]:
        """Shape of the weight that functions on it are given."""
        return self.full

    @property
    def group(self) -> int:
        return 0 if self.weight_s_rel is None else self.in_features // self.weight_s_rel.shape[1]

    @property
    def nbytes(self) -> int:
        """Of everything but the bias; the rotation's fixed matrices are no part of the model."""
        beside = (self.smooth, self.directions_down, self.directions_residual, *(self.added or ()))
        return self.stored.nbytes + self.held_bytes + sum(tensor.nbytes for tensor in beside if tensor is not None)

    @property
    def held_bytes(self) -> int:
        """Of what is no parameter and no buffer: the drawn part of the rotation."""
        return self.rotation.drawn_bytes

    @property
    def added(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Factors of what bypasses the codes for good."""
        return None if self.lora_up is None else (self.lora_down, self.lora_up)

    @property
    def directions(self) -> Directions | None:
        return None if self.directions_down is None else Directions(self.directions_down, self.directions_residual)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.in_features * self.out_features)

    # A narrow layer's weight at full size, as LoRAs of the whole model have it

    def cut_to(self, cut: LayerCut, full: tuple[int, int]) -> None:
        """The layer holds what `cut` leaves of one of size `full`."""
        self.cut, self.full = cut, full

    def widened(self, weight: torch.Tensor) -> torch.Tensor:
        """(n, k) → its place in the full weight, zeros elsewhere."""
        if self.cut is None:
            return weight
        return spread(spread(weight, self.cut.columns, self.full[1], 1), self.cut.rows, self.full[0], 0)

    def narrowed(self, weight: torch.Tensor) -> torch.Tensor:
        """Of a full weight what this layer has."""
        return weight if self.cut is None else narrowed(weight, self.cut)

    def with_activations(self, act_bits: int, codes: torch.Tensor, bias: torch.Tensor | None) -> QuantLinear:
        """This layer with activations of other bits: it shares every tensor but the codes and bias given, (n, bytes) and (n,)."""
        return self._like(self.stored.with_codes(codes), bias, act_bits, self.directions)

    def with_directions(self, directions: Directions) -> QuantLinear:
        """This layer with directions of x beside its codes; it shares every tensor."""
        return self._like(self.stored, None if self.bias is None else self.bias.data, self.act_bits, directions)

    def _like(self, stored: StoredWeight, bias: torch.Tensor | None, act_bits: int, directions: Directions | None) -> QuantLinear:
        made = QuantLinear(stored, bias, act_bits, self.rotation, self.smooth, self.lora, self.added, self.simulate, directions)
        made.cut, made.full = self.cut, self.full
        return made

    # The basis of the codes and that of training

    def into_basis(self, weight: torch.Tensor) -> torch.Tensor:
        return self.rotation.apply(weight if self.smooth is None else weight / self.smooth)

    def numbers(self, stored: StoredWeight | None = None) -> torch.Tensor:
        """The weight (n, k) float32 that the layer stands for, without what bypasses it."""
        weight = self.rotation.undo((stored or self.stored).numbers())
        weight = weight if self.smooth is None else weight * self.smooth
        return weight if self.directions_down is None else weight + self._beside_codes()

    def requantised(self, weight: torch.Tensor, stored: StoredWeight | None = None) -> torch.Tensor:
        """Codes of another weight (n, k) on the same grids."""
        if self.directions_down is not None:  # what is beside the codes stays there
            weight = weight - self._beside_codes()
        return (stored or self.stored).requantised(self.into_basis(weight))

    # What a patcher calls

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs: Any) -> torch.Tensor:
        """Codes, in whatever dtype they were cast to → the numbers they stand for."""
        if self._handing_out:
            return weight
        return self.widened(self.numbers(self.stored.with_codes(weight.to(self.weight.dtype)))).to(weight.device)

    def set_weight(
        self, weight: torch.Tensor, inplace_update: bool = False, seed: int | None = None, return_weight: bool = False, **kwargs: Any
    ) -> torch.Tensor | None:
        """Take a patched weight (n, k) by the layer's policy; with `return_weight` the codes are returned and the layer stays. The seed, by
        which hosts round to short floating point, is not needed."""
        if self._handing_out:
            return weight
        weight = self.narrowed(weight)
        if self.lora == "bypass" and not inplace_update and not return_weight:
            base = self.numbers()
            a, b = factors(weight.float() - base, float(base.norm()))
            self.weight = nn.Parameter(self.weight.data, requires_grad=False)
            self._added = (self.weight, a.to(base.device), b.to(base.device))
            return None
        codes = self.requantised(weight.float())
        if return_weight:
            return codes
        if inplace_update:
            self.weight.data.copy_(codes)
            self._along = None
        else:
            self.weight = nn.Parameter(codes, requires_grad=False)
        return None

    # The product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight_function:
            return self._product_of_functions(x)
        if self.act_bits == FULL:
            out = F.linear(self.turned(x), self.stored.numbers().to(x.dtype), self._bias(x))
            if self.directions_down is not None:
                out = _with_product(out, F.linear(x, self._reading(x.dtype)), self.directions_residual.to(x.dtype))
        else:
            left, along = self._parted(x)
            bias = self._bias(left)
            if self._simulates(x):
                codes, scale = self.stored.as_int8()
                out = F.linear(self._rounded(left), (codes.float() * scale[:, None]).to(left.dtype), bias)
            else:
                turn = self.rotation.turn(self.smooth)  # the codes' own pass over x turns it, where it can
                given, turn = (self.turned(left), NOTHING) if turn is None else (left, turn)
                out = int8_linear(given, Int8Weight(*self.stored.as_int8()), bias, self.act_bits, turn)
            if along is not None:
                out = _with_product(out, along, self._writing(along.dtype)).to(x.dtype)
        for a, b in self._beside():
            out = _with_product(out, F.linear(x, a.to(x)) if len(a) else x, b.to(x))
        return out

    def _beside_codes(self) -> torch.Tensor:
        """What the codes lose along the directions, as a part of the weight (n, k) float32."""
        return self.directions_residual.float() @ self._reading(torch.float32)

    def _reading(self, dtype: torch.dtype) -> torch.Tensor:
        """(r, k): x times its transpose is z."""
        down = self.directions_down.float()
        return (down if self.smooth is None else down * self.smooth.square()).to(dtype)

    def _writing(self, dtype: torch.dtype) -> torch.Tensor:
        """P (n, r), kept for the codes it was made of."""
        kept = self._along
        if kept is None or kept[0] is not self.weight or kept[1] != self.weight.data_ptr() or kept[2].dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():  # kept beyond a run: training may save it for its backward pass
                made = self.stored.numbers() @ self.turned(self.directions_down.float()).T + self.directions_residual.float()
                self._along = kept = (self.weight, self.weight.data_ptr(), made.to(dtype))
        return kept[2]

    def _parted(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(what of x is rounded, its lengths z (…, r) along the directions that are not), on a CPU in float32."""
        if self.directions_down is None:
            return x, None
        if x.device.type == "cpu":
            x = x.float()  # few channels: dearer in bf16 where the processor emulates it than the change of dtype
        along = F.linear(x, self._reading(x.dtype))
        down = self.directions_down.to(x.dtype)
        left = torch.addmm(x.reshape(-1, x.shape[-1]), along.reshape(-1, len(down)), down, alpha=-1)
        return left.view_as(x), along

    def _simulates(self, *tensors: torch.Tensor) -> bool:
        return self.simulate or torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """x in the codes' basis."""
        return self.rotation.apply(x if self.smooth is None else x * self.smooth.to(x.dtype))

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """x in the codes' basis, as its integers stand for it, in x's dtype; its gradient is that of the basis alone."""
        turned = self.turned(x.float())
        codes, scale = quantise_tokens(turned.detach().reshape(-1, self.in_features), self.act_bits)
        return (turned + ((codes.float() * scale).view_as(turned) - turned).detach()).to(x.dtype)

    def _beside(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Factors of all that bypasses the codes: a file's, and those of the parameter that was set with them."""
        fresh = self._added
        return [pair for pair in (self.added, fresh[1:] if fresh is not None and fresh[0] is self.weight else None) if pair is not None]

    def _bias(self, x: torch.Tensor) -> torch.Tensor | None:
        if self.bias is None:
            return None
        bias = self.bias.to(device=x.device, dtype=x.dtype)
        for function in self.bias_function:
            bias = function(bias.clone() if bias is self.bias else bias)
        return bias

    def _product_of_functions(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.numbers()
        if self.added is not None:
            weight = weight + product(*self.added)
        weight, self._handing_out = self.widened(weight.to(device=x.device, dtype=x.dtype)), True
        try:
            for function in self.weight_function:
                weight = function(weight)
            if self.act_bits != FULL and self._simulates(x, weight):
                left, along = self._parted(x)
                given = self.rotation.undo(self._rounded(left))
                given = given if self.smooth is None else given / self.smooth.to(x.dtype)
                x = (given if along is None else given + along @ self.directions_down.to(given.dtype)).to(weight.dtype)
            return F.linear(x, self.narrowed(weight), self._bias(x))
        finally:
            self._handing_out = False

    def extra_repr(self) -> str:
        what = f"{self.in_features} → {self.out_features}, W{self.bits}A{self.act_bits} {self.layout}{' simulated' * self.simulate}"
        return f"{what}, {self.rotation.kind}, {self.bits_per_weight:.2f} bits a weight"
