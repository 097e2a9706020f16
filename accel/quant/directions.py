"""The directions along which a layer's inputs are longest, kept beside its codes in floating point.

    z = x·(B·m²)ᵀ        x' = x − z·B        y = round(x'·m·R)·Ŵ'ᵀ + z·Pᵀ + bias

m and R are the layer's smoothing and rotation, Ŵ' its codes' numbers. Rows of B·m·R are orthonormal: the first principal directions of what
enters the layer, in the basis of the codes. Along them neither activations nor weights are rounded,

    P = Ŵ'·(B·m·R)ᵀ + D,        D = (W' − Ŵ')·(B·m·R)ᵀ

so that both roundings act on x' alone, which is shorter than x. "ResQ", arXiv 2412.14363, keeps an eighth of the channels' directions at 8
bits where the others have 4, and shows that principal directions are those to keep; here they are few and in floating point. What is
stored is B and D; P follows from the codes, so that a LoRA that moves codes moves it as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rotation import Rotation

__all__ = ["DTYPE", "MOST", "Directions", "principal_directions"]

DTYPE = torch.bfloat16  # of B and D; what B's rounding leaves out is left in x', and D is small beside P
MOST = 256
TINY = 1e-12


@dataclass(frozen=True)
class Directions:
    """down: B (r, k). residual: D (n, r). Both DTYPE."""

    down: torch.Tensor
    residual: torch.Tensor


def principal_directions(rows: torch.Tensor, count: int, rotation: Rotation, smooth: torch.Tensor | None) -> torch.Tensor | None:
    """B (at most `count`, k) of rows (r, k) of inputs in the basis of the codes; None where there is nothing in the rows."""
    rows = rows.float()
    narrow = rows.shape[1] < rows.shape[0]  # channels or rows, the fewer: large models have more channels than rows are kept
    lengths, found = torch.linalg.eigh(rows.T @ rows if narrow else rows @ rows.T)  # ascending
    kept = lengths[-count:] > TINY * lengths[-1].clamp(min=TINY)
    if not bool(kept.any()):
        return None
    found = found[:, -count:][:, kept].T.flip(0)
    found = found if narrow else torch.nn.functional.normalize(found @ rows, dim=1)
    back = rotation.undo(found)
    return (back if smooth is None else back / smooth).to(DTYPE)
