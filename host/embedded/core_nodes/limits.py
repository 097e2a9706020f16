"""Sizes that this machine cannot hold are refused before memory is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ....errors import input_error

__all__ = ["refuse_beyond_memory"]

GIB = 1024**3


def refuse_beyond_memory(node: str, inputs: str, got: object, shape: Sequence[int], bytes_per_value: int = 4) -> None:
    """Raise NodeInputError if a tensor of `shape` is larger than the memory that is free now.

    Args:
        node, inputs: as the user sees them; `inputs` names all that decide the size.
        got: the offending values.
    """
    from ..model_management import system_memory

    needed = math.prod(shape) * bytes_per_value
    _, free = system_memory()
    if needed > free:
        allowed = f"what fits in the {free / GIB:.1f} GiB of free memory; this takes {needed / GIB:.1f} GiB"
        raise input_error(node, inputs, got, allowed, "Choose a smaller size or batch.")
