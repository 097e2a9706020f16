"""The figures of pictures as text: one table for every node and bench, so that reports read alike."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .fidelity import WINDOWS, Figures, figures, region_weights

__all__ = ["REGIONS", "figure_table", "measured_regions"]

REGIONS = ("mask", "outside", "whole")


def measured_regions(
    image: Tensor, reference: Tensor, mask: Tensor | None, window: str, wanted: str = "whole", where: str = "metrics",
) -> dict[str, Figures]:
    """The figures of the whole picture, of the mask and of what lies outside it.

    Args:
        image, reference: `(b, h, w, c)`; mask: `(1 or b, h, w)` or None.
        wanted: the region that has to be there; another one that holds no pixel of some picture is left out.

    Raises:
        NodeInputError: as `figures`, or when the wanted region is empty.
    """
    found = {"whole": figures(image, reference, None, window, where=where)}
    if mask is None:
        return found
    inside = region_weights(mask, len(image), tuple(image.shape[1:3]), where)
    margin = WINDOWS[window].margin
    for name, weights in (("mask", inside), ("outside", 1 - inside)):
        if name == wanted or bool((weights[:, margin:-margin, margin:-margin].sum(dim=(1, 2)) > 0).all()):
            found[name] = figures(image, reference, weights, window, where=where)
    return found


def figure_table(regions: Mapping[str, Figures], window: str) -> str:
    """A line a picture and region, and a line of means a region where there are several pictures."""
    lines = [f"region   picture   share         MSE    PSNR dB     SSIM ({window} window)"]
    for name, found in regions.items():
        rows = [(str(number), *values) for number, values in enumerate(_rows(found), start=1)]
        if len(rows) > 1:
            rows.append(("mean", *(float(values.mean()) for values in (found.share, found.mse, found.psnr, found.ssim))))
        lines += [f"{name:8s} {who:>7s} {share:7.1%} {mse:11.3e} {psnr:10.3f} {ssim:8.4f}" for who, share, mse, psnr, ssim in rows]
    return "\n".join(lines)


def _rows(found: Figures):
    return zip(found.share.tolist(), found.mse.tolist(), found.psnr.tolist(), found.ssim.tolist())
