"""Models of other predictions and paths: flow models read as epsilon models, epsilon models read as flows, flows of either sign.

What a host asks of a model is its `model_sampling`: which noise levels there are, which time the network is given, how its output becomes a
clean picture. A view is another such object around the model's own; no weight changes. "The Principles of Diffusion Models", arXiv
2510.21890, for the paths; rf++, arXiv 2405.20320, for epsilon → flow; InstaFlow, arXiv 2309.06380, for the sign; Rectified Diffusion, arXiv
2410.07303, for the phases.

    flow x = (1 − s)·x0 + s·noise    exploding x_ve = x0 + ve·noise    s = ve/(1 + ve),  x = x_ve/(1 + ve)

The host's own classes (CONST, EPS, ModelSamplingDiscreteFlow) are handed in, so that code which asks for their type finds it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import input_error

__all__ = [
    "VELOCITY_SIGNS", "diffusion_view", "flow_view", "is_flow", "phased_sigmas", "segment_noise", "segment_state", "signed_flow",
]

VELOCITY_SIGNS = ("data_minus_noise", "noise_minus_data")
HIGHEST_FLOW_SIGMA = 0.999  # of a flow model read as epsilon model; sigma 1 lies at infinity there


def is_flow(model_sampling: Any) -> bool:
    """Whether sigma ends at 1; other models go on to 14 and more."""
    return float(model_sampling.percent_to_sigma(0.0)) <= 1


def _rows(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def flow_view(inner: torch.nn.Module, const: type) -> torch.nn.Module:
    """An epsilon, v or EDM model as a flow: sigma in [0, 1], state (1 − s)·x0 + s·noise.

    Above the model's highest noise level (s = 0.936 for SD 1.5) it is asked at that level, with the state scaled to the spread it
    expects there; s = 1 is pure noise, as in its own sampling. Below the lowest, only the time is held.

    Args:
        inner: the host's model_sampling on the exploding path.
        const: the host's CONST.
    """

    class FlowView(const, torch.nn.Module):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.inner = inner
            self.sigma_data = getattr(inner, "sigma_data", 1.0)
            ve = inner.sigmas.double()
            self.register_buffer("sigmas", (ve / (1 + ve)).float())

        @property
        def sigma_min(self) -> torch.Tensor:
            return self.sigmas[0]

        @property
        def sigma_max(self) -> torch.Tensor:
            return self.sigmas[-1]

        def _spread(self, s: torch.Tensor) -> torch.Tensor:
            return torch.sqrt(s**2 + ((1 - s) * self.sigma_data) ** 2)

        def _level(self, sigma: torch.Tensor) -> torch.Tensor:
            """The inner noise level: s/(1 − s), at most the model's highest."""
            top = float(inner.sigma_max)
            held = sigma.clamp_max(top / (1 + top))
            return held / (1 - held)

        def _inner_state(self, sigma: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            level = self._level(sigma)
            s, held = _rows(sigma, x), _rows(level / (1 + level), x)
            return level, x * (self._spread(held) / self._spread(s) / (1 - held))

        def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return inner.calculate_input(*self._inner_state(sigma, noise))

        def calculate_denoised(self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
            level, state = self._inner_state(sigma, model_input)
            return inner.calculate_denoised(level, model_output, state)

        def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
            return inner.timestep(self._level(sigma).clamp_min(float(inner.sigma_min)))

        def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
            ve = inner.sigma(timestep)
            return ve / (1 + ve)

        def percent_to_sigma(self, percent: float) -> float:
            if percent <= 0:
                return 1.0
            ve = inner.percent_to_sigma(percent)
            return ve / (1 + ve)

    return FlowView()


def diffusion_view(inner: torch.nn.Module, eps: type) -> torch.nn.Module:
    """A flow model as an epsilon model on the exploding path, for samplers and schedulers made for those.

    Its highest noise level is 999 (s = 0.999): s = 1 would be infinite.

    Args:
        inner: the host's model_sampling of a flow.
        eps: the host's EPS.
    """

    class DiffusionView(eps, torch.nn.Module):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.inner = inner
            self.sigma_data = 1.0
            s = inner.sigmas.double()
            s = torch.cat([s[s < HIGHEST_FLOW_SIGMA - 1e-6], s.new_tensor([HIGHEST_FLOW_SIGMA])])
            self.register_buffer("sigmas", (s / (1 - s)).float())

        @property
        def sigma_min(self) -> torch.Tensor:
            return self.sigmas[0]

        @property
        def sigma_max(self) -> torch.Tensor:
            return self.sigmas[-1]

        def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return inner.calculate_input(sigma / (1 + sigma), noise / (1 + _rows(sigma, noise)))

        def calculate_denoised(self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
            return inner.calculate_denoised(sigma / (1 + sigma), model_output, model_input / (1 + _rows(sigma, model_input)))

        def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
            return inner.timestep(sigma / (1 + sigma))

        def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
            s = inner.sigma(timestep).clamp_max(HIGHEST_FLOW_SIGMA)
            return s / (1 - s)

        def percent_to_sigma(self, percent: float) -> float:
            if percent <= 0:
                return 999999999.9  # above every sigma, as the host's epsilon models have it
            s = min(float(inner.percent_to_sigma(percent)), HIGHEST_FLOW_SIGMA)
            return s / (1 - s)

    return DiffusionView()


def signed_flow(discrete_flow: type, const: type, velocity_sign: str, shift: float = 1.0, multiplier: float = 1000.0) -> torch.nn.Module:
    """The model_sampling of a network whose output is a flow velocity, though its checkpoint does not say so.

    Args:
        discrete_flow, const: the host's ModelSamplingDiscreteFlow and CONST.
        velocity_sign: data_minus_noise (InstaFlow, PeRFlow, rectified-flow papers) or noise_minus_data (SD3, Flux, ComfyUI).
        multiplier: the network's time at sigma 1; time is multiplier·u, not rounded.
    """
    if velocity_sign not in VELOCITY_SIGNS:
        raise input_error("FlowUNetSampling", "velocity_sign", velocity_sign, ", ".join(VELOCITY_SIGNS), "Pick one of them.")
    sign = -1.0 if velocity_sign == "data_minus_noise" else 1.0

    class SignedFlow(discrete_flow, const):
        def calculate_denoised(self, sigma, model_output, model_input):
            return const.calculate_denoised(self, sigma, sign * model_output, model_input)

    made = SignedFlow()
    made.set_parameters(shift=shift, multiplier=multiplier)
    return made


def phased_sigmas(model_sampling: Any, phases: int, steps_per_phase: int = 1) -> torch.Tensor:
    """Trailing steps over the model's table, with every segment's border on the grid: `(phases·steps_per_phase + 1,)`, 0 last.

    On a table of 1000 with 4 phases of 1 step these are the entries 999, 749, 499, 249.

    Raises:
        NodeInputError: more steps than the table has entries.
    """
    size, steps = len(model_sampling.sigmas), phases * steps_per_phase
    if not 1 <= steps <= size:
        raise input_error("PhasedSigmas", "steps_per_phase", steps_per_phase, f"1 to {size} steps in all", "Use fewer phases or steps.")
    entries = [round(size - i * size / steps) - 1 for i in range(steps)]
    return torch.cat([model_sampling.sigmas[entries].float().cpu(), torch.zeros(1)])


def _noise_to_signal(level: tuple[float, float]) -> float:
    alpha, sigma = level
    if not alpha > 0:
        raise input_error("segment", "alpha", alpha, "above 0", "Start the segment a little below pure noise.")
    return sigma / alpha


def segment_noise(x_start: torch.Tensor, x_end: torch.Tensor, start: tuple[float, float], end: tuple[float, float]) -> torch.Tensor:
    """The one noise estimate that carries a first-order path from x_start to x_end (Rectified Diffusion's target in a phase),

    eps = (x_end/alpha_end − x_start/alpha_start)/(NSR_end − NSR_start), NSR = sigma/alpha; levels are (alpha, sigma).
    """
    return (x_end / end[0] - x_start / start[0]) / (_noise_to_signal(end) - _noise_to_signal(start))


def segment_state(x_start: torch.Tensor, eps: torch.Tensor, start: tuple[float, float], at: tuple[float, float]) -> torch.Tensor:
    """Where that path is at the level `at`: alpha·(x_start/alpha_start + (NSR − NSR_start)·eps)."""
    return at[0] * (x_start / start[0] + (_noise_to_signal(at) - _noise_to_signal(start)) * eps)
