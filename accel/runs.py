"""The state of one sampling where every model call of it finds it: in the transformer options that the host hands on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["held_in_options"]


@contextmanager
def held_in_options(guider: Any, key: str, run: Any) -> Iterator[dict[str, Any]]:
    """Put `run` under `key` into the options of `guider`'s calls, which it gives. What a sampling around this one had there comes back."""
    options = guider.model_options.setdefault("transformer_options", {})
    outer = options.get(key)
    options[key] = run
    try:
        yield options
    finally:
        if outer is None:
            options.pop(key, None)
        else:
            options[key] = outer
