"""A video model whose every answer is known, on the host's own BaseModel and ModelPatcher: Gaussian videos whose frames are correlated.

Each cell of a video is x0 ~ N(0, C) over its t frames, C_ij = rho^|i − j|. With noise level s_f in frame f, A = diag(1 − s), S = diag(s²):

    E[x0 | x] = C·A·(A·C·A + S)⁻¹·x,   E[noise | x] = S^½·(A·C·A + S)⁻¹·x,   v = E[noise | x] − E[x0 | x]

so the model is exact for one time as well as for a time a frame, and given frames have a known conditional: mean C_gk·C_kk⁻¹·x_k.
"""

from __future__ import annotations

import torch
from rectiflow.host.embedded.conds import CONDRegular
from rectiflow.host.embedded.latent_formats import LatentFormat
from rectiflow.host.embedded.model_base import BaseModel, ModelConfig, ModelType
from rectiflow.host.embedded.model_patcher import ModelPatcher
from rectiflow.host.embedded.sample import sample_custom

CPU = torch.device("cpu")


class VideoNet(torch.nn.Module):
    """x `(b, c, t, h, w)`, timestep `(b,)` or `(b, t)` → velocity. `calls` records inputs and times."""

    def __init__(self, rho: float):
        super().__init__()
        self.rho = rho
        self.dtype = torch.float32
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def covariance(self, frames: int) -> torch.Tensor:
        numbers = torch.arange(frames)
        return self.rho ** (numbers[:, None] - numbers).abs().double()

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs):
        self.calls.append((x.clone(), timestep.clone()))
        frames = x.shape[2]
        s = timestep.double().reshape(len(x), -1).expand(len(x), frames)  # (b, t)
        c, a = self.covariance(frames), torch.diag_embed(1 - s)
        inverse = torch.linalg.inv(a @ c @ a + torch.diag_embed(s**2))
        velocity = (torch.diag_embed(s) - c @ a) @ inverse  # (b, t, t)
        return torch.einsum("bij,bcjhw->bcihw", velocity, x.double()).to(x)


class VideoLatent(LatentFormat):
    latent_channels = 2
    latent_dimensions = 3


class OneTime(BaseModel):
    """A video flow model as most are: one time for all frames, given frames noised."""


class FrameTimes(BaseModel):
    """One that takes a time a frame and sees given frames clean, as Wan 2.2 5B does."""

    def extra_conds(self, **kwargs):
        out = super().extra_conds(**kwargs)
        if kwargs.get("denoise_mask") is not None:
            out["denoise_mask"] = CONDRegular(kwargs["denoise_mask"])
        return out

    def process_timestep(self, timestep, x, denoise_mask=None, **kwargs):
        return timestep if denoise_mask is None else denoise_mask.mean(dim=(1, 3, 4)) * timestep[:, None]

    def scale_latent_inpaint(self, sigma, noise, latent_image, **kwargs):
        return latent_image


def video_model(kind=OneTime, rho: float = 0.9) -> ModelPatcher:
    config = ModelConfig(
        image_model="video", unet_config={}, latent_format=VideoLatent(), model_type=ModelType.FLOW,
        sampling_settings={"shift": 1.0, "multiplier": 1.0}, memory_usage_factor=1.0,
    )  # fmt: skip
    return ModelPatcher(kind(config, VideoNet(rho)), CPU, CPU)


def calls(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return model.model.diffusion_model.calls


def draw(model, latent: dict, sampler, sigmas: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """One run at cfg 1 of a LATENT through SamplerCustom's own call."""
    samples = latent["samples"]
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(seed))
    empty = [[torch.zeros(1, 1, 2), {}]]
    return sample_custom(
        model, noise, 1.0, sampler, sigmas, empty, empty, samples, noise_mask=latent.get("noise_mask"), disable_pbar=True, seed=seed
    )


class Interpolation:
    """4800 cells of five-frame videos whose first and last frame are given; how far a result is from the exact conditional."""

    GIVEN, MADE = [0, 4], [1, 2, 3]

    def __init__(self, kind=OneTime, seed: int = 9):
        self.model = video_model(kind)
        self.covariance = self.model.model.diffusion_model.covariance(5)
        draws = torch.randn(5, 4800, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.video = (torch.linalg.cholesky(self.covariance) @ draws).float().reshape(1, 5, 2, 40, 60).transpose(1, 2)  # (1, 2, 5, 40, 60)

    def errors(self, out: torch.Tensor) -> tuple[float, float]:
        """(largest error of the coefficients with which made frames follow given ones, spread of made frames over the exact one)."""
        cells = out.double()[0].permute(0, 2, 3, 1).reshape(-1, 5)
        known, made, c = cells[:, self.GIVEN], cells[:, self.MADE], self.covariance
        gain = c[self.MADE][:, self.GIVEN] @ torch.linalg.inv(c[self.GIVEN][:, self.GIVEN])
        covariance = c[self.MADE][:, self.MADE] - gain @ c[self.GIVEN][:, self.MADE]
        residual = made - known @ gain.T
        slope = torch.linalg.lstsq(known, residual).solution  # a regression, so that each cell's own draw averages out
        return float(slope.abs().max()), float((residual.square().mean(0) / covariance.diagonal()).sqrt().mean())
