"""How much there is in each region of a picture: the grey-level entropy by which D²iT (Jia et al., arXiv 2504.09454) chooses its grains.

A region of S × S values x_i in 0…1 has, over P bins b_j spread evenly,

    p(b_j) ∝ Σ_i exp(−(x_i − b_j)²/2σ²),    E = −Σ_j p(b_j) log p(b_j)

A flat region has the least entropy, evenly spread values have nearly log P. Regions above a quantile of the entropies are fine, the others
coarse. In D²iT a trained transformer draws from that map; here it says where region-adaptive sampling computes at every step.

Regions at an edge have the values that are there. The paper's summaries do not give the range of x: σ = 0.01 is read as for 0…1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ...errors import input_error

__all__ = ["density", "fine_regions", "region_means"]

_CHUNK = 1 << 24  # differences of a value and a bin held at once
_FLOOR = -80.0  # exponents below it would make numbers so small that the processor slows down; e^−80 changes no entropy


def _regions(maps: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, h, w) → values (b, rows, columns, side²), NaN where there are none."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (0, -width % side, 0, -height % side), value=math.nan)
    return padded.unflatten(-2, (-1, side)).unflatten(-1, (-1, side)).transpose(-3, -2).flatten(-2)


def density(maps: torch.Tensor, side: int, sigma: float = 0.01, bins: int = 0) -> torch.Tensor:
    """Entropies (b, rows, columns) in nats of maps (b, h, w) in 0…1. side: of a region in values; bins: 0 for side².

    Raises: ValueError for a side or number of bins below 2, or a sigma that is not positive.
    """
    bins = bins or side * side
    if side < 2 or bins < 2 or not sigma > 0.0:
        raise ValueError(f"side {side} and bins {bins} must be 2 or more, sigma {sigma} above 0")
    values = _regions(maps.float(), side)
    places = torch.linspace(0.0, 1.0, bins, device=maps.device)
    rows = values.reshape(-1, side * side)
    found = [_entropy(part, places, sigma) for part in rows.split(max(1, _CHUNK // (side * side * bins)))]
    return torch.cat(found).reshape(values.shape[:-1])


def _entropy(values: torch.Tensor, places: torch.Tensor, sigma: float) -> torch.Tensor:
    """(r, n) → (r)."""
    weights = values[:, :, None] - places  # (r, n, bins)
    weights.mul_(weights).mul_(-0.5 / sigma**2).clamp_(min=_FLOOR).exp_()
    shares = weights.nansum(dim=1) if bool(values.isnan().any()) else weights.sum(dim=1)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(dim=-1)


def region_means(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Means (b, rows, columns) of maps (b, h, w) over regions of side × side values."""
    return _regions(maps.float(), side).nanmean(dim=-1)


def fine_regions(scores: torch.Tensor, rule: str, value: float, smooth: int = 0, where: str = "grain map") -> torch.Tensor:
    """Which regions are fine, (b, rows, columns) bool.

    rule: "share": the `value` of them with the highest scores, exactly, of equal scores the first; "threshold": scores above `value`.
    smooth: passes of a majority filter over 3 × 3 regions, which move the share.

    Raises: NodeInputError for another rule or a value outside 0 to 1.
    """
    if rule not in ("share", "threshold"):
        raise input_error(where, "mode", rule, "share, threshold", "Choose one of these.")
    if not 0.0 <= value <= 1.0:
        raise input_error(where, "fine_share" if rule == "share" else "threshold", value, "0 to 1", "Enter 0.5.")
    if rule == "threshold":
        fine = scores > value
    else:
        flat = scores.flatten(1)
        order = flat.argsort(dim=1, descending=True, stable=True)
        fine = torch.zeros_like(flat, dtype=torch.bool)
        fine.scatter_(1, order[:, : round(value * flat.shape[1])], True)
        fine = fine.view(scores.shape)
    for _ in range(smooth):
        padded = F.pad(fine[:, None].float(), (1, 1, 1, 1), mode="replicate")
        fine = F.avg_pool2d(padded, 3, stride=1)[:, 0] > 0.5
    return fine


def enlarged(regions: torch.Tensor, side: int, size: tuple[int, int]) -> torch.Tensor:
    """Values of regions (b, rows, columns) on their values' places, (b, h, w)."""
    maps = regions.float().repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)
    return maps[..., : size[0], : size[1]]
