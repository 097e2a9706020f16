"""Waiting, running and finished prompts, shared by the event loop and the worker thread.

Every prompt is turned into JSON text once, when it is put, and every finished one once more, in the worker. Listing the
queue or the history then joins texts: no prompt is walked while a worker may hold it, and the event loop never encodes.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .json_text import dumps
from .options import Limits

__all__ = ["Job", "Finished", "PromptQueue", "QueueFull", "DuplicatePrompt", "DuplicateNumber"]

# What the interface sends for paid nodes of ComfyUI's vendor: given to the nodes, never shown or kept.
SECRET_KEYS = ("auth_token_comfy_org", "api_key_comfy_org")


class QueueFull(ValueError):
    """The queue holds as many prompts, or as many bytes of them, as it may."""


class DuplicatePrompt(ValueError):
    """The prompt_id is waiting, running or in the history already."""


class DuplicateNumber(ValueError):
    """Another waiting prompt has this number, so that their order would be undefined."""


@dataclass(frozen=True, eq=False)
class Job:
    """One accepted prompt. `number` orders the queue (lower first), `order` is the arrival and breaks ties."""

    number: float
    order: int
    prompt_id: str
    prompt: dict[str, Any]
    extra_data: dict[str, Any]
    outputs: tuple[str, ...]
    create_time: int
    text: str = field(repr=False)

    @property
    def client_id(self) -> str | None:
        return self.extra_data.get("client_id")


@dataclass(frozen=True, eq=False)
class Finished:
    """One history entry: its JSON text as GET /history answers it, and what GET /api/jobs lists of it."""

    prompt_id: str
    text: str = field(repr=False)
    summary: dict[str, Any] = field(repr=False)


class PromptQueue:
    """A bounded priority queue with a bounded history. All methods may be called from any thread.

    Args:
        limits: how many prompts and bytes are kept.
        changed: called after every change, outside the lock, from the thread that made it.
    """

    def __init__(self, limits: Limits, changed: Callable[[], None] = lambda: None):
        self._limits = limits
        self._changed = changed
        self._lock = threading.RLock()
        self._not_empty = threading.Condition(self._lock)
        self._heap: list[tuple[float, int, Job]] = []
        self._running: Job | None = None
        self._history: dict[str, Finished] = {}
        self._waiting_bytes = 0
        self._history_bytes = 0
        self._arrivals = itertools.count()
        self._next_number = 0
        self._flags: dict[str, bool] = {}
        self._closed = False

    # -- putting and taking

    def put(
        self, prompt_id: str, prompt: dict, extra_data: dict, outputs: list[str], number: float | None = None, front: bool = False
    ) -> Job:
        """Append a prompt; `front` puts it before every numbered one, `number` at its own place.

        Raises:
            QueueFull, DuplicatePrompt, DuplicateNumber: nothing was queued.
        """
        shown = {key: value for key, value in extra_data.items() if key not in SECRET_KEYS}
        create_time = int(time.time() * 1000)
        shown["create_time"] = create_time
        tail = f"{dumps(prompt_id)}, {dumps(prompt)}, {dumps(shown)}, {dumps(list(outputs))}]"
        with self._not_empty:
            self._refuse(prompt_id, number, len(tail))
            if number is None:
                number = -self._next_number if front else self._next_number
                self._next_number += 1
            text = f"[{dumps(number)}, {tail}"
            job = Job(
                number,
                next(self._arrivals),
                prompt_id,
                prompt,
                {**extra_data, "create_time": create_time},
                tuple(outputs),
                create_time,
                text,
            )
            heapq.heappush(self._heap, (job.number, job.order, job))
            self._waiting_bytes += len(text)
            self._not_empty.notify()
        self._changed()
        return job

    def _refuse(self, prompt_id: str, number: float | None, size: int) -> None:
        if self.knows(prompt_id):
            raise DuplicatePrompt(prompt_id)
        if number is not None and any(waiting == number for waiting, _, _ in self._heap):
            raise DuplicateNumber(number)
        if len(self._heap) >= self._limits.queue_length:
            raise QueueFull(f"{self._limits.queue_length} prompts are waiting already")
        if self._waiting_bytes + size > self._limits.queue_bytes:
            raise QueueFull(f"the waiting prompts hold {self._limits.queue_bytes} bytes already")

    def knows(self, prompt_id: str) -> bool:
        """Whether the id is waiting, running or finished."""
        with self._lock:
            running = self._running is not None and self._running.prompt_id == prompt_id
            return running or prompt_id in self._history or any(job.prompt_id == prompt_id for _, _, job in self._heap)

    def take(self, timeout: float | None = None) -> Job | None:
        """Wait for the next prompt and mark it running; None after `timeout` seconds, on new flags or when closed."""
        with self._not_empty:
            if not (self._heap or self._flags or self._closed):
                self._not_empty.wait(timeout)
            if self._closed or not self._heap:
                return None
            job = heapq.heappop(self._heap)[2]
            self._waiting_bytes -= len(job.text)
            self._running = job
        self._changed()
        return job

    def finish(self, entry: Finished) -> None:
        """The running prompt is done: move it to the history, forgetting the oldest entries beyond the bounds."""
        with self._lock:
            self._running = None
            self._history[entry.prompt_id] = entry
            self._history_bytes += len(entry.text)
            over = len(self._history) > self._limits.history_length or self._history_bytes > self._limits.history_bytes
            while over and len(self._history) > 1:
                self._forget(next(iter(self._history)))
                over = len(self._history) > self._limits.history_length or self._history_bytes > self._limits.history_bytes
        self._changed()

    def close(self) -> None:
        """Wake the worker for good: `take` answers None from now on."""
        with self._not_empty:
            self._closed = True
            self._not_empty.notify_all()

    # -- looking and deleting

    @property
    def remaining(self) -> int:
        with self._lock:
            return len(self._heap) + (self._running is not None)

    def running(self) -> Job | None:
        return self._running

    def waiting(self) -> list[Job]:
        """Waiting prompts in the order in which they will run."""
        with self._lock:
            return [job for _, _, job in sorted(self._heap, key=lambda item: item[:2])]

    def delete(self, prompt_ids: list[str]) -> list[str]:
        """Remove waiting prompts; returns the ids that were waiting."""
        wanted = set(prompt_ids)
        with self._lock:
            removed = [job for _, _, job in self._heap if job.prompt_id in wanted]
            self._heap = [item for item in self._heap if item[2].prompt_id not in wanted]
            heapq.heapify(self._heap)
            self._waiting_bytes -= sum(len(job.text) for job in removed)
        if removed:
            self._changed()
        return [job.prompt_id for job in removed]

    def clear(self) -> None:
        with self._lock:
            self._heap.clear()
            self._waiting_bytes = 0
        self._changed()

    def history(self, max_items: int | None = None, offset: int = -1) -> list[Finished]:
        """A window of the history, oldest first; a negative offset with `max_items` means the newest ones."""
        with self._lock:
            entries = list(self._history.values())
        if offset < 0:
            offset = 0 if max_items is None else max(len(entries) - max_items, 0)
        return entries[offset:] if max_items is None else entries[offset : offset + max_items]

    def finished(self, prompt_id: str) -> Finished | None:
        with self._lock:
            return self._history.get(prompt_id)

    def forget(self, prompt_ids: list[str]) -> None:
        with self._lock:
            for prompt_id in prompt_ids:
                if prompt_id in self._history:
                    self._forget(prompt_id)

    def forget_all(self) -> None:
        with self._lock:
            self._history.clear()
            self._history_bytes = 0

    def _forget(self, prompt_id: str) -> None:
        self._history_bytes -= len(self._history.pop(prompt_id).text)

    # -- flags for the worker

    def set_flag(self, name: str) -> None:
        """Ask the worker for something between two prompts ("unload_models", "free_memory")."""
        with self._not_empty:
            self._flags[name] = True
            self._not_empty.notify()

    def take_flags(self) -> dict[str, bool]:
        with self._lock:
            flags, self._flags = self._flags, {}
            return flags
