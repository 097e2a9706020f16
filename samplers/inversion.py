"""From a picture to the noise it came from: inversion solvers, the SAMPLER that runs them, and the way back into stock samplers.

RF-Solver, arXiv 2411.04746; FireFlow, arXiv 2412.07517; Uni-Inv: "UniEdit-Flow", arXiv 2504.13109; fixed-point inversion is the basis
of FTEdit, arXiv 2411.15843. Inversion walks the same schedule upwards, h = s' − s > 0. What a method is good at differs: Uni-Inv and
the fixed point undo Euler's steps and so reconstruct well with Euler, but the noise they find is only first-order exact; RF-Solver's
and FireFlow's is second order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

from ..errors import input_error
from .multistep import sample_fireflow
from .sampler_object import GuiderModel, report_steps
from .solvers import sample_euler, sample_heun, sample_rf_solver
from .walk import Walk, check_sigmas

__all__ = [
    "INVERTERS", "InvertSampler", "LatentNoise", "inversion_sigmas", "noise_slerp", "sampling_sigmas", "sample_fixed_point",
    "sample_uni_inv",
]

SAME_SIGMA = 1e-6  # sigmas are float32, sigma_start was typed


@torch.no_grad()
def sample_uni_inv(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Uni-Inv: x~ = x + h·v_prev, v_new = v(x~, s'), x' = x + h·v_new, v_prev ← v_new; v_prev starts as v(x, s). N + 1 NFE.

    The velocity is taken at the upper end of the step, where Euler takes it on the way back.
    """
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    v = None
    for s, s_next in walk:
        h = s_next - s
        v = walk.velocity(x, s) if v is None else v
        v = walk.velocity(x + h * v, s_next, first=v)
        x = x + h * v
    return x


@torch.no_grad()
def sample_fixed_point(model, x, sigmas, extra_args=None, callback=None, disable=None, iterations=3, average=False):
    """Solve y = x + h·v(y, s') by `iterations` substitutions from y = x; at convergence Euler's exact inverse. iterations·N NFE.

    It converges by the factor |h|·Lip(v) an iteration. average takes the mean of the iterates, which helps with few steps and hurts
    with many.
    """
    if iterations < 1:
        raise input_error("sample_fixed_point", "iterations", iterations, "1 or more", "3 is usual.")
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    for s, s_next in walk:
        h, y, total = s_next - s, x, 0.0
        for _ in range(iterations):
            y = x + h * walk.velocity(y, s_next)
            total = total + y
        x = total / iterations if average else y
    return x


INVERTERS = MappingProxyType({
    "rf_solver": sample_rf_solver,
    "euler": sample_euler,
    "fireflow": sample_fireflow,
    "uni_inv": sample_uni_inv,
    "heun": sample_heun,
    "fixed_point": sample_fixed_point,
})


def inversion_sigmas(sigmas: torch.Tensor, sigma_floor: float = 1e-3, sigma_end: float = 1.0, where: str = "FlowInversionSigmas"):
    """A falling schedule turned round: a last 0 becomes `sigma_floor`, values from `sigma_end` up are replaced by it.

    Returns:
        rising, float32; sampling back along it needs the same values, which `sampling_sigmas` gives.
    """
    sigmas = check_sigmas(sigmas, where)
    if len(sigmas) < 2 or not bool((sigmas[1:] < sigmas[:-1]).all()):
        remedy = "Connect the schedule you would sample with."
        raise input_error(where, "sigmas", f"{len(sigmas)} values", "2 or more values that fall", remedy)
    if not 0 <= sigma_floor < sigma_end <= 1:
        got = (sigma_floor, sigma_end)
        raise input_error(where, "sigma_floor, sigma_end", got, "0 <= sigma_floor < sigma_end <= 1", "0.001 and 1 suit most models.")
    rising = sigmas.flip(0).clone()
    if rising[0] == 0:
        rising[0] = sigma_floor
    kept = rising[rising < sigma_end]
    if len(kept) == 0 or (len(kept) > 1 and kept[1] <= kept[0]):
        remedy = "Lower sigma_floor, raise sigma_end, or use fewer steps."
        raise input_error(where, "sigmas", f"sigmas from {float(sigmas[-1]):g}", "a schedule that crosses floor and end", remedy)
    return kept if len(kept) == len(rising) else torch.cat([kept, rising.new_tensor([sigma_end])])


def sampling_sigmas(inversion: torch.Tensor) -> torch.Tensor:
    """The way back along a rising schedule: its values falling, 0 in the place of the floor."""
    falling = inversion.flip(0).clone()
    falling[-1] = 0
    return falling


class InvertSampler:
    """The SAMPLER of an inversion: owns its scaling, leaves masks out, refuses a falling schedule.

    The run starts at sigmas[0] from (1 − sigma)·latent, plus sigma·noise when `floor_noise`, and returns the state at sigmas[-1] as it
    is: no division by 1 − sigma, so sigma 1 is an ordinary end. `watch(model, sigmas)` may put a model of its own between solver and
    guider, as the recording of features does; `name` is the node that messages name.
    """

    inpaint_options = MappingProxyType({})

    def __init__(
        self, solver: str | Callable, options: dict[str, Any] | None = None, floor_noise: bool = False, watch=None,
        name: str = "FlowInvertSampler",
    ):  # fmt: skip
        if not callable(solver) and solver not in INVERTERS:
            raise input_error(name, "solver", solver, ", ".join(INVERTERS), "Pick one of them.")
        self.sampler_function = solver if callable(solver) else INVERTERS[solver]
        self.extra_options = dict(options or {})
        self.floor_noise = floor_noise
        self.watch = watch
        self.name = name

    def max_denoise(self, guider, sigmas) -> bool:
        return False

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """`latent_image`: `(b, …)` in model space, the picture; returns the state at sigmas[-1]. What ComfyUI's guider calls."""
        if not bool((sigmas[1:] > sigmas[:-1]).all()):
            remedy = "Put Flow Inversion Sigmas between the schedule and the sampler."
            raise input_error(self.name, "sigmas", "a schedule that does not rise", "sigmas that rise in every step", remedy)
        if denoise_mask is not None:
            logging.warning("Rectiflow: inversion leaves the latent's noise mask out")
        start = sigmas[0]
        x = (1 - start) * latent_image + (start * noise if self.floor_noise else 0)
        model = GuiderModel(guider, sigmas, noise, latent_image)
        if self.watch is not None:
            model = self.watch(model, sigmas)
        arguments = {key: value for key, value in extra_args.items() if key != "denoise_mask"}
        report = report_steps(callback, len(sigmas) - 1)
        return self.sampler_function(model, x, sigmas, extra_args=arguments, callback=report, disable=disable_pbar, **self.extra_options)


class LatentNoise:
    """A NOISE that is a given latent, so that any sampler can go on from an inverted picture over an empty latent.

    Args:
        samples: `(b, c, …)` in model space.
        sigma_start: the sigma at which the latent was left; the host multiplies noise by it again.
        sigmas: the schedule that samples from it, where it is known.

    Raises:
        NodeInputError: sigma_start is no sigma above 0, or sigmas do not fall from there.
    """

    seed = 0

    def __init__(self, samples: torch.Tensor, sigma_start: float = 1.0, sigmas: torch.Tensor | None = None):
        if not 0 < sigma_start <= 1:
            raise input_error("NoiseFromLatent", "sigma_start", sigma_start, "above 0, at most 1", "Use the last sigma of the inversion.")
        if sigmas is not None:
            falling = check_sigmas(sigmas, "NoiseFromLatent")
            falls = len(falling) > 1 and bool((falling[1:] < falling[:-1]).all())
            if not falls or abs(float(falling[0]) - sigma_start) > SAME_SIGMA:
                got = f"{len(falling)} values from {float(falling[0]) if len(falling) else 0:g}"
                remedy = "Connect sampling_sigmas of Flow Inversion Sigmas, and set sigma_start to its sigma_end."
                raise input_error("NoiseFromLatent", "sigmas", got, f"values that fall from sigma_start, {sigma_start:g}", remedy)
        self.samples = samples.detach().float().cpu() / sigma_start

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        """The noise for `latent["samples"]`, whose shape it must have (its channels may still be 4 of an empty latent)."""
        wanted, have = latent["samples"].shape, self.samples.shape
        if wanted[0] != have[0] or wanted[2:] != have[2:]:
            remedy = "Use an empty latent of the inverted picture's size and batch."
            raise input_error("NoiseFromLatent", "latent", tuple(wanted), f"batch and size of {tuple(have)}", remedy)
        if bool(latent["samples"].count_nonzero()) and wanted == have:
            logging.warning("Rectiflow: Noise from Latent over a latent that is not empty mixes both below sigma 1")
        return self.samples.clone()


def noise_slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Between two noises on the arc that joins them: (sin((1 − t)·w)·a + sin(t·w)·b)/sin w, w the angle between the rows.

    Unlike the straight mean it keeps the length that a noise has, which a flow expects. Rows less than 1e-4 rad apart, or opposite, where
    no arc is shortest, are mixed on the line.

    Args:
        a, b: `(n, …)`, or one row against n. t: 0 is a, 1 is b.
    """
    rows = max(len(a), len(b))
    if a.shape[1:] != b.shape[1:] or len(a) not in (1, rows) or len(b) not in (1, rows):
        raise input_error("Noise Slerp", "a, b", (tuple(a.shape), tuple(b.shape)), "one size, and equal batches or one row", "Resize one.")
    u, v = (x.expand(rows, *x.shape[1:]).double().flatten(1) for x in (a, b))
    cosine = (torch.nn.functional.cosine_similarity(u, v, dim=1)).clamp(-1, 1)[:, None]
    angle = cosine.arccos()
    arc = (angle > 1e-4) & (angle < torch.pi - 1e-4)
    sine = torch.where(arc, angle.sin(), 1.0)
    near, far = torch.where(arc, ((1 - t) * angle).sin() / sine, 1 - t), torch.where(arc, (t * angle).sin() / sine, t)
    return (near * u + far * v).reshape(rows, *a.shape[1:]).to(a.dtype)
