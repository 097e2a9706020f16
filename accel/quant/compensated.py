"""Rounding that makes up for its own errors, on the grids that a weight is stored with.

"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323:

    min over codes of ‖X·(W − Ŵ)ᵀ‖²,   X rows of what enters the layer, in the basis of the codes
    for every column j in turn:   e = (w_j − ŵ_j)/U_jj,   w_i ← w_i − e·U_ji for every i > j
    UᵀU = H⁻¹, U upper,   H = XᵀX/r + DAMPING·mean(diag)·1

What a column loses is taken up by the columns that are still to come, as far as the calibration has them move together. Grids and scales
stay those of the nearest codes (theirs: uniform, a grid a group), so that bytes and the integer product are the same; here the grid may be
twin-log, whose steps are widest where weights are largest. Their damping is 0.01; ours is for the few rows of a short calibration.
"""

from __future__ import annotations

import torch

from .stored import StoredWeight

__all__ = ["compensated"]

DAMPING = 0.2
BLOCK = 64  # columns whose errors wait before they reach those behind the block: one product in place of many


def compensated(stored: StoredWeight, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Codes, as `stored` keeps them, of weight (n, k) in the basis of the codes; rows (r, k) of inputs in the same basis.

    Rows that are all zero tell nothing: the codes stay what they are.
    """
    upper = _propagation(rows)
    if upper is None:
        return stored.codes
    left = weight.float().clone()
    codes = torch.empty(weight.shape, dtype=torch.int8 if stored.layout == "int8" else torch.uint8, device=weight.device)
    for start in range(0, stored.columns, BLOCK):
        stop = min(start + BLOCK, stored.columns)
        errors = torch.empty(len(left), stop - start, device=left.device)
        for j in range(start, stop):
            codes[:, j], numbers = stored.nearest_in_column(left[:, j], j)
            errors[:, j - start] = error = (left[:, j] - numbers) / upper[j, j]
            left[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return stored.as_kept(codes)


def _propagation(rows: torch.Tensor) -> torch.Tensor | None:
    """U (k, k) float32; None where no row has anything in it."""
    x = rows.double()
    together = x.T @ x / max(len(x), 1)
    mean = together.diagonal().mean()
    if not float(mean) > 0:
        return None
    together.diagonal().add_(DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(together))
    return torch.linalg.cholesky(inverse, upper=True).float()
