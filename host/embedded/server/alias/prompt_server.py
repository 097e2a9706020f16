"""`server.PromptServer.instance`: what packs use of ComfyUI's server object (routes, messages, prompt handlers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..messages import BinaryEvent, encode_json, encode_text
from ..state import Server

__all__ = ["BinaryEventTypes", "PromptServer", "offer", "withdraw"]

BinaryEventTypes = BinaryEvent


class PromptServer:
    """A view on one running server; packs find it at `PromptServer.instance`."""

    instance: PromptServer | None = None

    def __init__(self, server: Server):
        self._server = server
        self.routes = server.pack_routes
        self.supports = ["custom_nodes_from_web"]

    @property
    def prompt_queue(self) -> Any:
        return self._server.queue

    @property
    def client_id(self) -> str | None:
        """Who queued the prompt that runs now."""
        running = self._server.queue.running()
        return running.client_id if running else None

    @property
    def last_node_id(self) -> str | None:
        return self._server.worker.current_node

    @property
    def last_prompt_id(self) -> str | None:
        running = self._server.queue.running()
        return running.prompt_id if running else None

    def add_on_prompt_handler(self, handler: Callable[[dict], dict]) -> None:
        """`handler(body)` may change the body of POST /prompt and returns it."""
        self._server.prompt_handlers.append(handler)

    def send_sync(self, event: str | int, data: Any, sid: str | None = None) -> None:
        """Send JSON, or with an integer event bytes behind that event number, to one client or to all."""
        if isinstance(event, int):
            self._server.clients.send(event.to_bytes(4, "big") + bytes(data), sid)
        else:
            self._server.clients.send(encode_json(event, data), sid)

    def send_progress_text(self, text: str | bytes, node_id: str, sid: str | None = None) -> None:
        """Show a text on a node."""
        if isinstance(text, (bytes, bytearray)):
            text = bytes(text).decode("utf-8", "replace")
        self._server.clients.send(encode_text(str(node_id), text), sid)

    def queue_updated(self) -> None:
        self._server.worker.announce_queue()


def offer(server: Server) -> None:
    """Make `server` the one that packs find."""
    PromptServer.instance = PromptServer(server)


def withdraw() -> None:
    PromptServer.instance = None
