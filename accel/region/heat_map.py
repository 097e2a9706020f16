"""Pictures of which tokens were computed: a map of shares, and a sheet of all steps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .report import RegionRecord

__all__ = ["share_map", "step_sheet"]

# Black over violet, red and orange to pale yellow, falling in hue and rising in lightness, so that it reads in grey too.
_RAMP = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.56, 0.04), (0.99, 1.0, 0.64))


def _planes(tokens: torch.Tensor, record: RegionRecord) -> torch.Tensor:
    """Values of tokens (b, n) as (b·frames, rows, columns)."""
    return tokens.float().reshape(-1, *record.sides[-2:])


def _pixels(record: RegionRecord, longer: int) -> tuple[int, int]:
    rows, columns = record.sides[-2:]
    scale = longer / max(rows, columns)
    return max(1, round(rows * scale)), max(1, round(columns * scale))


def _coloured(shares: torch.Tensor) -> torch.Tensor:
    """0 to 1 in (b, h, w) → colours (b, h, w, 3)."""
    ramp = torch.tensor(_RAMP)
    place = shares.clamp(0, 1) * (len(_RAMP) - 1)
    low = place.floor().long().clamp(max=len(_RAMP) - 2)
    part = (place - low).unsqueeze(-1)
    return ramp[low] * (1 - part) + ramp[low + 1] * part


def share_map(record: RegionRecord, longer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(IMAGE (b, h, w, 3), MASK (b, h, w)): share of the active steps in which each token was computed; all 1 where none was active."""
    counts, active = record.counts()
    shares = counts / active if active else torch.ones_like(counts)
    mask = F.interpolate(_planes(shares, record).unsqueeze(1), size=_pixels(record, longer), mode="nearest")[:, 0]
    return _coloured(mask), mask


def step_sheet(record: RegionRecord, longer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(IMAGE, MASK) of all active steps in reading order, computed tokens white, at most `longer` pixels a side."""
    if not record.masks:
        return share_map(record, longer)
    planes = torch.stack([_planes(mask, record) for _, mask in record.masks], dim=1)  # (b, steps, rows, columns)
    planes = F.pad(planes, (0, 1, 0, 1), value=0.35)
    batch, steps, rows, columns = planes.shape
    across = math.ceil(math.sqrt(steps * rows / columns))
    down = math.ceil(steps / across)
    planes = F.pad(planes, (0, 0, 0, 0, 0, across * down - steps), value=0.35)
    sheet = planes.reshape(batch, down, across, rows, columns).permute(0, 1, 3, 2, 4).reshape(batch, 1, down * rows, across * columns)
    scale = max(1, longer // max(sheet.shape[-2:]))
    sheet = sheet.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)[:, 0]
    return sheet.unsqueeze(-1).expand(-1, -1, -1, 3).contiguous(), sheet
