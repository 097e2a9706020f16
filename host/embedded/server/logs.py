"""The last lines of the process's output, for the interface's terminal panel."""

from __future__ import annotations

import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any, TextIO

__all__ = ["LogBuffer"]

CAPACITY = 300


class _Tee:
    """A text stream that also tells a listener what is written."""

    def __init__(self, stream: TextIO, listener: Callable[[str], None]):
        self._stream = stream
        self._listener = listener

    def write(self, text: str) -> int:
        self._listener(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class LogBuffer:
    """Keeps what stdout and stderr showed last; `with` installs it and takes it away again.

    `added` is called, from whichever thread wrote, after new text came in.
    """

    def __init__(self) -> None:
        self.added: Callable[[], None] = lambda: None
        self._entries: deque[dict[str, str]] = deque(maxlen=CAPACITY)
        self._unsent: deque[dict[str, str]] = deque(maxlen=CAPACITY)
        self._lock = threading.Lock()
        self._before: tuple[TextIO, TextIO] | None = None

    def __enter__(self) -> LogBuffer:
        self._before = (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = _Tee(sys.stdout, self.write), _Tee(sys.stderr, self.write)
        return self

    def __exit__(self, *exc) -> None:
        sys.stdout, sys.stderr = self._before

    def write(self, text: str) -> None:
        if not text:
            return
        entry = {"t": datetime.now().isoformat(), "m": text}
        with self._lock:
            # A progress bar rewrites its line: keep its last state only.
            if text.startswith("\r") and self._entries and not self._entries[-1]["m"].endswith("\n"):
                self._entries.pop()
            self._entries.append(entry)
            self._unsent.append(entry)
        self.added()

    def entries(self) -> list[dict[str, str]]:
        with self._lock:
            return list(self._entries)

    def take_unsent(self) -> list[dict[str, str]]:
        """What came in since the last call."""
        with self._lock:
            unsent = list(self._unsent)
            self._unsent.clear()
            return unsent

    @staticmethod
    def size() -> dict[str, int]:
        columns, rows = shutil.get_terminal_size()
        return {"cols": columns, "rows": rows}
