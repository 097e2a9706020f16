"""The one thread that executes prompts, and what it tells the clients while it does.

Everything heavy happens here: running nodes, encoding messages, shrinking and compressing previews. The event loop is only
handed finished bytes.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import model_management
from ..context import Host, use_host
from ..execution.caching import CacheSettings
from ..execution.executor import PromptExecutor
from .jobs import describe_finished
from .json_text import dumps
from .messages import encode_preview, encode_preview_with_metadata
from .options import ServerOptions
from .prompt_queue import Finished, Job, PromptQueue
from .websocket import Clients

__all__ = ["Worker"]

STOP_SECONDS = 15.0  # how long a stopping server waits for the node that runs to notice
GARBAGE_SECONDS = 10.0
# progress_state repeats every node that began, so a run of n nodes sends n² entries; large graphs get it this often at most.
SMALL_GRAPH = 64
STATE_SECONDS = 0.1
PREVIEW_METHODS = {"none": "none", "auto": "auto", "latent2rgb": "latent2rgb", "taesd": "latent2rgb"}
# The executor is silent about a prompt that nobody follows. The worker wants to hear it all, so it names itself as the client.
NOBODY = "\0nobody"


def _cache_settings(options: ServerOptions) -> CacheSettings:
    if options.cache_none:
        return CacheSettings("none")
    return CacheSettings("lru", options.cache_lru) if options.cache_lru else CacheSettings("classic")


class Worker:
    """Takes prompts from the queue, runs them one after the other, and moves them to the history."""

    def __init__(self, host: Host, queue: PromptQueue, clients: Clients, options: ServerOptions):
        self._host = host
        self._queue = queue
        self._clients = clients
        self._preview_size = options.preview_size
        self._cache = _cache_settings(options)
        self._executor = self._make_executor()
        self._thread = threading.Thread(target=self._work, name="prompt worker", daemon=True)
        self._lock = threading.Lock()
        self._began: str | None = None  # the prompt whose execution has begun
        self._stop_wanted: str | None = None  # the prompt that was to be stopped
        self._stopping = False
        self._held_state: tuple[dict, str] | None = None
        self._state_sent = 0.0

    def _make_executor(self) -> PromptExecutor:
        return PromptExecutor(self._host, self._cache, self._send)

    # -- from any thread

    @property
    def current_node(self) -> str | None:
        """The node on screen that runs now."""
        return self._executor.current_node_id

    def start(self) -> None:
        self._thread.start()

    def interrupt(self, prompt_id: str | None = None) -> bool:
        """Stop the running prompt, or only `prompt_id` if it is that one; whether there was one to stop.

        A prompt that was taken but has not begun is stopped when it begins; a later one is never hit.
        """
        running = self._queue.running()
        if running is None or prompt_id not in (None, running.prompt_id):
            return False
        with self._lock:
            self._stop_wanted = running.prompt_id
            if self._began == running.prompt_id:
                self._host.interrupt.set()
        return True

    def stop(self) -> None:
        """Take no more prompts, interrupt the running one and wait until its node has noticed."""
        self._stopping = True
        self._queue.close()
        self.interrupt()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            logging.warning("The running node did not stop within %.0f s and is abandoned", STOP_SECONDS)

    def announce_queue(self) -> None:
        """Tell every client how many prompts are left."""
        self._clients.send_json("status", {"status": {"exec_info": {"queue_remaining": self._queue.remaining}}})

    # -- in the worker thread

    def _work(self) -> None:
        collected, garbage = time.monotonic(), False
        with use_host(self._host):
            while not self._stopping:
                job = self._queue.take(timeout=GARBAGE_SECONDS if garbage else None)
                if job is not None:
                    self._run(job)
                    garbage = True
                flags = self._queue.take_flags()
                if flags:
                    self._guarded(self._release, flags)
                    garbage, collected = True, 0.0
                if garbage and time.monotonic() - collected > GARBAGE_SECONDS:
                    self._guarded(self._collect_garbage)
                    collected, garbage = time.monotonic(), False

    def _guarded(self, housekeeping: Callable[..., None], *arguments: Any) -> None:
        try:
            housekeeping(*arguments)
        except Exception:  # a failing clean-up must not end the only thread that runs prompts
            logging.exception("Clean-up between two prompts failed")

    def _release(self, flags: dict[str, bool]) -> None:
        model_management.unload_all_models()
        if flags.get("free_memory"):
            self._executor.reset()

    def _collect_garbage(self) -> None:
        gc.collect()
        model_management.soft_empty_cache()

    def _run(self, job: Job) -> None:
        started = time.perf_counter()
        settings = self._host.settings
        method = job.extra_data.get("preview_method")
        if isinstance(method, str) and method in PREVIEW_METHODS:
            self._host.settings = replace(settings, preview_method=PREVIEW_METHODS[method])
        try:
            extra_data = {**job.extra_data, "client_id": job.client_id or NOBODY}
            result = self._executor.execute(job.prompt, job.prompt_id, extra_data, job.outputs)
        except BaseException as error:  # the engine reports nodes' errors itself: this is SystemExit in a node, or our own mistake
            result = self._broken(job, error)
        finally:
            self._host.settings = settings
            with self._lock:
                self._began = None
        self._flush_state()
        self._queue.finish(self._finished(job, result))
        if job.client_id:
            self._clients.send_json("executing", {"node": None, "prompt_id": job.prompt_id}, job.client_id)
        logging.info("Prompt executed in %.2f seconds", time.perf_counter() - started)

    def _finished(self, job: Job, result: dict[str, Any]) -> Finished:
        parts = {"outputs": result["outputs"], "status": result["status"], "meta": result["meta"]}
        text = f'{{"prompt": {job.text}, {dumps(parts)[1:]}'
        return Finished(job.prompt_id, text, describe_finished(job, result["outputs"], result["status"]))

    def _broken(self, job: Job, error: BaseException) -> dict[str, Any]:
        """The result of a run that ended outside of its nodes' own errors; the next prompt gets a new executor."""
        logging.error("The run of prompt %s broke off", job.prompt_id, exc_info=error)
        details = {
            "prompt_id": job.prompt_id,
            "node_id": self.current_node or "",
            "node_type": job.prompt.get(self.current_node or "", {}).get("class_type", ""),
            "executed": [],
            "exception_message": f"{error}\n",
            "exception_type": type(error).__name__,
            "traceback": traceback.format_tb(error.__traceback__),
            "current_inputs": {},
            "current_outputs": [],
            "timestamp": int(time.time() * 1000),
        }
        self._send("execution_error", details, job.client_id or NOBODY)
        self._executor = self._make_executor()
        status = {"status_str": "error", "completed": False, "messages": [["execution_error", details]]}
        return {"outputs": {}, "meta": {}, "status": status}

    # -- messages of the executor

    def _send(self, event: str, data: dict[str, Any], client_id: str | None) -> None:
        if event == "execution_start":
            self._begin(data["prompt_id"])
        if client_id == NOBODY:
            if event == "execution_interrupted":
                self._clients.send_json(event, data)
        elif not self._clients.has(client_id):
            return
        elif event == "preview_image":
            self._send_preview(data["image"], data["metadata"], client_id)
        elif event == "progress_state":
            self._send_state(data, client_id)
        else:
            self._clients.send_json(event, data, client_id)

    def _begin(self, prompt_id: str) -> None:
        """The executor has just cleared the interrupt flag: from here on the flag is this prompt's."""
        with self._lock:
            self._began = prompt_id
            if self._stop_wanted == prompt_id or self._stopping:
                self._host.interrupt.set()
            self._stop_wanted = None

    def _send_state(self, data: dict[str, Any], client_id: str) -> None:
        now = time.monotonic()
        if len(data["nodes"]) > SMALL_GRAPH and now - self._state_sent < STATE_SECONDS:
            self._held_state = (data, client_id)
            return
        self._state_sent, self._held_state = now, None
        self._clients.send_json("progress_state", data, client_id)

    def _flush_state(self) -> None:
        if self._held_state is not None:
            self._clients.send_json("progress_state", *self._held_state)
            self._held_state = None

    def _send_preview(self, image: tuple, metadata: dict[str, Any], client_id: str) -> None:
        kind, picture, longest_side = image
        preview = (kind, picture, None if longest_side is None else self._preview_size)
        if self._clients.supports(client_id, "supports_preview_metadata"):
            self._clients.send(encode_preview_with_metadata(preview, metadata), client_id)
        else:
            self._clients.send(encode_preview(preview), client_id)
