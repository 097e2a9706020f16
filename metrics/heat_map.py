"""Where two pictures differ: the difference as a picture, on a colour scale whose brightness rises with the value."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import input_error
from .fidelity import WINDOWS, picture_pair, ssim_map

__all__ = ["QUANTITIES", "difference", "heat_map"]

QUANTITIES = ("absolute", "signed", "structure")

# Colours at equal distances from 0 to 1; luminance rises by equal steps, so that a print in grey still reads.
_RISING = ((0, 0, 8), (58, 12, 92), (146, 30, 98), (220, 72, 50), (250, 150, 24), (255, 252, 190))
_SIGNED = ((34, 94, 200), (246, 246, 246), (198, 40, 40))
# The luminance weights of Rec. 709.
_LUMINANCE = (0.2126, 0.7152, 0.0722)


def difference(image: Tensor, reference: Tensor, quantity: str = "absolute", where: str = "metrics") -> Tensor:
    """What a heat map shows, `(b, h, w)` float64.

    Args:
        image, reference: `(b, h, w, 3)`; a single reference serves all pictures.
        quantity: "absolute" is the mean of |image − reference| over the channels, 0…1; "signed" the difference in luminance,
            −1…1; "structure" 1 − SSIM, 0…2, at the edge the value of the nearest whole window.
    """
    if quantity == "structure":
        margin = WINDOWS["gaussian"].margin
        return pad(1 - ssim_map(image, reference, where=where), (margin,) * 4, mode="replicate")
    image, reference = picture_pair(image, reference, where)
    if quantity == "absolute":
        return (image - reference).abs().mean(-1)
    if quantity == "signed":
        return (image - reference) @ torch.tensor(_LUMINANCE, dtype=image.dtype)
    raise input_error(where, "quantity", quantity, ", ".join(QUANTITIES), "Pick one of them.")


def heat_map(values: Tensor, full_scale: float = 0.0, signed: bool = False) -> tuple[Tensor, float]:
    """Values as colours.

    Args:
        values: `(b, h, w)`.
        full_scale: the value that gets the last colour; 0 takes the largest magnitude of the batch.
        signed: blue, white, red for −full_scale … full_scale, else black to pale yellow for 0 … full_scale.

    Returns:
        pictures `(b, h, w, 3)` float32 in 0…1, and the full scale that was used.
    """
    scale = full_scale or float(values.abs().max()) or 1.0  # equal pictures have no largest difference; any scale shows 0
    unit = (values / scale).to(torch.float32)
    unit = ((unit + 1) / 2 if signed else unit).clamp(0, 1)
    stops = torch.tensor(_SIGNED if signed else _RISING, dtype=torch.float32) / 255  # (k, 3)
    place = unit * (len(stops) - 1)
    low = place.floor().long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[low], stops[low + 1], (place - low).unsqueeze(-1)), scale
