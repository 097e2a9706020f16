"""What every solver shares: the schedule it walks, the velocity it asks for, the report after each step.

Convention: x_s = (1 − s)·x0 + s·noise with s = sigma in [0, 1], v = dx/ds = noise − x0, denoised = x − s·v. A host's model
returns `denoised`; the velocity is taken from it as v = (x − denoised)/s, because that keeps inpaint masks: the host mixes
the known pixels into `denoised`, and the velocity of a known pixel then points straight at it.

Two points need a word:

- s = 0. The quotient is 0/0 there, so the velocity is read at a floor just above, from the state (1 − floor)·x with no
  noise in it. To second order that is where the flow itself carries x, because noise is independent of data at s = 0.
- Masks and stages. A known pixel moves on a straight line, so its velocity is the same at every stage of a step. The host
  replaces known pixels at each call, which makes the quotient wrong at the floor; later stages therefore take the first
  stage's velocity where the mask is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import input_error

__all__ = ["Walk", "check_sigmas", "sigma_floor"]


def sigma_floor(dtype: torch.dtype) -> float:
    """The sigma at which the velocity of sigma 0 is read: 1e-3 in float32, 4e-8 in float64.

    The reading errs by eps/floor from rounding and by floor·|dv/ds| from the distance; both are equal near sqrt(eps). The
    factor leans to the side of rounding (2.5e-5 in float32), since networks are rough at sigmas they never saw in training.
    """
    eps = torch.finfo(dtype).eps if dtype in (torch.float32, torch.float64) else torch.finfo(torch.float32).eps
    return 2.9 * eps**0.5


def check_sigmas(sigmas: torch.Tensor, where: str = "Rectiflow sampler", limit: float = 1.0) -> torch.Tensor:
    """The schedule on the CPU, or a ValueError when it is no flow schedule.

    Raises:
        NodeInputError: not one-dimensional, not finite, or outside [0, limit]; flows end at 1.
    """
    if sigmas.ndim != 1:
        raise input_error(where, "sigmas", tuple(sigmas.shape), "a one-dimensional tensor", "Connect a SIGMAS output.")
    sigmas = sigmas.detach().cpu()
    if len(sigmas) and not (bool(torch.isfinite(sigmas).all()) and 0 <= sigmas.min() and sigmas.max() <= limit):
        got = f"sigmas from {float(sigmas.min()):g} to {float(sigmas.max()):g}"
        remedy = "Make the schedule from the same flow model, for example with Flow Shift Sigmas; schedules of SD 1.5 or SDXL do not fit."
        raise input_error(where, "sigmas", got, f"finite values from 0 to {limit:g}", remedy)
    return sigmas


class Walk:
    """One run of a solver along `sigmas`, in either direction: iterate for (s, s_next), ask `velocity`, count `nfe`.

    The schedule stays on the CPU: its scalars enter device kernels without a synchronisation.

    Args:
        model: `denoised = model(x, sigma_of_each_row, **extra_args)`. Where it has a method `before_evaluation(step, stage)` it is told
            which interval is walked and whether it is asked at the "first", a "mid" or the "last" sigma of it.
        x: the starting state, `(b, …)`, of any rank.
        sigmas: `(n + 1,)`.
        callback: called once a step with ComfyUI's dictionary x, i, sigma, sigma_hat, denoised; what it raises (an interrupt)
            passes through.
        disable: no progress bar on the terminal.
        sigma_limit: the largest sigma allowed; above 1 only for models that are no flows.
    """

    def __init__(
        self, model, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None, callback, disable, sigma_limit: float = 1.0,
    ):
        self.model = model
        self.sigmas = check_sigmas(sigmas, limit=sigma_limit)
        self.extra_args = {} if extra_args is None else extra_args
        self.callback = callback
        self.disable = disable
        self.nfe = 0
        self.index = 0
        self._reported = -1
        self._rows = x.new_ones([x.shape[0]])
        self._ends = (0.0, 0.0)
        self._announce = getattr(model, "before_evaluation", None)
        mask = self.extra_args.get("denoise_mask")
        self._known = None if mask is None else mask == 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in _progress(range(max(len(self.sigmas) - 1, 0)), self.disable):
            self.index = index
            self._ends = (float(self.sigmas[index]), float(self.sigmas[index + 1]))
            yield self.sigmas[index], self.sigmas[index + 1]

    def reached(self, sigma: float) -> None:
        """For solvers that choose their own steps: count as step the interval of the schedule that sigma has entered."""
        start = float(self.sigmas[0])
        passed = int(((self.sigmas - start).abs() <= abs(sigma - start)).sum()) - 1
        self.index, self._reported = min(max(passed, 0), len(self.sigmas) - 2), -1

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """One model evaluation; the first of a step is what the callback shows."""
        denoised = self.model(x, sigma * self._rows, **self.extra_args)
        self.nfe += 1
        if self.callback is not None and self._reported != self.index:
            self._reported = self.index
            self.callback({"x": x, "i": self.index, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        return denoised

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, first: torch.Tensor | None = None) -> torch.Tensor:
        """v(x, sigma) = (x − denoised)/sigma, finite at sigma = 0 too.

        Args:
            x: `(b, …)`.
            sigma: a scalar tensor in [0, 1].
            first: the velocity of the step's first stage; known pixels of an inpaint mask keep it.
        """
        if self._announce is not None:
            start, end = self._ends
            self._announce(self.index, "first" if sigma == start else "last" if sigma == end else "mid")
        if float(sigma) == 0:
            floor = sigma_floor(x.dtype)
            x, sigma = x * (1 - floor), torch.tensor(floor, dtype=self.sigmas.dtype)
        denoised = self.denoise(x, sigma)
        v = (x - denoised) / (sigma * self._rows).reshape(-1, *[1] * (x.ndim - 1))
        if first is not None and self._known is not None:
            v = torch.where(self._known, first, v)
        return v


def _progress(steps: range, disable: bool | None):
    """ComfyUI's terminal bar where tqdm is installed, which it is there; the embedded host draws its own from the callback."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, disable=disable)
