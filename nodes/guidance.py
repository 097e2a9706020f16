"""Guidance palette: one GUIDER with classifier-free guidance, its interval, CFG-Zero* and APG."""

from __future__ import annotations

from .declare import Node, Output, choice, integer, number, socket

GROUP = "guidance"


class RectiflowFlowGuider(Node):
    """Classifier-free guidance with an interval, CFG-Zero*, APG and a region as options. With the defaults it is CFG Guider exactly."""

    TITLE = "Flow Guider"
    GROUP = GROUP
    SEARCH_ALIASES = ["cfg guider", "cfg zero star", "apg", "adaptive projected guidance", "guidance interval", "regional cfg"]
    INPUTS = (
        socket("model", "MODEL", "The model that is guided."),
        socket("positive", "CONDITIONING", "What the picture should be."),
        socket("negative", "CONDITIONING", "What guidance leads away from; an empty prompt is usual."),
        number("cfg", 3.0, 0.0, 100.0, "Guidance scale w. 1 switches guidance off and halves the model's work.", step=0.1),
        choice("rule", ("cfg", "cfg_zero", "apg"),
            "cfg: the classical mix. cfg_zero: scales the unconditional velocity to fit first (CFG-Zero*). apg: takes off the part that "
            "only oversaturates.",
        ),
        number("sigma_lo", 0.0, 0.0, 1.0, "No guidance below this sigma, and one model call in place of two."),
        number("sigma_hi", 1.0, 0.0, 1.0, "No guidance above this sigma, and one model call in place of two."),
        integer("zero_init", 0, 0, 100, "Steps of zero velocity when a run starts from pure noise; CFG-Zero* takes 1.", advanced=True),
        number("eta", 0.0, -10.0, 10.0, "apg only: how much of the part along the prediction is kept; 1 keeps all.", advanced=True),
        number("limit", 0.0, 0.0, 10.0, "apg only: largest root mean square of the update; 0 sets no limit.", step=0.005, advanced=True),
        number("momentum", 0.0, -1.0, 0.99, "apg only: share of the last sigma's update; below 0 favours what is new.", advanced=True),
        socket("mask", "MASK", "Where guidance acts; elsewhere the scale is 1.", optional=True),
    )
    OUTPUTS = (Output("GUIDER", "guider", "For SamplerCustomAdvanced."),)

    def run(self, model, positive, negative, cfg, rule, sigma_lo, sigma_hi, zero_init, eta, limit, momentum, mask=None):
        from ..host import CFGGuider
        from ..samplers.guidance import Guidance, flow_guider

        guider = flow_guider(CFGGuider, model, Guidance(rule, sigma_lo, sigma_hi, zero_init, eta, limit, momentum, mask))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return (guider,)
