"""`comfy_api.v0_0_2` and `comfy_api.latest`: the part of the versioned interface that V1 nodes use, progress reports."""

from __future__ import annotations

from typing import Any

from ...execution.progress import get_executing_context
from ...utils import ProgressBar

__all__ = ["ComfyAPI", "ComfyAPISync"]


def _set_progress(value: float, max_value: float, node_id: str | None, preview_image: Any, ignore_size_limit: bool) -> None:
    context = get_executing_context()
    node_id = node_id or (context.node_id if context else None)
    if node_id is None:
        raise ValueError("set_progress: node_id is missing, and no node is executing here; give node_id")
    preview = None
    if preview_image is not None:
        if not hasattr(preview_image, "save"):
            raise ValueError("set_progress: preview_image must be a PIL image on this host")
        preview = ("PNG", preview_image, None if ignore_size_limit else 512)
    ProgressBar(max_value, node_id=node_id).update_absolute(value, max_value, preview)


class _Execution:
    async def set_progress(
        self, value: float, max_value: float, node_id: str | None = None, preview_image: Any = None, ignore_size_limit: bool = False
    ) -> None:
        """Report how far a node is; `node_id` is only needed outside of its call."""
        _set_progress(value, max_value, node_id, preview_image, ignore_size_limit)


class _ExecutionSync:
    def set_progress(
        self, value: float, max_value: float, node_id: str | None = None, preview_image: Any = None, ignore_size_limit: bool = False
    ) -> None:
        """Like the asynchronous one."""
        _set_progress(value, max_value, node_id, preview_image, ignore_size_limit)


class ComfyAPI:
    """For asynchronous nodes: `await api.execution.set_progress(…)`."""

    VERSION = "0.0.2"
    STABLE = False

    def __init__(self) -> None:
        self.execution = _Execution()


class ComfyAPISync:
    """For ordinary nodes: `api.execution.set_progress(…)`."""

    VERSION = "0.0.2"
    STABLE = False

    def __init__(self) -> None:
        self.execution = _ExecutionSync()
