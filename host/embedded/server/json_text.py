"""JSON as it leaves the server: always valid, whatever a node put into its results."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["dumps", "nested_deeper_than"]


def dumps(value: Any) -> str:
    """Encode `value`. Numbers that JSON lacks (NaN, infinities) become null, objects it lacks their `str`.

    The quick path of the C encoder is tried first; the slow copy is made only where it refuses.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)


def nested_deeper_than(value: Any, limit: int) -> bool:
    """Whether lists and objects stand more than `limit` deep in each other; walks without recursion."""
    layer = [value]
    for _ in range(limit + 1):
        layer = [item for item in layer if isinstance(item, (dict, list))]
        if not layer:
            return False
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, dict) else item)]
    return True
