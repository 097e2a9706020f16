"""What a model's output means and how noise levels and times map to each other.

A model_sampling object joins a prediction class (CONST, EPS, V_PREDICTION) with a sigma class. Rectified flow is CONST:
x = (1 − sigma)·x0 + sigma·noise, output v = noise − x0.
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "EPS", "V_PREDICTION", "EDM", "CONST", "X0", "ModelSamplingDiscrete", "ModelSamplingDiscreteFlow", "ModelSamplingFlux",
    "reshape_sigma", "time_snr_shift", "flux_time_shift", "make_beta_schedule", "rescale_zero_terminal_snr_sigmas",
]  # fmt: skip


def reshape_sigma(sigma: torch.Tensor, noise_dim: int) -> torch.Tensor:
    """One sigma as a scalar, several as (b, 1, …) with `noise_dim` axes."""
    return sigma.view(()) if sigma.nelement() == 1 else sigma.view(sigma.shape[:1] + (1,) * (noise_dim - 1))


class EPS:
    """The model predicts the noise of x = x0 + sigma·noise (Ho et al. 2020 in the variance-exploding form of Karras et al. 2022)."""

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        sigma = reshape_sigma(sigma, noise.ndim)
        return noise / (sigma**2 + self.sigma_data**2) ** 0.5

    def calculate_denoised(self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        return model_input - model_output * reshape_sigma(sigma, model_output.ndim)

    def noise_scaling(self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise=False) -> torch.Tensor:
        sigma = reshape_sigma(sigma, noise.ndim)
        scale = torch.sqrt(1.0 + sigma**2.0) if max_denoise else sigma  # x at the schedule's start has variance 1 + sigma²
        return noise * scale + latent_image

    def inverse_noise_scaling(self, sigma: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return latent


class V_PREDICTION(EPS):
    """The model predicts v = alpha·noise − sigma·x0 (Salimans & Ho 2022)."""

    sign = -1.0

    def calculate_denoised(self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        sigma = reshape_sigma(sigma, model_output.ndim)
        total = sigma**2 + self.sigma_data**2
        return model_input * self.sigma_data**2 / total + self.sign * model_output * sigma * self.sigma_data / total**0.5


class EDM(V_PREDICTION):
    """The preconditioning of Karras et al. 2022: v-prediction with the opposite sign."""

    sign = 1.0


class CONST:
    """Rectified flow: the model predicts the velocity v = noise − x0 and sees x as it is."""

    def calculate_input(self, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def calculate_denoised(self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        return model_input - model_output * reshape_sigma(sigma, model_output.ndim)

    def noise_scaling(self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, max_denoise=False) -> torch.Tensor:
        sigma = reshape_sigma(sigma, noise.ndim)
        return sigma * noise + (1.0 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Undo the (1 − sigma) of `noise_scaling`, so that a run may stop half-way; sigma = 1 has no inverse."""
        return latent / (1.0 - reshape_sigma(sigma, latent.ndim))


class X0(EPS):
    """The model predicts x0 itself."""

    def calculate_denoised(self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        return model_output


def make_beta_schedule(schedule: str, n_timestep: int, linear_start: float, linear_end: float, cosine_s: float = 8e-3) -> torch.Tensor:
    """Per-step noise variances beta (n,), float64: "linear" is linear in sqrt(beta), "cosine" is Nichol & Dhariwal 2021."""
    if schedule == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=torch.float64) ** 2
    if schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, n_timestep, dtype=torch.float64)
    if schedule == "cosine":
        t = (torch.arange(n_timestep + 1, dtype=torch.float64) / n_timestep + cosine_s) / (1 + cosine_s)
        alphas_cumprod = torch.cos(t * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)
    raise ValueError(f"beta schedule '{schedule}' is unknown; allowed: linear, sqrt_linear, cosine")


def rescale_zero_terminal_snr_sigmas(sigmas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alpha-bar) so that the last step is pure noise and the first keeps its value (Lin et al. 2023)."""
    alphas_bar_sqrt = (1 / (sigmas**2 + 1)).sqrt()
    first, last = alphas_bar_sqrt[0], alphas_bar_sqrt[-1]
    alphas_bar = ((alphas_bar_sqrt - last) * first / (first - last)) ** 2
    alphas_bar[-1] = 4.8973451890853435e-08  # a tiny signal instead of none keeps sigma finite
    return ((1 - alphas_bar) / alphas_bar) ** 0.5


class _SigmaTable(torch.nn.Module):
    """A table of ascending sigmas; its ends are the limits of the schedule."""

    sigmas: torch.Tensor

    @property
    def sigma_min(self) -> torch.Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> torch.Tensor:
        return self.sigmas[-1]


def _settings(model_config) -> dict:
    return {} if model_config is None else model_config.sampling_settings


class ModelSamplingDiscrete(_SigmaTable):
    """1000 discrete times of a variance-preserving model; between them log sigma is interpolated."""

    def __init__(self, model_config=None, zsnr: bool | None = None):
        super().__init__()
        settings = _settings(model_config)
        betas = make_beta_schedule(
            settings.get("beta_schedule", "linear"), settings.get("timesteps", 1000),
            settings.get("linear_start", 0.00085), settings.get("linear_end", 0.012),
        )  # fmt: skip
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
        self.num_timesteps = len(betas)
        self.zsnr = settings.get("zsnr", False) if zsnr is None else zsnr
        self.sigma_data = 1.0
        self.set_sigmas(rescale_zero_terminal_snr_sigmas(sigmas) if self.zsnr else sigmas)

    def set_sigmas(self, sigmas: torch.Tensor) -> None:
        self.register_buffer("sigmas", sigmas.float())
        self.register_buffer("log_sigmas", sigmas.log().float())

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Index of the nearest table entry in log sigma."""
        distance = sigma.log().to(self.log_sigmas.device) - self.log_sigmas[:, None]
        return distance.abs().argmin(dim=0).view(sigma.shape).to(sigma.device)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep.float().to(self.log_sigmas.device).clamp(0, len(self.sigmas) - 1)
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - share) * self.log_sigmas[low] + share * self.log_sigmas[high]).exp().to(timestep.device)

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma at `percent` (0..1) of the way from noise to picture; 0 stands for "always", so it lies above every sigma."""
        if percent <= 0.0:
            return 999999999.9
        if percent >= 1.0:
            return 0.0
        return self.sigma(torch.tensor((1.0 - percent) * 999.0)).item()


def time_snr_shift(alpha: float, t):
    """Shift a flow's time: sigma = alpha·t / (1 + (alpha − 1)·t) (Esser et al. 2024, resolution shift)."""
    return t if alpha == 1.0 else alpha * t / (1 + (alpha - 1) * t)


def flux_time_shift(mu: float, sigma: float, t):
    """Flux's time shift: e^mu / (e^mu + (1/t − 1)^sigma)."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** sigma)


class _FlowTable(_SigmaTable):
    """A continuous flow time u in (0, 1], tabulated at i/n for the schedulers that pick from a table."""

    def _shifted(self, u):
        raise NotImplementedError

    def _fill(self, timesteps: int, multiplier: float = 1) -> None:
        self.register_buffer("sigmas", self.sigma((torch.arange(1, timesteps + 1, 1) / timesteps) * multiplier))

    def percent_to_sigma(self, percent: float) -> float:
        """Sigma at `percent` (0..1) of the way from noise to picture, in flow time before the shift."""
        if percent <= 0.0:
            return 1.0
        if percent >= 1.0:
            return 0.0
        return self._shifted(1.0 - percent)


class ModelSamplingDiscreteFlow(_FlowTable):
    """SD3's flow times: sigma(t) = time_snr_shift(shift, t/multiplier), a table of 1000."""

    def __init__(self, model_config=None):
        super().__init__()
        settings = _settings(model_config)
        self.set_parameters(shift=settings.get("shift", 1.0), multiplier=settings.get("multiplier", 1000))

    def set_parameters(self, shift: float = 1.0, timesteps: int = 1000, multiplier: float = 1000) -> None:
        self.shift = shift
        self.multiplier = multiplier
        self._fill(timesteps, multiplier)

    def _shifted(self, u):
        return time_snr_shift(self.shift, u)

    def timestep(self, sigma):
        return sigma * self.multiplier

    def sigma(self, timestep):
        return self._shifted(timestep / self.multiplier)


class ModelSamplingFlux(_FlowTable):
    """Flux's flow times: sigma(t) = flux_time_shift(mu, 1, t), a table of 10000; the model is given sigma itself."""

    def __init__(self, model_config=None):
        super().__init__()
        self.set_parameters(shift=_settings(model_config).get("shift", 1.15))

    def set_parameters(self, shift: float = 1.15, timesteps: int = 10000) -> None:
        self.shift = shift
        self._fill(timesteps)

    def _shifted(self, u):
        return flux_time_shift(self.shift, 1.0, u)

    def timestep(self, sigma):
        return sigma

    def sigma(self, timestep):
        return self._shifted(timestep)
