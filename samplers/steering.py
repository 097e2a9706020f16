"""FlowChef: steer the flow by its own clean estimate, without a backward pass through the model and without inversion.

"Steering Rectified Flow Models in the Vector Field for Controlled Image Generation", arXiv 2412.00100. Per step, with one evaluation:

    v  = v(x, s)                     no gradient is recorded
    D  = x − s·v                     the clean picture the model predicts
    D* = D − Σ beta_k(s)·step_k(D)   `inner` times; costs.py says what a step is
    x' = (x + D* − D) + h·v          the same v

Where this differs from shifting `denoised` inside a stock sampler: there x keeps its place and only (1 − s'/s) of the shift arrives; here
x moves by all of it. Costs of several parts are summed at the same D. Without an active part a step is Euler's, bit for bit.
"""

from __future__ import annotations

import torch

from ..errors import input_error
from .costs import CostPart, LatentSpace, Step
from .walk import Walk

__all__ = ["VELOCITIES", "sample_flowchef"]

VELOCITIES = ("reused", "fresh")


@torch.no_grad()
def sample_flowchef(
    model, x, sigmas, extra_args=None, callback=None, disable=None, costs: tuple[CostPart, ...] = (), inner: int = 1,
    velocity: str = "reused",
):  # fmt: skip
    """Euler steps whose clean estimate is steered by `costs`. 1 NFE a step; with velocity "fresh" 2 where it was steered.

    Args:
        costs: CostParts, summed.
        inner: steering steps on the same prediction.
        velocity: "reused" is FlowChef; "fresh" asks the model again at the shifted state before going on, as its Rectified Diffusion
            variant does.

    Raises:
        NodeInputError: rising sigmas, an unknown velocity, or a target that does not fit the run.
    """
    if velocity not in VELOCITIES:
        raise input_error("FlowChef Sampler", "velocity", velocity, ", ".join(VELOCITIES), "Pick one of them.")
    walk = Walk(model, x, sigmas, extra_args, callback, disable)
    if len(walk.sigmas) > 1 and bool((walk.sigmas[1:] >= walk.sigmas[:-1]).any()):
        raise input_error("FlowChef Sampler", "sigmas", "a schedule that does not fall", "sigmas that fall", "Steering is for sampling.")
    space = _latent_space(model)
    steps: dict[int, Step] = {}
    for s, s_next in walk:
        v = walk.velocity(x, s)
        active = [(index, weight) for index, part in enumerate(costs) if (weight := part.weight(float(s))) != 0]
        if active:
            with torch.inference_mode(False):
                for index, _ in active:
                    if index not in steps:
                        steps[index] = costs[index].cost.bind(space, x.clone())
                shift = _shift((x - s * v).clone(), [(steps[index], weight) for index, weight in active], inner)
            x = x + shift
            if velocity == "fresh":
                v = walk.velocity(x, s)
        x = x + v * (s_next - s)
    return x


def _shift(clean: torch.Tensor, active: list[tuple[Step, float]], inner: int) -> torch.Tensor:
    """D* − D, `(b, …)`. Gradients are on, for the decoder and for scores; what comes out carries none."""
    steered = clean
    for _ in range(inner):
        with torch.enable_grad():
            moves = [weight * step(steered).detach() for step, weight in active]
        steered = steered - sum(moves)
    return steered - clean


def _latent_space(model) -> LatentSpace:
    """The host's model behind the wrapper and the guider; the identity where the caller is no host."""
    guider = getattr(model, "inner_model", None)
    base = getattr(guider, "inner_model", None)
    if not hasattr(base, "process_latent_in"):
        return LatentSpace()
    return LatentSpace(base.process_latent_in, base.process_latent_out, getattr(guider, "model_patcher", None))
