"""The value of a feature at a later step, from its values at earlier ones.

"From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", arXiv 2503.06923. With anchors s_0 (the latest), s_1, …

    reference   D_0 = F(s_0),  D_i = (D_{i−1} − D'_{i−1})/(s_0 − s_1),   F(s) ≈ Σ_i D_i·(s − s_0)^i / i!
    newton      d_0 = F(s_0),  d_k = (d_{k−1} − d'_{k−1})/(s_0 − s_k),   F(s) ≈ Σ_k d_k·Π_{j<k}(s − s_j)

where D', d' are the ladder of the anchor before. What we do differently: `newton`, divided differences, is exact for polynomials up to
its order at any spacing; the reference puts Taylor weights on backward differences and is exact to degree 1 only (for F = s², order 2 and
even spacing N it errs by −N·x at x past the anchor). Both are the same up to order 1.
"""

from __future__ import annotations

import torch

__all__ = ["BASES", "Ladder"]

BASES = ("newton", "reference")
SAME_POSITION = 1e-6  # two evaluations of one step: a difference over them would divide by nothing


class Ladder:
    """The differences of one feature, at most order + 1 tensors of its size; a new anchor replaces all of them.

    Args:
        order: highest difference, 0 keeps the value alone.
        basis: one of BASES.
        dtype, device: how factors are stored; None as the feature is. Differences are taken in float32 before rounding.
    """

    def __init__(self, order: int, basis: str, dtype: torch.dtype | None = None, device: torch.device | None = None):
        self.order, self.basis = order, basis
        self.dtype, self.device = dtype, device
        self.factors: list[torch.Tensor] = []
        self.positions: list[float] = []

    def __len__(self) -> int:
        return len(self.factors)

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in self.factors)

    def bytes_for(self, value: torch.Tensor) -> int:
        """Bytes of one factor of such a feature."""
        return value.numel() * (self.dtype or value.dtype).itemsize

    def growth(self, value: torch.Tensor) -> int:
        """Bytes by which `update` would enlarge the ladder."""
        return self.bytes_for(value) if len(self.factors) <= self.order else 0

    def update(self, position: float, value: torch.Tensor) -> None:
        """A new anchor. `value` is copied.

        An anchor where the latest one stands replaces its value and keeps the differences; one where an older one stands starts anew,
        since the path has turned round.
        """
        if self.positions and abs(position - self.positions[0]) < SAME_POSITION:
            self.factors[0] = self._stored(value)
            return
        if any(abs(position - old) < SAME_POSITION for old in self.positions):
            self.factors, self.positions = [], []
        factors, exact = [self._stored(value)], value.detach().float()
        for k, old in enumerate(self.factors[: self.order]):
            gap = position - self.positions[k if self.basis == "newton" else 0]
            exact = (exact - old.to(exact.device, torch.float32)) / gap
            factors.append(self._stored(exact))
        self.factors, self.positions = factors, [position, *self.positions][: len(factors)]

    def predict(self, position: float, device: torch.device | None = None) -> torch.Tensor:
        """The feature at `position` in float32, in memory of its own."""
        device = device or self.factors[0].device
        powers = [factor.to(device, torch.float32, copy=True) for factor in self.factors]
        total = powers[-1]
        for k in range(len(powers) - 2, -1, -1):
            if self.basis == "newton":
                total = total.mul_(position - self.positions[k]).add_(powers[k])
            else:
                total = total.mul_((position - self.positions[0]) / (k + 1)).add_(powers[k])
        return total

    def trim(self, order: int) -> None:
        """Lower the order; the factors that stay are those a ladder of that order would have."""
        self.order = order
        del self.factors[order + 1 :]
        del self.positions[order + 1 :]

    def _stored(self, value: torch.Tensor) -> torch.Tensor:
        return value.detach().to(self.device or value.device, self.dtype or value.dtype, copy=True)
