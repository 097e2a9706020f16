"""Sampling from the tiny model in Python, through the nodes and the port, without a graph: short runs in great number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rectiflow.host.embedded import Host, use_host
from torch import Tensor

__all__ = ["TinyRuns"]


class TinyRuns:
    """The loaded model and the shortest ways through it. Latents are (b, 16, 16, 16), pictures (b, 64, 64, 3)."""

    def __init__(self, host: Host):
        from rectiflow.nodes.tiny import RectiflowLoadTiny

        self.host = host
        with torch.inference_mode():
            self.model, self.clip, self.vae = RectiflowLoadTiny().execute()

    def conditioning(self, prompts: str | Sequence[str]) -> list:
        """CONDITIONING of one prompt, or one entry that holds a batch of prompts."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        entries = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0] for text in texts]
        context = torch.cat([entry[0] for entry in entries])
        pooled = torch.cat([entry[1]["pooled_output"] for entry in entries])
        return [[context, {"pooled_output": pooled}]]

    def noise(self, seeds: Sequence[int], size: tuple[int, int] = (64, 64)) -> Tensor:
        """The noise of each seed as a batch of one would get it."""
        from rectiflow.host import prepare_noise

        empty = torch.zeros(1, 16, size[0] // 4, size[1] // 4)
        return torch.cat([prepare_noise(empty, seed) for seed in seeds])

    def sample(
        self,
        prompts: str | Sequence[str],
        noise: Tensor,
        *,
        model=None,
        steps: int = 16,
        cfg: float = 3.0,
        sampler: str = "euler",
        latent: Tensor | None = None,
        mask: Tensor | None = None,
        sigmas: Tensor | None = None,
    ) -> Tensor:
        """The final latent; starts from pure noise on the model's `simple` schedule unless told otherwise."""
        from rectiflow.host import CFGGuider, calculate_sigmas, sampler_object

        model = model or self.model
        if sigmas is None:
            sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        guider = CFGGuider(model)
        guider.set_conds(self.conditioning(prompts), self.conditioning(""))
        guider.set_cfg(cfg)
        latent = torch.zeros_like(noise) if latent is None else latent
        with use_host(self.host), torch.inference_mode():
            return guider.sample(noise, latent, sampler_object(sampler), sigmas, denoise_mask=mask, disable_pbar=True, seed=0)
