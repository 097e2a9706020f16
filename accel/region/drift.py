"""How far each token's velocity is expected to have moved since it was last computed: metric `change`.

Not of the RAS paper, whose std says little here: noise makes most of a velocity's deviation, and noise does not change. A token left out
keeps v₁, the guided velocity of its last computed σ₁, so at σ it misses v(σ) − v₁. With the two velocities it was last computed at,

    m(σ) = mean over a token's cells of ‖v₁ − v₀‖_c / |σ₁ − σ₀| · |σ₁ − σ|

Tokens of largest m are computed. m grows while a token is left out, so those that move take turns by how fast they do.
"""

from __future__ import annotations

import torch

from .grid import TokenGrid
from .history import SAME_SIGMA
from .select import focus_metric

__all__ = ["Drift"]


class Drift:
    """Each token's last computed guided velocity, its sigma, and how fast the velocity was moving then.

    rate: (b, n) per unit of sigma, None until two sigmas were computed whole.
    """

    def __init__(self, grid: TokenGrid):
        self.grid = grid
        self.rate: torch.Tensor | None = None
        self._v: torch.Tensor | None = None
        self._sigma: torch.Tensor | None = None

    def update(self, v: torch.Tensor, sigma: float, computed: torch.Tensor | None) -> None:
        """Take v (b, c, *shape), in float32 and kept, of the tokens that `computed` (b, n) names, of all for None."""
        if self._v is None or self._sigma is None:
            self._v, self._sigma = v, torch.full((v.shape[0], self.grid.count), sigma, device=v.device)
            return
        everywhere = torch.ones_like(self._sigma, dtype=torch.bool) if computed is None else computed
        gap = (self._sigma - sigma).abs()
        moved = everywhere & (gap > SAME_SIGMA)  # a second evaluation at one sigma has no rate
        rate = focus_metric(v - self._v, self.grid, "l2norm") / gap.clamp_min(SAME_SIGMA)
        if self.rate is not None:
            self.rate = torch.where(moved, rate, self.rate)
        elif bool(moved.all()):
            self.rate = rate
        self._v = torch.where(self.grid.spread(everywhere), v, self._v)
        self._sigma = self._sigma.masked_fill(everywhere, sigma)

    def expected(self, sigma: float) -> torch.Tensor:
        """m (b, n) at sigma."""
        return self.rate * (self._sigma - sigma).abs()
