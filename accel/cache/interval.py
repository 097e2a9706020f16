"""Plain reuse at a fixed interval: every N-th visit is computed, the others repeat it.

"FORA: Fast-Forward Caching in Diffusion Transformer Acceleration", arXiv 2407.01425. With target `output` the velocity is repeated, with
`last_block` the last block's tokens, with `block_delta` what the blocks add. What we do differently: the target is one tensor a condition,
not one a module, and an interval is counted in visits, which is the same for split and joined conditions.
"""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Action, Choice, Policy, Visit

__all__ = ["IntervalReuse", "every"]


def every(interval: int, visit: Visit) -> Choice:
    """Skip interval − 1 visits after each full one."""
    return Choice(Action.SKIP, "forecast") if visit.skipped < interval - 1 else Choice(Action.FULL, "interval")


@dataclass(frozen=True)
class IntervalReuse(Policy):
    """interval: 1 computes every visit, N every N-th."""

    interval: int = 2

    @property
    def can_skip(self) -> bool:
        return self.interval > 1

    def decide(self, visit: Visit) -> Choice:
        return every(self.interval, visit)

    def line(self) -> str:
        return f"reuse every {self.interval}"
