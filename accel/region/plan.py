"""Everything the RAS node sets, and what of it fits together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...errors import input_error
from .select import FOCUSES, METRICS

__all__ = ["KVOptions", "RegionPlan"]


@dataclass(frozen=True)
class KVOptions:
    """Keys and values of tokens that are left out: "full" keeps them a layer and condition, "none" drops them from the attention too.

    dtype: None keeps the model's. device: "model" or "cpu". cap: bytes that may be kept, 0 for no limit.
    """

    mode: str = "full"
    dtype: torch.dtype | None = None
    device: str = "model"
    cap: int = 0

    def line(self) -> str:
        if self.mode == "none":
            return "no K/V cache"
        return f"K/V cache {'as the model' if self.dtype is None else str(self.dtype).removeprefix('torch.')} on {self.device}"


@dataclass(frozen=True)
class RegionPlan:
    """ratio: average share of tokens computed, 0.05 to 1. start, end: steps between which tokens may be left out. resets: dense steps
    there.

    slope, period: see schedule.py. order: of the forecast of tokens left out, 0 repeats, 1 continues the slope, 2 the curvature, in sigma.
    focus: which end of the metric is computed; `change` has one. cell: side of the squares of tokens that are chosen together.
    always: MASK, 1 where tokens are computed at every step.
    """

    ratio: float = 0.5
    start: int = 4
    end: int = 1000
    resets: tuple[int, ...] = (12, 22)
    metric: str = "std"
    focus: str = "low_std"
    high_ratio: float = 1.0
    starvation: float = 0.1
    slope: int = 0
    period: int = 0
    order: int = 0
    cell: int = 1
    kv: KVOptions = field(default_factory=KVOptions)
    always: torch.Tensor | None = field(default=None, compare=False, repr=False)
    overlay: bool = True

    @property
    def rule(self) -> str:
        """The focus that acts: of metric `change` the tokens of most change are computed, whatever focus says."""
        return "high_std" if self.metric == "change" else self.focus

    def check(self, where: str) -> None:
        """Raises: NodeInputError naming what does not fit."""
        ranges = (
            ("sample_ratio", self.ratio, 0.05, 1.0), ("high_ratio", self.high_ratio, 0.0, 1.0), ("starvation", self.starvation, 0.0, 4.0),
            ("inactive_order", self.order, 0, 2), ("ratio_period", self.period, 0, 64), ("ratio_slope", self.slope, -1024, 1024),
            ("cell", self.cell, 1, 64), ("start_step", self.start, 0, 1000), ("end_step", self.end, 0, 1000),
        )  # fmt: skip
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise input_error(where, name, value, f"{low} to {high}", "Choose a value in this range.")
        choices = (("metric", self.metric, METRICS), ("focus", self.focus, FOCUSES), ("kv_cache", self.kv.mode, ("full", "none")))
        for name, value, allowed in choices:
            if value not in allowed:
                raise input_error(where, name, value, ", ".join(allowed), "Choose one of these.")
        if self.end < self.start:
            raise input_error(where, "end_step", self.end, f"start_step ({self.start}) or more", "Set end_step above start_step.")
        if self.slope and not self.period:
            remedy = "Set ratio_period, the steps after which it acts."
            raise input_error(where, "ratio_slope", self.slope, "0 while ratio_period is 0", remedy)
        if self.rule == "reference" and self.cell > 1:
            remedy = "Choose focus low_std or high_std for squares of tokens."
            raise input_error(where, "cell", self.cell, "1 with focus reference", remedy)

    def line(self) -> str:
        focus = f"{self.focus} (high {self.high_ratio:g})" if self.focus == "reference" else self.focus
        resets = ", ".join(map(str, self.resets)) or "none"
        ranked = "change" if self.metric == "change" else f"{self.metric} {focus}"
        parts = [f"RAS {self.ratio:g} from step {self.start}", f"resets {resets}", ranked]
        parts.append(f"starvation {self.starvation:g}")
        if self.period:
            parts.append(f"slope {self.slope} every {self.period}")
        if self.order:
            parts.append(f"order {self.order}")
        if self.cell > 1:
            parts.append(f"cells of {self.cell}×{self.cell}")
        return ", ".join([*parts, self.kv.line()])
