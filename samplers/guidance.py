"""One guider for every way of mixing a conditional and an unconditional prediction.

    cfg        D = D_u + w·(D_c − D_u)                                   "Classifier-Free Diffusion Guidance", arXiv 2207.12598
    interval   w = 1 outside [sigma_lo, sigma_hi], D_u not computed      "Applying Guidance in a Limited Interval", arXiv 2404.07724
    cfg_zero   v = a·v_u + w·(v_c − a·v_u), a = <v_c, v_u>/|v_u|²        "CFG-Zero*", arXiv 2503.18886, with its zero-init
    apg        D = D_c + (w − 1)·u, u by `AdaptiveProjection`            "Eliminating Oversaturation and Artifacts …", arXiv 2410.02416

The rules work on differences x − D = sigma·v, which both are zero at sigma = 0: nothing is divided by sigma, and at sigma 0 every rule
returns x. Sums run over one picture at a time, so a batch equals its pictures run alone. The rules are given to the host as its CFG
function; conditions joined or split, areas, masks and other patches' hooks stay the host's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import interpolate

from ..errors import input_error

__all__ = ["RULES", "AdaptiveProjection", "Guidance", "flow_guider", "optimal_scale"]

RULES = ("cfg", "cfg_zero", "apg")
EDGE = 1e-6  # an interval's ends are inclusive, also after a sigma was rounded to float32
FROM_NOISE = 1 - 1e-5  # share of the model's largest sigma from which a schedule counts as starting from pure noise


def _per_picture(values: torch.Tensor) -> torch.Tensor:
    """The sum over everything but the batch, shaped to broadcast: (b, …) → (b, 1, …)."""
    return values.flatten(1).sum(1).reshape(-1, *[1] * (values.ndim - 1))


def optimal_scale(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """a = <cond, uncond>/|uncond|² for each picture, the a that brings a·uncond nearest to cond; 1 where uncond is zero.

    Args:
        cond, uncond: `(b, …)`, velocities or x − denoised; a common factor cancels.
    """
    power = _per_picture(uncond * uncond)
    return torch.where(power > 0, _per_picture(cond * uncond) / torch.where(power > 0, power, 1.0), 1.0)


@dataclass(frozen=True, eq=False)
class Guidance:
    """How a guider mixes its two predictions; the defaults are the host's own CFG.

    rule: one of RULES.
    sigma_lo, sigma_hi: guidance acts from one to the other, both included.
    zero_init: steps of zero velocity at the start of a run from pure noise.
    eta, limit, momentum: of rule "apg", see AdaptiveProjection.
    mask: `(1 or b, h, w)`, any size; the scale is 1 where it is 0 and w where it is 1. None acts everywhere.
    """

    rule: str = "cfg"
    sigma_lo: float = 0.0
    sigma_hi: float = 1.0
    zero_init: int = 0
    eta: float = 0.0
    limit: float = 0.0
    momentum: float = 0.0
    mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise input_error("Flow Guider", "rule", self.rule, ", ".join(RULES), "Pick one of them.")
        if not 0 <= self.sigma_lo <= self.sigma_hi <= 1:
            got = (self.sigma_lo, self.sigma_hi)
            raise input_error("Flow Guider", "sigma_lo, sigma_hi", got, "0 <= sigma_lo <= sigma_hi <= 1", "0 and 1 guide everywhere.")

    @property
    def is_plain(self) -> bool:
        """Whether the host's own CFG function does what is asked, where guidance acts."""
        return self.rule == "cfg" and self.mask is None

    def acts_at(self, sigma: float) -> bool:
        return self.sigma_lo - EDGE <= sigma <= self.sigma_hi + EDGE


class AdaptiveProjection:
    """The update u of APG, one for a run: momentum over the steps, a limit on the length, less of the part along D_c.

        g ← (D_c − D_u) + momentum·g_before        g ← g·min(1, limit/rms(g))        u = g⊥ + eta·g∥,  g∥ along D_c

    The paper's limit is a length |g|; ours is its root mean square |g|/sqrt(n), which does not change with the size of the picture.
    Momentum is kept by sigma: a solver that asks twice at one sigma gets the same answer twice.
    """

    def __init__(self, eta: float, limit: float, momentum: float):
        self.eta, self.limit, self.momentum = eta, limit, momentum
        self._sigma: float | None = None
        self._before: torch.Tensor | None = None  # g of the sigma before the current one
        self._current: torch.Tensor | None = None

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, sigma: float) -> torch.Tensor:
        """`cond`, `uncond`: denoised, `(b, …)`."""
        g = self._averaged(cond - uncond, sigma)
        if self.limit > 0:
            rms = (_per_picture(g * g) / g[0].numel()).sqrt()
            g = g * torch.where(rms > self.limit, self.limit / rms.clamp_min(self.limit), 1.0)
        along = optimal_scale(g, cond) * cond
        return g - along + self.eta * along

    def _averaged(self, g: torch.Tensor, sigma: float) -> torch.Tensor:
        if self.momentum == 0:
            return g
        if sigma != self._sigma:
            self._before, self._sigma = self._current, sigma
        if self._before is not None:
            g = g + self.momentum * self._before
        self._current = g
        return g


def mixed(
    guidance: Guidance, projection: AdaptiveProjection, cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor, cfg: float, sigma: float,
) -> torch.Tensor:  # fmt: skip
    """x − D of the guided prediction, from cond = x − D_c and uncond = x − D_u, `(b, …)`."""
    scale: Any = cfg
    if guidance.mask is not None:
        scale = 1 + _mask_over(guidance.mask, x) * (cfg - 1)
    if guidance.rule == "apg":
        return cond - (scale - 1) * projection(x - cond, x - uncond, sigma)
    if guidance.rule == "cfg_zero":
        uncond = optimal_scale(cond, uncond) * uncond
    return uncond + scale * (cond - uncond)


def _mask_over(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The mask at the latent's size, averaged over areas: `(1 or b, 1, …, h, w)`, the same for all frames."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(x)
    if mask.shape[0] not in (1, x.shape[0]):
        allowed = f"1 mask or {x.shape[0]}, one for each picture"
        raise input_error("Flow Guider", "mask", f"{mask.shape[0]} masks", allowed, "Link one mask for all pictures.")
    mask = interpolate(mask, size=x.shape[-2:], mode="area").clamp(0, 1)
    return mask.reshape(mask.shape[0], *[1] * (x.ndim - 3), *mask.shape[-2:])


class _FlowGuidance:
    """The part of the guider that is ours; stands before the host's CFGGuider among the bases."""

    guidance = Guidance()
    _projection: AdaptiveProjection | None = None

    def outer_sample(self, *args, **kwargs):
        self._projection = AdaptiveProjection(self.guidance.eta, self.guidance.limit, self.guidance.momentum)
        try:
            return super().outer_sample(*args, **kwargs)
        finally:
            self._projection = None

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        model_options = {} if model_options is None else model_options
        sigma = float(timestep[0])
        if self.guidance.zero_init and sigma > self._zero_until(model_options):
            return x.clone()  # velocity 0
        if not self.guidance.acts_at(sigma):
            return self._at_scale_one(x, timestep, model_options, seed)
        if not self.guidance.is_plain and not math.isclose(self.cfg, 1.0):
            model_options = {**model_options, "sampler_cfg_function": self._mix}
        return super().predict_noise(x, timestep, model_options, seed)

    def _mix(self, args: dict[str, Any]) -> torch.Tensor:
        sigma = float(args["sigma"][0])
        return mixed(self.guidance, self._projection, args["cond"], args["uncond"], args["input"], args["cond_scale"], sigma)

    def _at_scale_one(self, x, timestep, model_options, seed):
        """The host leaves the unconditional call out where its scale is 1."""
        cfg, self.cfg = self.cfg, 1.0
        try:
            return super().predict_noise(x, timestep, model_options, seed)
        finally:
            self.cfg = cfg

    def _zero_until(self, model_options: dict[str, Any]) -> float:
        """The sigma at which zero-init ends; infinite for inversions and for runs that do not start from pure noise."""
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        steps = self.guidance.zero_init
        if sigmas[0] < sigmas[-1] or float(sigmas[0]) < FROM_NOISE * float(self.inner_model.model_sampling.sigma_max):
            return math.inf
        if steps >= len(sigmas) - 1:
            allowed = f"fewer than the {len(sigmas) - 1} steps of the schedule"
            raise input_error("Flow Guider", "zero_init", steps, allowed, "0 or 1 suits most models.")
        return float(sigmas[steps])


def flow_guider(cfg_guider: type, model: Any, guidance: Guidance):
    """A GUIDER for `model`: the host's CFGGuider with our rules before it. Set conditions and cfg as on the host's own.

    Raises:
        NodeInputError: the model carries a CFG function of its own, which a rule would put out of work.
    """
    if not guidance.is_plain and "sampler_cfg_function" in model.model_options:
        remedy = "Take the node that changes CFG off the model, or set rule to cfg and leave the mask open."
        raise input_error("Flow Guider", "model", "a model with a CFG function of its own", "one CFG function", remedy)

    class FlowGuider(_FlowGuidance, cfg_guider):
        pass

    guider = FlowGuider(model)
    guider.guidance = guidance
    return guider
