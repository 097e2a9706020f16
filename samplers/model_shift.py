"""The shift a model carries: read it, replace it, and make a schedule that fits it.

Touches a host's `model_sampling` object only through what every flow kind has (`percent_to_sigma`, `sigmas`, `set_parameters`), so
ModelSamplingDiscreteFlow (its shift is alpha), ModelSamplingFlux (its shift is mu = ln alpha) and kinds yet to come are all served.
"""

from __future__ import annotations

import copy
import logging
import math

import torch

from ..errors import input_error
from .schedules import GRIDS, as_sigmas, flux_mu, part_of_grid, resolution_alpha, shift_sigma, strict_sigmas, unshift_sigma

__all__ = ["SCHEDULERS", "SHIFT_MODES", "effective_alpha", "latent_tokens", "resolve_alpha", "shifted_model_sampling", "flow_sigmas"]

SHIFT_MODES = ("from_model", "sd3_alpha", "flux_mu", "resolution")
SCHEDULERS = ("uniform", "simple", "beta", "logit_normal_cdf", "linear_quadratic", "sigmoid")


def effective_alpha(model_sampling, where: str = "model_sampling") -> float:
    """The alpha of a flow model's shift, from sigma(u = 1/2) = alpha/(1 + alpha).

    Raises:
        NodeInputError: the model is no flow model (its sigma leaves (0, 1)).
    """
    half = float(model_sampling.percent_to_sigma(0.5))
    if not 0 < half < 1:
        kind = type(model_sampling).__name__
        raise input_error(where, "model", kind, "a flow model (Flux, SD3, Lumina 2, …)", "Use ComfyUI's own schedulers for other models.")
    return half / (1 - half)


def latent_tokens(samples: torch.Tensor, patch: int = 2) -> int:
    """Tokens of the transformer for a latent `(b, c, h, w)` or `(b, c, t, h, w)`: odd sides are padded to whole patches."""
    height, width = samples.shape[-2:]
    frames = samples.shape[2] if samples.ndim == 5 else 1
    if frames > 1:
        logging.warning("Rectiflow: flux_mu counts the tokens of %d frames; the rule was made for single pictures", frames)
    return frames * -(-height // patch) * -(-width // patch)


def resolve_alpha(
    where: str, shift_mode: str, value: float, model_sampling, samples: torch.Tensor | None, base_pixels: int, pixels_per_latent: int = 8,
) -> float:
    """The alpha that a shift mode asks for.

    Args:
        shift_mode: from_model (what the model has), sd3_alpha (`value`), flux_mu (exp of `value`, or of Flux's line over the
            tokens of `samples` where a latent is given), resolution (sqrt(pixels/base_pixels), needs `samples`).
        samples: `(b, c, …, h, w)` or None.
        pixels_per_latent: side of the pixel square behind one latent cell.

    Raises:
        NodeInputError: unknown mode, a latent is missing, or alpha is not in 1e-4 to 1e4.
    """
    if shift_mode == "from_model":
        return effective_alpha(model_sampling, where)
    if shift_mode == "sd3_alpha":
        alpha = value
    elif shift_mode == "flux_mu":
        mu = value if samples is None else flux_mu(latent_tokens(samples))
        alpha = math.exp(min(mu, 700.0))
    elif shift_mode == "resolution":
        if samples is None:
            raise input_error(where, "latent", None, "a LATENT, whose size sets the shift", "Connect the latent that will be sampled.")
        alpha = resolution_alpha(samples.shape[-2] * samples.shape[-1] * pixels_per_latent**2, base_pixels)
    else:
        raise input_error(where, "shift_mode", shift_mode, ", ".join(SHIFT_MODES), "Pick one of them.")
    if not 1e-4 <= alpha <= 1e4:
        remedy = "flux_mu takes mu = ln(alpha), usually 0.5 to 2.4; sd3_alpha takes alpha, usually 1 to 12."
        raise input_error(where, "value", value, "a shift with alpha from 0.0001 to 10000", remedy)
    return alpha


def shifted_model_sampling(model_sampling, alpha: float):
    """A copy of a flow model's sampling object with the shift alpha; kind, prediction, multiplier and table size stay.

    The two kinds of the hosts name their parameter alike and mean alpha and mu = ln(alpha); which one it is shows in what the
    parameter does to sigma(1/2).
    """
    current = effective_alpha(model_sampling, "FlowModelShift")
    means_mu = not math.isclose(model_sampling.shift, current, rel_tol=1e-6)
    changed = copy.deepcopy(model_sampling)
    options = {"timesteps": len(model_sampling.sigmas)}
    if hasattr(model_sampling, "multiplier"):
        options["multiplier"] = model_sampling.multiplier
    changed.set_parameters(shift=math.log(alpha) if means_mu else alpha, **options)
    return changed


def _simple_indices(size: int, steps: int) -> list[int]:
    """Which entries of a table of `size` sigmas ComfyUI's `simple` takes: every (size/steps)-th from the top."""
    return [size - 1 - int(i * (size / steps)) for i in range(steps)]


def flow_sigmas(
    model_sampling, scheduler: str, steps: int, shift_mode: str, alpha: float, start: float = 1.0, end: float = 0.0, denoise: float = 1.0,
    where: str = "FlowShiftSigmas",
) -> torch.Tensor:
    """The schedule of the FlowShiftSigmas node: a grid, the shift alpha, and a window of noise levels.

    Args:
        scheduler: one of SCHEDULERS; `simple` walks the model's own table, and equals ComfyUI's bit for bit with from_model.
        start, end: sigmas of the first and last point, 0 <= end < start <= 1; the grid is squeezed between them before the shift.
        denoise: as ComfyUI has it: the last `steps` steps of a schedule of int(steps/denoise).

    Returns:
        float32 `(steps + 1,)`; empty for denoise 0.
    """
    if not 0 <= end < start <= 1:
        raise input_error(where, "start, end", (start, end), "0 <= end < start <= 1", "start is the noisier end; 1 and 0 keep everything.")
    if denoise <= 0:
        return torch.zeros(0)
    whole = start == 1 and end == 0
    table = model_sampling.sigmas

    def simple_sigmas(total: int) -> torch.Tensor:
        return torch.tensor([float(table[index]) for index in _simple_indices(len(table), total)] + [0.0], dtype=torch.float64)

    if scheduler == "simple" and shift_mode == "from_model" and whole:
        return as_sigmas(part_of_grid(simple_sigmas, steps, denoise))

    def simple_grid(total: int) -> torch.Tensor:
        return torch.tensor([(index + 1) / len(table) for index in _simple_indices(len(table), total)] + [0.0], dtype=torch.float64)

    grids = {"simple": simple_grid, "logit_normal_cdf": GRIDS["logit_normal"], **GRIDS}
    if scheduler not in SCHEDULERS:
        raise input_error(where, "scheduler", scheduler, ", ".join(SCHEDULERS), "Pick one of them.")
    u = part_of_grid(grids[scheduler], steps, denoise)
    low, high = unshift_sigma(end, alpha), unshift_sigma(start, alpha)
    sigmas = shift_sigma(low + (high - low) * u, alpha)
    sigmas[-1] = end
    if denoise >= 1:
        sigmas[0] = start
    return strict_sigmas(sigmas, where)
