"""How straight a flow runs: S(Z) of "Flow Straight and Fast", arXiv 2209.03003, measured along a schedule.

    S = ∫ E‖(Z1 − Z0) − v(Z_s, s)‖² ds, averaged over coordinates, not summed

Z runs from noise at the schedule's first sigma to its last; Z1 − Z0 becomes the mean velocity (x(first) − x(last))/(first − last), the
one velocity that would carry each sample along its line. S is 0 if and only if every sample travels on a line at constant speed; then
one Euler step of any length is exact. The paths are walked with the midpoint rule, whose two velocities and the next step's first are
the three points of Simpson's rule on each interval, so both path and integral are second order or better in the steps: 2N + 1 model calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import input_error
from .walk import Walk

__all__ = ["PathRecord", "Straightness", "sample_recorded", "straightness"]


@dataclass
class PathRecord:
    """What a recorded run leaves: its ends and velocities, on the CPU in float32 or better, `(b, …)` each.

    starts: v at every point of the schedule, N + 1 of them; middles: v half a step after it, N. Memory: 2N + 3 latents.
    """

    sigmas: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    starts: list[Tensor] = field(default_factory=list)
    middles: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def sample_recorded(model, x, sigmas, extra_args=None, callback=None, disable=None, *, record: PathRecord):
    """The midpoint rule that writes its path to `record`. 2N + 1 NFE; a last sigma of 0 is read at the floor of `Walk.velocity`."""
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    if len(walk.sigmas) < 2 or not bool((walk.sigmas[1:] < walk.sigmas[:-1]).all()):
        got = f"{len(walk.sigmas)} values"
        raise input_error("Flow Straightness", "sigmas", got, "2 or more values that fall", "Connect the schedule you sample with.")
    record.sigmas, record.first = walk.sigmas, _kept(x)
    for s, s_next in walk:
        h = s_next - s
        v = walk.velocity(x, s)
        v_mid = walk.velocity(x + h / 2 * v, s + h / 2, first=v)
        record.starts.append(_kept(v))
        record.middles.append(_kept(v_mid))
        x = x + h * v_mid
    record.starts.append(_kept(walk.velocity(x, walk.sigmas[-1], first=v)))
    record.last = _kept(x)
    return x


def _kept(x: Tensor) -> Tensor:
    return x.detach().to("cpu", x.dtype if x.dtype == torch.float64 else torch.float32, copy=True)


@dataclass(frozen=True)
class Straightness:
    """S of every sample and where along the schedule it arises.

    sigmas: `(n + 1,)`; deviation: E‖mean velocity − v‖² at each of them, `(b, n + 1)`; middles: the same half a step later,
    `(b, n)`; line: ‖mean velocity‖² a sample, `(b,)`. All are means over coordinates.
    """

    sigmas: Tensor
    deviation: Tensor
    middles: Tensor
    line: Tensor

    def shares(self) -> Tensor:
        """What each step adds to S: `(b, n)`, by Simpson's rule."""
        h = (self.sigmas[1:] - self.sigmas[:-1]).abs().to(self.deviation)
        return h / 6 * (self.deviation[:, :-1] + 4 * self.middles + self.deviation[:, 1:])

    @property
    def value(self) -> float:
        """S, the mean over samples."""
        return float(self.shares().sum(1).mean())

    @property
    def relative(self) -> float:
        """S over E‖Z1 − Z0‖²: the share of the motion that leaves the line, comparable between models and latents."""
        return self.value / float(self.line.mean())

    def table(self) -> str:
        """A line a step: its sigmas, the deviation where it starts, what it adds to S, and the sum so far in % of S."""
        shares, total = self.shares().mean(0), 0.0
        lines = ["step  sigma from      to   deviation   adds to S   of S so far"]
        for step, (deviation, share) in enumerate(zip(self.deviation.mean(0), shares)):
            total += float(share)
            part = total / self.value if self.value else 1.0
            span = f"{float(self.sigmas[step]):10.4f}  {float(self.sigmas[step + 1]):6.4f}"
            lines.append(f"{step + 1:4d}  {span}  {float(deviation):10.5f}  {float(share):10.6f}  {part:11.1%}")
        return "\n".join(lines)


def straightness(record: PathRecord) -> Straightness:
    """S(Z) from a recorded run, computed in float64."""
    sigmas = record.sigmas.double()
    mean_velocity = (record.first.double() - record.last.double()) / (sigmas[0] - sigmas[-1])  # (b, …)

    def deviation(velocity: Tensor) -> Tensor:
        return (mean_velocity - velocity.double()).square().flatten(1).mean(1)

    return Straightness(
        sigmas,
        torch.stack([deviation(v) for v in record.starts], dim=1),
        torch.stack([deviation(v) for v in record.middles], dim=1),
        mean_velocity.square().flatten(1).mean(1),
    )
