"""What the samplers share: the bound model, derivatives, noise, log-SNR time.

Letters: sigma is the noise level of x; alpha its signal level (1 − sigma on a flow, 1 otherwise); lambda = log(alpha/sigma) is half
the log signal-to-noise ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..model_options import set_model_options_post_cfg_function
from ..model_sampling import CONST

NoiseSampler = Callable[[Any, Any], torch.Tensor]


class Denoiser:
    """`model` with its extra arguments and the callback bound, called with one sigma for the whole batch."""

    def __init__(self, model: Any, x: torch.Tensor, extra_args: dict | None, callback: Callable | None):
        self.model = model
        self.extra_args = dict(extra_args or {})
        self.callback = callback
        self.ones = x.new_ones([x.shape[0]])
        self.uncond_denoised: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, sigma: Any) -> torch.Tensor:
        return self.model(x, sigma * self.ones, **self.extra_args)

    def report(self, i: int, x: torch.Tensor, sigma: Any, denoised: torch.Tensor, sigma_hat: Any = None, **more) -> None:
        if self.callback is not None:
            sigma_hat = sigma if sigma_hat is None else sigma_hat
            self.callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised, **more})

    def record_uncond(self) -> None:
        """Keep the unconditional prediction of each evaluation in `uncond_denoised`, also at scale 1 (what CFG++ needs)."""

        def keep(args: dict) -> torch.Tensor:
            self.uncond_denoised = args["uncond_denoised"]
            return args["denoised"]

        options = dict(self.extra_args.get("model_options", {}))
        self.extra_args["model_options"] = set_model_options_post_cfg_function(options, keep, disable_cfg1_optimization=True)

    def noise_sampler(self, x: torch.Tensor, given: NoiseSampler | None) -> NoiseSampler:
        return given if given is not None else default_noise_sampler(x, seed=self.extra_args.get("seed"))


def to_d(x: torch.Tensor, sigma: Any, denoised: torch.Tensor) -> torch.Tensor:
    """dx/dsigma = (x − denoised) / sigma (Karras et al. 2022, eq. 3); `sigma` is a number or (b,)."""
    if isinstance(sigma, torch.Tensor) and sigma.ndim > 0:
        sigma = sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
    return (x - denoised) / sigma


def default_noise_sampler(x: torch.Tensor, seed: int | None = None) -> NoiseSampler:
    """Noise of x's shape from a generator of its own, drawn on the CPU so that every device gives the same picture."""
    generator = None if seed is None else torch.Generator(device="cpu").manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(x.shape, dtype=x.dtype, generator=generator, device="cpu").to(x.device)


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """(sigma_down, sigma_up): step down to the first, then add noise of the second, sigma_down² + sigma_up² = sigma_to²."""
    if not eta:
        return sigma_to, 0.0
    sigma_up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


def get_flow_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float) -> tuple[Any, Any, Any]:
    """(sigma_down, scale, renoise) on x = (1 − sigma)·x0 + sigma·noise.

    Step down to sigma_down, multiply by `scale` so that the signal is that of sigma_to, add `renoise` of fresh noise to get its noise
    level too.
    """
    sigma_down = sigma_to * (1 + (sigma_to / sigma_from - 1) * eta)
    alpha_to, alpha_down = 1 - sigma_to, 1 - sigma_down
    return sigma_down, alpha_to / alpha_down, (sigma_to**2 - sigma_down**2 * alpha_to**2 / alpha_down**2) ** 0.5


def churned(
    x: torch.Tensor, sigma: Any, steps: int, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> tuple[torch.Tensor, Any]:
    """Raise the noise level a little before a step (Karras et al. 2022, algorithm 2); returns (x, sigma_hat)."""
    gamma = min(s_churn / steps, 2**0.5 - 1) if s_churn > 0 and s_tmin <= sigma <= s_tmax else 0.0
    if gamma == 0:
        return x, sigma
    sigma_hat = sigma * (gamma + 1)
    noise = torch.randn(x.shape, dtype=x.dtype, device="cpu").to(x.device) * s_noise
    return x + noise * (sigma_hat**2 - sigma**2) ** 0.5, sigma_hat


def run_model_sampling(model: Any) -> Any:
    """The model_sampling that is loaded for this run."""
    return model.inner_model.inner_model.model_sampling


def patched_model_sampling(model: Any) -> Any:
    """The model_sampling as the guider's patcher sees it."""
    return model.inner_model.model_patcher.get_model_object("model_sampling")


def is_flow(model: Any) -> bool:
    return isinstance(run_model_sampling(model), CONST)


def sigma_to_half_log_snr(sigma: torch.Tensor, model_sampling: Any) -> torch.Tensor:
    """lambda = log(alpha / sigma)."""
    return sigma.logit().neg() if isinstance(model_sampling, CONST) else sigma.log().neg()


def half_log_snr_to_sigma(half_log_snr: torch.Tensor, model_sampling: Any) -> torch.Tensor:
    return half_log_snr.neg().sigmoid() if isinstance(model_sampling, CONST) else half_log_snr.neg().exp()


def offset_first_sigma_for_snr(sigmas: torch.Tensor, model_sampling: Any, percent_offset: float = 1e-4) -> torch.Tensor:
    """Move a flow's first sigma a little below 1, where lambda is −inf."""
    if len(sigmas) > 1 and isinstance(model_sampling, CONST) and sigmas[0] >= 1:
        sigmas = sigmas.clone()
        sigmas[0] = model_sampling.percent_to_sigma(percent_offset)
    return sigmas


def signal_level(sigma: torch.Tensor, model_sampling: Any) -> torch.Tensor:
    """alpha = sigma · e^lambda."""
    return sigma * sigma_to_half_log_snr(sigma, model_sampling).exp()
