"""One line at the bottom of a terminal: which node runs and how far it is. Fed with the messages of a run, ours or a server's."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from .failures import node_name

__all__ = ["ProgressLine", "LogAbove"]

FRAMES_PER_SECOND = 20
BAR_WIDTH = 24
CLEAR_LINE = "\r\x1b[2K"


class ProgressLine:
    """Draws while used in a `with` block; silent where the stream is no terminal."""

    def __init__(self, prompt: Mapping[str, Any], stream: TextIO | None = None):
        self._prompt = prompt
        self._stream = stream or sys.stderr
        self._visible = self._stream.isatty()
        self._node: str | None = None
        self._node_started = 0.0
        self._drawn_at = 0.0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc) -> None:
        self.clear()

    def __call__(self, event: str, data: Mapping[str, Any]) -> None:
        """Take a message of the run by its name in ComfyUI's websocket."""
        if event == "executing" and data.get("node") is not None:
            self._node, self._node_started = str(data.get("display_node") or data["node"]), time.monotonic()
            self._draw(f"{node_name(self._node, self._prompt)} …")
        elif event == "progress" and data.get("max"):
            value, total = data["value"], data["max"]
            if value < total and time.monotonic() - self._drawn_at < 1 / FRAMES_PER_SECOND:
                return
            self._draw(f"{node_name(str(data.get('node') or self._node), self._prompt)} {self._bar(value, total)}")

    def _bar(self, value: float, total: float) -> str:
        share = min(max(value / total, 0.0), 1.0)
        filled = round(share * BAR_WIDTH)
        seconds = time.monotonic() - self._node_started
        speed = f"  {value / seconds:.1f}/s" if value and seconds > 0 else ""
        return f"{'━' * filled}{'╌' * (BAR_WIDTH - filled)} {value:g}/{total:g}{speed}"

    def _draw(self, text: str) -> None:
        if self._visible:
            self._drawn_at = time.monotonic()
            self._write(CLEAR_LINE + text[: shutil.get_terminal_size().columns - 1])

    def clear(self) -> None:
        if self._visible and self._drawn_at:
            self._write(CLEAR_LINE)

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "ascii"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


class LogAbove(logging.StreamHandler):
    """Log lines stand above the progress line instead of being written into it."""

    def __init__(self, line: ProgressLine):
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line.clear()
        super().emit(record)
