"""Small pictures of a run in progress, and the callback that sends them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from ...errors import input_error
from .context import current_host
from .utils import ProgressBar

__all__ = ["MAX_PREVIEW_RESOLUTION", "LatentPreviewer", "Latent2RGBPreviewer", "preview_to_image", "get_previewer", "prepare_callback"]

MAX_PREVIEW_RESOLUTION = 512  # largest side in pixels; the server scales a larger preview down
METHODS = ("auto", "latent2rgb", "none")


def preview_to_image(latent_image: torch.Tensor) -> Image.Image:
    """(h, w, 3) in −1..1 as a picture."""
    pixels = ((latent_image.float() + 1.0) / 2.0).clamp(0, 1).mul(0xFF)
    return Image.fromarray(pixels.to(device="cpu", dtype=torch.uint8).numpy())


class LatentPreviewer:
    def decode_latent_to_preview(self, x0: torch.Tensor) -> Image.Image:
        """The first latent of (b, c, …), in model latent space, as a picture."""
        raise NotImplementedError

    def decode_latent_to_preview_image(self, preview_format: str, x0: torch.Tensor) -> tuple[str, Image.Image, int]:
        return (preview_format, self.decode_latent_to_preview(x0), MAX_PREVIEW_RESOLUTION)


class Latent2RGBPreviewer(LatentPreviewer):
    """A linear map from latent channels to RGB, one picture pixel a latent pixel."""

    def __init__(self, latent_rgb_factors: list[list[float]], latent_rgb_factors_bias: list[float] | None = None):
        self.factors = torch.tensor(latent_rgb_factors)  # (c, 3)
        self.bias = torch.zeros(3) if latent_rgb_factors_bias is None else torch.tensor(latent_rgb_factors_bias)

    def decode_latent_to_preview(self, x0: torch.Tensor) -> Image.Image:
        latent = x0[0, :, 0] if x0.ndim == 5 else x0[0]  # (c, h, w)
        return preview_to_image(latent.movedim(0, -1) @ self.factors.to(latent) + self.bias.to(latent))


def get_previewer(device: Any, latent_format: Any) -> LatentPreviewer | None:
    """The previewer of the host's settings; None where previews are off or the latent format has no factors."""
    method = current_host().settings.preview_method
    if method not in METHODS:
        raise input_error("preview", "--preview-method", method, ", ".join(METHODS), "Choose one of these.")
    if method == "none" or latent_format.latent_rgb_factors is None:
        return None
    return Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)


def prepare_callback(model: Any, steps: int, x0_output_dict: dict | None = None) -> Callable[[int, torch.Tensor, torch.Tensor, int], None]:
    """callback(step, x0, x, total_steps) that moves the progress bar, sends a preview and keeps the last x0 in `x0_output_dict`.

    A preview costs a copy from the device, so it is made only while somebody listens.
    """
    previewer = get_previewer(model.load_device, model.model.latent_format)
    progress = ProgressBar(steps)

    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total_steps: int) -> None:
        if x0_output_dict is not None:
            x0_output_dict["x0"] = x0
        preview = None
        if previewer is not None and progress.hook is not None:
            preview = previewer.decode_latent_to_preview_image("JPEG", x0)
        progress.update_absolute(step + 1, total_steps, preview)

    return callback
