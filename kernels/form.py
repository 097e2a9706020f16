"""What a kernel is compiled from without a device: one form of it, with the types and constants of a real launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Form"]


@dataclass(frozen=True)
class Form:
    """types: of the arguments that are no constants, as Triton names them ("*bf16", "i32"). constants: the constexpr ones.

    options: num_warps and num_stages. aligned: arguments that are multiples of 16 at a launch; pointers always are, as torch allocates.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    aligned: tuple[str, ...] = ()
