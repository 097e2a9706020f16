"""Δ-DiT: what a range of blocks adds is held between computed steps, and which range that is depends on the stage of sampling.

"Δ-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers", arXiv 2406.01125. With h_i what enters block i,

    computed step   D = h_c − h_a            left-out step   h_c = h_a + D,  blocks a … c−1 do not run

With t steps remaining (T at the first step, 1 at the last) and the boundary b: t > b leaves out the rear blocks [L − N_c, L), t ≤ b the
front ones [0, N_c). Every N-th step of the run is computed.

What we do differently: both offsets are kept at every computed step unless told otherwise, so that the change of stage forces no computed
step; the offset may be forecast by a polynomial (order above 0) in place of being held; and the ranges of the two stages may be chosen.
A range may reach from the double into the single blocks of a Flux: text and image have an offset each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import input_error
from ...families.arch import ArchSpec
from ...families.blocks import BlockKey
from .interval import every
from .policy import Action, Choice, Policy, RunFacts, RunState, Visit

__all__ = ["PLACES", "DeltaDiT", "place_blocks"]

PLACES = ("rear", "front", "middle", "all", "none")


def place_blocks(place: str, count: int, blocks: Sequence[BlockKey]) -> tuple[BlockKey, ...]:
    """`count` blocks at one end of a stack, in its middle, or all of it."""
    total = len(blocks)
    count = {"all": total, "none": 0}.get(place, count)
    first = {"rear": total - count, "middle": (total - count) // 2}.get(place, 0)
    return tuple(blocks[first : first + count])


@dataclass(frozen=True)
class DeltaDiT(Policy):
    """interval: N. boundary: share of the run's steps that count as late, b = round(boundary·T); boundary_steps: b itself, −1 for the
    share. blocks: N_c, 0 for `ratio` of the stack. early, late: one of PLACES. keep_both: both offsets at every computed step."""

    interval: int = 2
    boundary: float = 0.6
    boundary_steps: int = -1
    blocks: int = 0
    ratio: float = 0.75
    early: str = "rear"
    late: str = "front"
    keep_both: bool = True

    @property
    def can_skip(self) -> bool:
        return self.interval > 1 and (self.blocks > 0 or self.ratio > 0 or "all" in self._places) and self._places != {"none"}

    @property
    def _places(self) -> set[str]:
        return {self.early, self.late}

    def check(self, where: str) -> None:
        for name, place in (("early_range", self.early), ("late_range", self.late)):
            if place not in PLACES:
                raise input_error(where, name, place, ", ".join(PLACES), "Choose one of these.")
        if self.interval < 1:
            raise input_error(where, "interval", self.interval, "1 or more steps", "Enter a count of steps.")
        for name, share in (("boundary", self.boundary), ("blocks_ratio", self.ratio)):
            if not 0.0 <= share <= 1.0:
                raise input_error(where, name, share, "0 to 1", "Enter a share.")
        if self.blocks < 0:
            raise input_error(where, "block_count", self.blocks, "0 or more blocks", "Enter 0 to use blocks_ratio.")

    def block_count(self, arch: ArchSpec, where: str) -> int:
        """N_c of this stack. Raises: NodeInputError for more blocks than it has."""
        total = len(arch.blocks)
        if self.blocks > total:
            allowed = f"0 to {total} for this {arch.family} model"
            raise input_error(where, "block_count", self.blocks, allowed, "Enter 0 to use blocks_ratio.")
        return self.blocks or round(self.ratio * total)

    def ranges(self, arch: ArchSpec) -> Mapping[str, tuple[BlockKey, ...]] | None:
        count = self.block_count(arch, type(self).__name__)
        found = {place: place_blocks(place, count, arch.blocks) for place in sorted(self._places)}
        return {place: blocks for place, blocks in found.items() if blocks}

    def start(self, facts: RunFacts) -> RunState:
        if facts.arch is None:
            raise input_error(facts.where, "model", "blocks without patches", "a model whose blocks can be patched", "Use target output.")
        self.block_count(facts.arch, facts.where)
        return RunState(self)

    def place(self, visit: Visit) -> str:
        """Which range this visit's stage leaves out."""
        late_steps = self.boundary_steps if self.boundary_steps >= 0 else round(self.boundary * visit.steps)
        remaining = visit.steps - int(visit.u + 1e-6)
        return self.early if remaining > late_steps else self.late

    def parts(self, visit: Visit) -> Sequence[str] | None:
        return None if self.keep_both else (self.place(visit),)

    def decide(self, visit: Visit) -> Choice:
        place = self.place(visit)
        if place == "none":
            return Choice(Action.FULL, "stage without range")
        choice = every(self.interval, visit)
        return Choice(choice.action, choice.reason, place)

    def line(self) -> str:
        count = f"{self.blocks} blocks" if self.blocks else f"{self.ratio:.0%} of the blocks"
        late = f"{self.boundary_steps} steps" if self.boundary_steps >= 0 else f"{self.boundary:.0%}"
        return f"Δ-DiT order {self.order}, every {self.interval}, {count}: {self.early}, in the last {late} {self.late}"
