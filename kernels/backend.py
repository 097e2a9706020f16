"""Whether an operation goes through its Triton kernel: one rule for all of them."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["BACKENDS", "takes_triton"]

BACKENDS = ("auto", "torch", "triton")


def takes_triton(operation: str, backend: str, wanted: bool, unfit: Callable[[], str]) -> bool:
    """auto: where it is `wanted` and fits; triton: always.

    Args:
        wanted: whether the kernel is the better path for these tensors: they are on a CUDA device.
        unfit: why the kernel cannot be used for them, an empty string where it can; not asked where torch is chosen.

    Raises: ValueError for a backend that is none of BACKENDS, and for triton where the kernel cannot be used.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{operation}: backend '{backend}'; allowed: {', '.join(BACKENDS)}")
    if backend == "torch" or backend == "auto" and not wanted:
        return False
    reason = unfit()
    if reason and backend == "triton":
        raise ValueError(f"{operation}: backend 'triton' {reason}")
    return not reason
