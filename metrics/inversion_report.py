"""Figures of latents, for reports on inversions: the same formulas as for pictures, on the scale of the source."""

from __future__ import annotations

from torch import Tensor

from ..errors import input_error
from .fidelity import Figures, figures

__all__ = ["latent_figures", "latent_rmse"]


def _same_shape(latent: Tensor, source: Tensor, where: str, name: str) -> None:
    if latent.shape != source.shape:
        remedy = "Link the latents before and after one round trip."
        raise input_error(where, name, tuple(latent.shape), f"the shape of source_latent, {tuple(source.shape)}", remedy)


def _as_pictures(latent: Tensor) -> Tensor:
    """(b, c, h, w) or (b, c, t, h, w) → (b·t, h, w, c)."""
    if latent.ndim == 5:
        latent = latent.movedim(2, 1).flatten(0, 1)
    return latent.movedim(1, -1)


def latent_figures(latent: Tensor, source: Tensor, window: str, where: str = "inversion report") -> Figures:
    """MSE, PSNR and SSIM of latents `(b, c, h, w)` or `(b, c, t, h, w)`; frames count as pictures.

    Latents have no bounds of their own: the data range is the source's largest value minus its smallest, and both latents are moved
    so that the source starts at 0 as pictures do (SSIM compares means and is meant for values of one sign; the others do not notice).

    Raises:
        NodeInputError: shapes that differ, a source without contrast, or less than a window of cells.
    """
    _same_shape(latent, source, where, "latent")
    data_range = float(source.max() - source.min())
    if not data_range > 0:
        raise input_error(where, "source_latent", "a latent without contrast", "an encoded picture", "Link the latent that was inverted.")
    lowest = source.min()
    return figures(_as_pictures(latent - lowest), _as_pictures(source - lowest), None, window, data_range, where)


def latent_rmse(latent: Tensor, source: Tensor, where: str = "inversion report") -> float:
    """Root mean squared difference of two latents of one shape."""
    _same_shape(latent, source, where, "last_denoised")
    return float((latent.double() - source.double()).square().mean().sqrt())
