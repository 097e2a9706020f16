"""Runs prompts one after the other and keeps what may be reused: the cache and the node instances."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from ..context import Host, use_host
from .caching import CacheSettings, make_cache
from .progress import current_progress
from .run import NodeFailure, NodeObjects, PromptRun
from .validation import full_type_name

__all__ = ["PromptExecutor", "Send", "run_to_end"]

T = TypeVar("T")
Send = Callable[[str, dict[str, Any], "str | None"], None]

OUT_OF_MEMORY_TIP = (
    "This error means you ran out of memory on your GPU.\n\n"
    "TIPS: If the workflow worked before you might have accidentally set the batch_size to a large number."
)


class PromptExecutor:
    """Executes validated prompts on one host.

    Args:
        host: whose folders, registry, memory manager and interrupt flag the nodes see.
        cache: what is kept between prompts, and during one.
        send: `send(event, data, client_id)` receives every message while a run goes on, on the thread that runs it; it must
            not block. `client_id` None means everyone. Nothing is sent for a job without a client, except
            `execution_interrupted`. All data is JSON except that of `preview_image`:
            {"image": (format, PIL image, largest side), "metadata": {node_id, display_node_id, parent_node_id, real_node_id, prompt_id}}.

    After a run: `success`, `status_messages`, `history_result` and `node_seconds` (node id → seconds in its own function).
    Exceptions are not kept, since their frames would hold on to tensors.
    """

    def __init__(self, host: Host, cache: CacheSettings | None = None, send: Send | None = None):
        self.host = host
        self.cache_settings = cache or CacheSettings()
        self.send = send
        self._cache = make_cache(self.cache_settings)
        self._objects = NodeObjects()
        self._run: PromptRun | None = None
        self.client_id: str | None = None
        self.success = True
        self.status_messages: list[list] = []
        self.history_result: dict[str, Any] = {}
        self.node_seconds: dict[str, float] = {}

    @property
    def current_node_id(self) -> str | None:
        """The node of the screen that runs now; None between runs."""
        return self._run.last_node_id if self._run is not None else None

    def reset(self) -> None:
        """Forget every result and node instance."""
        self._cache.clear()
        self._objects.clear()

    def cached_outputs(self, node_id: str) -> list[list] | None:
        """Values of a node of the latest prompt, a list per output, where they are still there."""
        return self._cache.get(node_id)

    def execute(
        self, prompt: dict[str, dict], prompt_id: str, extra_data: Mapping[str, Any] | None = None, execute_outputs: Iterable[str] = ()
    ) -> dict[str, Any]:
        """`execute_async`, waited for."""
        return run_to_end(self.execute_async(prompt, prompt_id, extra_data, execute_outputs))

    async def execute_async(
        self, prompt: dict[str, dict], prompt_id: str, extra_data: Mapping[str, Any] | None = None, execute_outputs: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Run a prompt that passed `validate_prompt`.

        Args:
            extra_data: `client_id` (who hears the messages) and `extra_pnginfo` (what savers write into pictures).
            execute_outputs: ids of the nodes to run, `Validation.outputs`.

        Returns:
            {"outputs": id → ui, "meta": id → {node_id, display_node, parent_node, real_node_id},
            "status": {"status_str": "success" | "error", "completed": bool, "messages": [[event, data], …]}};
            a failing node is part of this, not an exception.
        """
        extra_data = extra_data or {}
        outputs = list(execute_outputs)
        self.client_id = extra_data.get("client_id")
        self.status_messages, self.success = [], True
        self.host.interrupt.clear()
        tell = self._send_to_client if self.send is not None and self.client_id is not None else None
        run = PromptRun(self.host, self._cache, self._objects, prompt, prompt_id, extra_data, tell)
        self._message("execution_start", {"prompt_id": prompt_id})
        try:
            with self._active(run):
                cached = await run.begin(outputs)
                self._message("execution_cached", {"nodes": cached, "prompt_id": prompt_id})
                await run.execute(outputs)
            self._message("execution_success", {"prompt_id": prompt_id})
        except NodeFailure as failure:
            self._report(run, failure)
        finally:
            self._cache.finish()
            run.progress.close()
            self.node_seconds = run.seconds
        return self._conclude(run)

    @contextmanager
    def _active(self, run: PromptRun) -> Iterator[None]:
        """The host and the progress of this run are the current ones, gradients are off."""
        import torch

        previous_hook, self.host.progress_hook, self._run = self.host.progress_hook, run.on_progress, run
        try:
            with use_host(self.host), current_progress(run.progress), torch.inference_mode():
                yield
        finally:
            self.host.progress_hook, self._run = previous_hook, None

    def _conclude(self, run: PromptRun) -> dict[str, Any]:
        meta = {
            node_id: {
                "node_id": node_id,
                "display_node": run.dynprompt.get_display_node_id(node_id),
                "parent_node": run.dynprompt.get_parent_node_id(node_id),
                "real_node_id": run.dynprompt.get_real_node_id(node_id),
            }
            for node_id in run.ui
        }
        status = {"status_str": "success" if self.success else "error", "completed": self.success, "messages": self.status_messages}
        self.history_result = {"outputs": run.ui, "meta": meta, "status": status}
        return self.history_result

    def _send_to_client(self, event: str, data: dict[str, Any]) -> None:
        self.send(event, data, self.client_id)

    def _message(self, event: str, data: dict[str, Any], to_everyone: bool = False) -> None:
        """Record a message in the history and send it."""
        data = {**data, "timestamp": int(time.time() * 1000)}
        self.status_messages.append([event, data])
        if self.send is not None and (to_everyone or self.client_id is not None):
            self.send(event, data, self.client_id)

    def _report(self, run: PromptRun, failure: NodeFailure) -> None:
        from ..model_management import OOM_EXCEPTION, InterruptProcessingException, unload_all_models

        self.success = False
        error, node_id = failure.error, failure.node_id
        node_type = run.dynprompt.get_node(node_id)["class_type"]
        place = {"prompt_id": run.prompt_id, "node_id": node_id, "node_type": node_type, "executed": list(run.executed)}
        if isinstance(error, InterruptProcessingException):
            logging.info("Interrupted at node %s (%s)", node_id, node_type)
            self._message("execution_interrupted", place, to_everyone=True)
            return
        # As text: a log record that holds the exception would keep its frames, and the tensors in them, alive.
        logging.error("Node %s (%s) failed: %s: %s", node_id, node_type, type(error).__name__, str(error))
        logging.debug("%s", "".join(traceback.format_exception(error)))
        tip = ""
        if isinstance(error, OOM_EXCEPTION):
            tip = OUT_OF_MEMORY_TIP
            with use_host(self.host):
                unload_all_models()
        details = {
            "exception_message": f"{error}\n{tip}",
            "exception_type": full_type_name(type(error)),
            "traceback": traceback.format_tb(error.__traceback__),
            "current_inputs": {name: [_plain(value) for value in values] for name, values in failure.inputs.items()},
            "current_outputs": list(run.dynprompt.original_prompt),
        }
        self._message("execution_error", place | details)


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, also from inside a running event loop (a notebook): then on a thread of its own, in the caller's context."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, asyncio.run, coroutine).result()


def _plain(value: Any) -> Any:
    """Numbers, strings and booleans as they are, everything else as text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return str(value)
    except Exception as error:  # a report of one error must not die of another
        return f"<{type(value).__name__} that cannot be shown: {error}>"
