"""Guiders that core nodes make beside plain CFG."""

from __future__ import annotations

import math

from ..node_helpers import conditioning_set_values
from ..samplers import CFGGuider, calc_cond_batch, cfg_function

__all__ = ["Guider_Basic", "Guider_DualCFG"]


class Guider_Basic(CFGGuider):
    """The positive conditioning alone."""

    def set_conds(self, positive: list) -> None:
        self.inner_set_conds({"positive": positive})


class Guider_DualCFG(CFGGuider):
    """Two scales between negative, middle and positive.

    regular: neg + s2·(mid − neg) + s1·(pos − mid). nested: neg + s2·(mid + s1·(pos − mid) − neg).
    """

    def set_cfg(self, cfg1: float, cfg2: float, nested: bool = False) -> None:
        self.cfg1, self.cfg2, self.nested = cfg1, cfg2, nested

    def set_conds(self, positive: list, middle: list, negative: list) -> None:
        middle = conditioning_set_values(middle, {"prompt_type": "negative"})
        self.inner_set_conds({"positive": positive, "middle": middle, "negative": negative})

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        model_options = model_options or {}
        conds = [self.conds.get(name) for name in ("negative", "middle", "positive")]
        if not self.nested and not model_options.get("disable_cfg1_optimization", False) and math.isclose(self.cfg2, 1.0):
            conds[0] = None  # its weight is 0
            if math.isclose(self.cfg1, 1.0):
                conds[1] = None
        negative, middle, positive = calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        if self.nested:
            guided = cfg_function(
                self.inner_model, positive, middle, self.cfg1, x, timestep, model_options=model_options, cond=conds[2], uncond=conds[1]
            )
            return negative + self.cfg2 * (guided - negative)
        guided = cfg_function(
            self.inner_model, middle, negative, self.cfg2, x, timestep, model_options=model_options, cond=conds[1], uncond=conds[0]
        )
        return guided + (positive - middle) * self.cfg1
