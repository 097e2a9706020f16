"""How a host keeps one of our small modules on its device. The tiny room never imports a host: it is handed this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["ALONE", "Placement"]


def _stay(patcher: Any) -> None:
    """Without a host a module is where it was made."""


@dataclass(frozen=True)
class Placement:
    """Where a module lives and who moves it.

    patcher: the host's ModelPatcher around the module, which LoRA-like nodes patch; None without a host.
    load: called with the patcher before the module runs, so that the host can move and patch it.
    output_device: where results rest (the host's intermediate device).
    """

    patcher: Any = None
    load: Callable[[Any], object] = _stay
    output_device: torch.device = torch.device("cpu")

    def cloned(self) -> Placement:
        patcher = None if self.patcher is None else self.patcher.clone()
        return Placement(patcher, self.load, self.output_device)


ALONE = Placement()  # without a host
