"""The parts of one running server, and how a handler reaches them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..context import Host, use_host
from .json_text import dumps
from .logs import LogBuffer
from .options import ServerOptions
from .prompt_queue import PromptQueue
from .users import Users
from .websocket import Clients

if TYPE_CHECKING:
    from .worker import Worker

__all__ = ["SERVER", "Server", "BadBody", "json_answer", "read_json", "server_of", "text_answer"]


@dataclass(eq=False)
class Server:
    """Everything a handler may need. `pack_routes` and `prompt_handlers` belong to third-party packs: routes they define,
    and functions that may rewrite the body of POST /prompt before it is read."""

    options: ServerOptions
    host: Host
    queue: PromptQueue
    clients: Clients
    logs: LogBuffer
    users: Users
    worker: Worker
    front_end: Path | None
    features: dict[str, Any]
    # Validation may call code of nodes: it gets a thread of its own, so that neither the loop nor a sampler waits for it.
    validation: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "validation"))
    pack_routes: web.RouteTableDef = field(default_factory=web.RouteTableDef)
    prompt_handlers: list[Callable[[dict], dict]] = field(default_factory=list)
    log_subscribers: set[str] = field(default_factory=set)

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run blocking work outside the event loop, with this server's host as the current one."""
        return await asyncio.to_thread(self._with_host, function, *arguments)

    def _with_host(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with use_host(self.host):
            return function(*arguments)


SERVER = web.AppKey("server", Server)


def server_of(request: web.Request) -> Server:
    return request.app[SERVER]


class BadBody(web.HTTPBadRequest):
    """The body is not the JSON that the route expects; the text says what is wrong."""


def json_answer(value: Any, status: int = 200) -> web.Response:
    return text_answer(dumps(value), status)


def text_answer(json_text: str, status: int = 200) -> web.Response:
    """An answer whose JSON is encoded already."""
    return web.Response(text=json_text, status=status, content_type="application/json")


async def read_json(request: web.Request, expected: type = dict, default: Any = None) -> Any:
    """The JSON body, whatever content type it was sent under; `default` for an empty one if given. Raises BadBody."""
    body = await request.read()
    if not body and default is not None:
        return default
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadBody(text=f"The body is not JSON: {error}") from error
    if expected is not object and not isinstance(value, expected):
        raise BadBody(text=f"The body must be a JSON {'object' if expected is dict else 'list'}.")
    return value
