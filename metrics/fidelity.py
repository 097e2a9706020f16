"""How near a picture is to its reference: MSE, PSNR and SSIM, over the whole picture or over a region of it.

PSNR = 10·log10(R²/MSE). SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
Similarity", 2004, per channel and then averaged:

    SSIM = (2·ux·uy + C1)·(2·vxy + C2) / ((ux² + uy² + C1)·(vx + vy + C2)),  C1 = (0.01·R)², C2 = (0.03·R)²

with means u and (co)variances v under a sliding window that lies wholly inside the picture. Two windows, both as scikit-image's
`structural_similarity` has them: "gaussian" is gaussian_weights=True, sigma=1.5, use_sample_covariance=False, the paper's form;
"uniform" is its default, 7×7 with sample covariance. R is the data range, 1 for pictures. Figures are computed on the CPU in
float64, because E[x²] − E[x]² loses half of float32's digits on flat pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import input_error

__all__ = ["WINDOWS", "Figures", "figures", "mse", "picture_pair", "psnr", "region_weights", "relative_errors", "ssim", "ssim_map"]


@dataclass(frozen=True)
class Window:
    """A separable averaging window.

    taps: weights along one axis, an odd number of them, with sum 1.
    covariance: factor on variances and covariances; n/(n − 1) makes them sample covariances.
    """

    taps: tuple[float, ...]
    covariance: float = 1.0

    @property
    def margin(self) -> int:
        """Pixels from the picture's edge to the first centre whose window lies inside."""
        return len(self.taps) // 2


def _gaussian(sigma: float, radius: int) -> Window:
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    return Window(tuple(weight / sum(weights) for weight in weights))


def _uniform(size: int) -> Window:
    return Window((1.0 / size,) * size, size**2 / (size**2 - 1))


WINDOWS = MappingProxyType({"gaussian": _gaussian(1.5, 5), "uniform": _uniform(7)})


@dataclass(frozen=True)
class Figures:
    """The figures of each picture of a batch over one region: `(b,)` float64 each; `share` is the region's part of the picture."""

    mse: Tensor
    psnr: Tensor
    ssim: Tensor
    share: Tensor


def picture_pair(image: Tensor, reference: Tensor, where: str = "metrics") -> tuple[Tensor, Tensor]:
    """Both batches in float64 on the CPU, a single reference repeated for every picture.

    Args:
        image: `(b, h, w, c)`.
        reference: `(b, h, w, c)` or `(1, h, w, c)`.

    Raises:
        NodeInputError: another rank, size or batch, nothing in it, or a value that is not finite.
    """
    for name, batch in (("image", image), ("reference", reference)):
        if batch.ndim != 4 or batch.numel() == 0:
            raise input_error(where, name, tuple(batch.shape), "a batch (b, h, w, c) that is not empty", "Connect an IMAGE.")
        if not bool(torch.isfinite(batch).all()):
            raise input_error(where, name, "values that are not finite", "finite values", "Find the node that makes NaN or infinity.")
    if image.shape[1:] != reference.shape[1:]:
        allowed = f"the height, width and channels of image, {tuple(image.shape[1:])}"
        remedy = "Scale or crop one of the two, for example with Upscale Image."
        raise input_error(where, "reference", tuple(reference.shape[1:]), allowed, remedy)
    if reference.shape[0] not in (1, image.shape[0]):
        remedy = "Give one reference for all, or one a picture."
        raise input_error(where, "reference", f"a batch of {len(reference)}", f"a batch of 1 or {len(image)}", remedy)
    image, reference = (batch.detach().to("cpu", torch.float64) for batch in (image, reference))
    return image, reference.expand_as(image)


def region_weights(mask: Tensor, batch: int, size: tuple[int, int], where: str = "metrics") -> Tensor:
    """A mask as the weight of every pixel, `(b, h, w)` float64 in 0…1.

    Args:
        mask: `(h, w)`, `(1, h, w)` or `(b, h, w)`, 0…1.

    Raises:
        NodeInputError: another size or batch, or values outside 0…1.
    """
    if mask.ndim == 2:
        mask = mask.unsqueeze(0)
    if mask.ndim != 3 or tuple(mask.shape[1:]) != tuple(size) or mask.shape[0] not in (1, batch):
        allowed = f"(1 or {batch}, {size[0]}, {size[1]})"
        raise input_error(where, "mask", tuple(mask.shape), allowed, "Make the mask from the picture that is measured.")
    mask = mask.detach().to("cpu", torch.float64)
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise input_error(where, "mask", "values outside 0 to 1", "values from 0 to 1", "Connect a MASK output.")
    return mask.expand(batch, -1, -1)


def _averaged(values: Tensor, weights: Tensor | None, where: str) -> Tensor:
    """Mean of `(b, h, w)` over each picture, weighted: `(b,)`."""
    if weights is None:
        return values.mean(dim=(1, 2))
    total = weights.sum(dim=(1, 2))
    if not bool((total > 0).all()):
        got = f"a mask without a pixel in picture {1 + int((total <= 0).nonzero()[0])}"
        remedy = "Draw a larger mask; SSIM needs pixels further from the edge than half its window."
        raise input_error(where, "mask", got, "a region that holds pixels of every picture", remedy)
    return (values * weights).sum(dim=(1, 2)) / total


def mse(image: Tensor, reference: Tensor, mask: Tensor | None = None, where: str = "metrics") -> Tensor:
    """Mean squared error of each picture, `(b,)`; arguments as in `figures`."""
    image, reference = picture_pair(image, reference, where)
    weights = None if mask is None else region_weights(mask, len(image), image.shape[1:3], where)
    return _averaged((image - reference).square().mean(-1), weights, where)


def psnr(image: Tensor, reference: Tensor, mask: Tensor | None = None, data_range: float = 1.0, where: str = "metrics") -> Tensor:
    """Peak signal to noise ratio of each picture in dB, `(b,)`; infinite where picture and reference are equal."""
    return _decibels(mse(image, reference, mask, where), data_range)


def _decibels(error: Tensor, data_range: float) -> Tensor:
    return 10 * torch.log10(data_range**2 / error)  # 1/0 is infinity, which is the right figure for equal pictures


def ssim_map(image: Tensor, reference: Tensor, window: str = "gaussian", data_range: float = 1.0, where: str = "metrics") -> Tensor:
    """SSIM at every centre whose window lies inside the picture, averaged over channels: `(b, h − 2m, w − 2m)`, m the window's margin.

    Raises:
        NodeInputError: unknown window, or a picture smaller than it.
    """
    if window not in WINDOWS:
        raise input_error(where, "window", window, ", ".join(WINDOWS), "Pick one of them.")
    kernel = WINDOWS[window]
    image, reference = picture_pair(image, reference, where)
    size = len(kernel.taps)
    if min(image.shape[1:3]) < size:
        got = f"{image.shape[2]}×{image.shape[1]} pixels"
        raise input_error(where, "image", got, f"at least {size}×{size} pixels for the {window} window", "Enlarge both pictures.")
    # One picture after the other: eight maps of a large batch at once would outgrow the pictures by an order of magnitude.
    return torch.stack([_ssim_planes(a.movedim(-1, 0), b.movedim(-1, 0), kernel, data_range).mean(0) for a, b in zip(image, reference)])


def _ssim_planes(x: Tensor, y: Tensor, kernel: Window, data_range: float) -> Tensor:
    """SSIM of each channel: `(c, h, w)` twice → `(c, h − 2m, w − 2m)`."""
    ux, uy = _windowed(x, kernel), _windowed(y, kernel)
    vx = kernel.covariance * (_windowed(x * x, kernel) - ux * ux)
    vy = kernel.covariance * (_windowed(y * y, kernel) - uy * uy)
    vxy = kernel.covariance * (_windowed(x * y, kernel) - ux * uy)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return (2 * ux * uy + c1) * (2 * vxy + c2) / ((ux * ux + uy * uy + c1) * (vx + vy + c2))


def _windowed(planes: Tensor, kernel: Window) -> Tensor:
    """Weighted mean under the window: `(c, h, w)` → `(c, h − 2m, w − 2m)`.

    A sum of shifted slices, an axis at a time: on the CPU in float64 several times as fast as torch's convolution.
    """
    for axis in (1, 2):
        size = planes.shape[axis] - 2 * kernel.margin
        total = planes.narrow(axis, 0, size) * kernel.taps[0]
        for offset, tap in enumerate(kernel.taps[1:], start=1):
            total.add_(planes.narrow(axis, offset, size), alpha=tap)
        planes = total
    return planes


def ssim(
    image: Tensor, reference: Tensor, mask: Tensor | None = None, window: str = "gaussian", data_range: float = 1.0, where: str = "metrics",
) -> Tensor:
    """Mean structural similarity of each picture, `(b,)`, 1 for equal pictures; a mask weighs the centres of the windows."""
    values = ssim_map(image, reference, window, data_range, where)
    weights = None
    if mask is not None:
        margin = WINDOWS[window].margin
        weights = region_weights(mask, len(image), tuple(image.shape[1:3]), where)[:, margin:-margin, margin:-margin]
    return _averaged(values, weights, where)


def figures(
    image: Tensor, reference: Tensor, mask: Tensor | None = None, window: str = "gaussian", data_range: float = 1.0, where: str = "metrics",
) -> Figures:
    """MSE, PSNR and SSIM of each picture.

    Args:
        image: `(b, h, w, c)`, 0…data_range.
        reference: the same shape, or a batch of one for all pictures.
        mask: `(h, w)`, `(1, h, w)` or `(b, h, w)` in 0…1, the weight of each pixel; None is the whole picture.
        window: "gaussian" or "uniform", see the head of this file.
        data_range: largest minus smallest value a pixel can have.
        where: named in errors.
    """
    error = mse(image, reference, mask, where)
    share = torch.ones_like(error) if mask is None else region_weights(mask, len(image), tuple(image.shape[1:3]), where).mean(dim=(1, 2))
    return Figures(error, _decibels(error, data_range), ssim(image, reference, mask, window, data_range, where), share)


def relative_errors(found: Tensor, exact: Tensor) -> Tensor:
    """‖found − exact‖/‖exact‖ of each latent of a batch, (b, …) twice → (b,)."""
    return (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
