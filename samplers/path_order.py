"""Is a path first order (constant noise estimate) or straight (constant velocity)? Two figures that agree on reflowed flows alone.

"Rectified Diffusion", arXiv 2410.07303: any number of DDIM steps is exact iff eps is constant along the trajectory; any number of Euler
steps on the flow path iff the velocity is. Both figures are ∫E‖q − mean q‖² ds / ∫E‖q‖² ds over flow time s, q = eps or q = eps − x0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import input_error
from .walk import Walk

__all__ = ["PathOrder", "sample_path_order"]


@dataclass
class PathOrder:
    """What a measured run leaves: at the middle of every step its flow time, length in flow time, noise and clean estimates `(b, …)`."""

    times: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    noises: list[Tensor] = field(default_factory=list)
    cleans: list[Tensor] = field(default_factory=list)

    def _variation(self, values: list[Tensor]) -> tuple[float, list[float]]:
        """(the figure, ‖q − mean q‖² per coordinate of each step)."""
        weights = [length / sum(self.lengths) for length in self.lengths]
        mean = sum(weight * value for weight, value in zip(weights, values))
        off = [float((value - mean).square().mean()) for value in values]
        size = sum(weight * float(value.square().mean()) for weight, value in zip(weights, values))
        return (sum(weight * part for weight, part in zip(weights, off)) / size if size else 0.0), off

    @property
    def first_order_error(self) -> float:
        """0 where eps is constant along every path."""
        return self._variation(self.noises)[0]

    @property
    def straightness_error(self) -> float:
        """0 where the velocity eps − x0 is."""
        return self._variation([noise - clean for noise, clean in zip(self.noises, self.cleans)])[0]

    def table(self) -> str:
        """The verdict, then a line a step: flow time of its middle, how far eps and velocity are from their means there."""
        first, straight = self.first_order_error, self.straightness_error
        figures = (("first order (constant noise)", first), ("straight (constant velocity)", straight))
        small = [name for name, value in figures if value < 0.01]
        verdict = "The paths are " + (" and ".join(small) if small else "neither first order nor straight") + ", at 1 %."
        lines = [verdict, f"first-order error {first:.4f}, straightness error {straight:.4f}", "step  flow time   off in eps   off in v"]
        noises = self._variation(self.noises)[1]
        velocities = self._variation([noise - clean for noise, clean in zip(self.noises, self.cleans)])[1]
        for step, (time, eps, v) in enumerate(zip(self.times, noises, velocities), start=1):
            lines.append(f"{step:4d}  {time:9.4f}  {eps:11.5f}  {v:9.5f}")
        return "\n".join(lines)


@torch.no_grad()
def sample_path_order(model, x, sigmas, extra_args=None, callback=None, disable=None, *, record: PathOrder, flow: bool = True):
    """The midpoint rule along dx/dsigma = (x − D)/sigma, the velocity of flow models and eps of epsilon models; 2 NFE a step.

    Estimates are taken at the middle of each step, where neither sigma 0 nor 1 is met: D = denoised, eps = (x − alpha·D)/sigma with
    alpha = 1 − sigma on the flow path, 1 on the exploding one.
    """
    walk = Walk(model, x, sigmas, extra_args, callback, disable, sigma_limit=1.0 if flow else float("inf"))
    if len(walk.sigmas) < 2 or not bool((walk.sigmas[1:] < walk.sigmas[:-1]).all()):
        got = f"{len(walk.sigmas)} values"
        raise input_error("Path Order Probe", "sigmas", got, "2 or more values that fall", "Connect the schedule you sample with.")

    def flow_time(sigma: Tensor) -> float:
        return float(sigma if flow else sigma / (1 + sigma))

    for s, s_next in walk:
        middle = (s + s_next) / 2
        x_middle = x + (middle - s) * (x - walk.denoise(x, s)) / s
        clean = walk.denoise(x_middle, middle)
        record.times.append(flow_time(middle))
        record.lengths.append(flow_time(s) - flow_time(s_next))
        alpha = 1 - middle if flow else 1.0
        record.noises.append(((x_middle - alpha * clean) / middle).detach().float().cpu())
        record.cleans.append(clean.detach().float().cpu())
        x = x + (s_next - s) * (x_middle - clean) / middle
    return x
