"""Deterministic pictures from whole numbers, the same in torch here and in numpy where the recorded figures were made."""

from __future__ import annotations

import torch

__all__ = ["blob", "noisy", "shifted", "textured"]


def _axes(height: int, width: int):
    y = torch.arange(height, dtype=torch.float64).reshape(-1, 1, 1)
    x = torch.arange(width, dtype=torch.float64).reshape(1, -1, 1)
    c = torch.arange(3, dtype=torch.float64).reshape(1, 1, -1)
    return y, x, c


def textured(height: int = 40, width: int = 52) -> torch.Tensor:
    """Whole numbers modulo 256 over 255, different in every channel: (h, w, 3) float64."""
    y, x, c = _axes(height, width)
    return ((7 * x * x + 13 * y * x + 3 * y * y * (c + 1) + 29 * c) % 256) / 255


def blob(height: int = 40, width: int = 52) -> torch.Tensor:
    """A smooth bump on a ramp: (h, w, 3) float64."""
    y, x, c = _axes(height, width)
    bump = 1 / (1 + ((x - width / 2) ** 2 + (y - height / 3) ** 2) / (40 + 20 * c))
    return 0.2 + 0.3 * x / width + 0.4 * bump


def noisy(picture: torch.Tensor, amount: float = 0.2) -> torch.Tensor:
    return (picture + amount * (textured(*picture.shape[:2]) - 0.5)).clamp(0, 1)


def shifted(picture: torch.Tensor) -> torch.Tensor:
    return picture.roll((1, 2), (0, 1))
