"""Websocket clients: who is connected, what each is sent, and when a slow reader is dropped.

Messages are encoded by the thread that sends them. The event loop only appends them to a client's own queue, from which
one task a client writes; a client that reads too slowly therefore delays nobody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

from aiohttp import WSMsgType, web

from .messages import encode_json
from .options import Limits

__all__ = ["Client", "Clients"]

MAX_CLIENT_ID = 200


class Client:
    """One open socket: its id, the features it announced, and what is still to be written to it."""

    def __init__(self, socket: web.WebSocketResponse, request: web.Request, sid: str, backlog_limit: int):
        self.sid = sid
        self.features: dict[str, Any] = {}
        self._socket = socket
        self._transport = request.transport
        self._backlog_limit = backlog_limit
        self._waiting: deque[str | bytes] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self.dropped = False

    def push(self, message: str | bytes) -> None:
        """Queue a message (event loop only); a client over its backlog is cut off at once."""
        if self.dropped:
            return
        self._waiting.append(message)
        self._waiting_bytes += len(message)
        if self._waiting_bytes > self._backlog_limit:
            logging.warning("Websocket client %s reads too slowly: dropped after %d bytes of backlog", self.sid, self._waiting_bytes)
            self.abort()
        self._wake.set()

    def abort(self) -> None:
        self.dropped = True
        self._waiting.clear()
        if self._transport is not None:
            self._transport.abort()

    async def write_forever(self) -> None:
        """Write queued messages in order until the socket closes."""
        while not self.dropped:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                message = self._waiting[0]
                try:
                    if isinstance(message, str):
                        await self._socket.send_str(message)
                    else:
                        await self._socket.send_bytes(message)
                except (ConnectionError, RuntimeError):  # closed by the other side between two messages
                    return
                if self._waiting:
                    self._waiting.popleft()
                    self._waiting_bytes -= len(message)

    async def close(self) -> None:
        await self._socket.close(code=1001, message=b"server is stopping")


class Clients:
    """All websocket clients of one server.

    Args:
        features: the server's own feature flags, sent in answer to a client's.
        greeting: what a new client is told: (event, data) pairs for a client id.
    """

    def __init__(self, limits: Limits, features: dict[str, Any], greeting: Callable[[str], list[tuple[str, Any]]]):
        self._limits = limits
        self._features = features
        self._greeting = greeting
        self._by_sid: dict[str, Client] = {}
        self._open: set[Client] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    # -- from any thread

    def has(self, sid: str | None) -> bool:
        return sid in self._by_sid

    def supports(self, sid: str | None, feature: str) -> bool:
        client = self._by_sid.get(sid) if sid else None
        return client is not None and client.features.get(feature) is True

    def send(self, message: str | bytes, sid: str | None = None) -> None:
        """Send an encoded message to one client, or to all when `sid` is None. Never blocks; unknown ids are ignored."""
        loop = self._loop
        if loop is None or loop.is_closed() or (sid is not None and sid not in self._by_sid):
            return
        try:
            loop.call_soon_threadsafe(self._deliver, message, sid)
        except RuntimeError:
            logging.debug("A message was lost because the event loop is closing")

    def send_json(self, event: str, data: Any, sid: str | None = None) -> None:
        if self._open and (sid is None or sid in self._by_sid):
            self.send(encode_json(event, data), sid)

    # -- in the event loop

    def _deliver(self, message: str | bytes, sid: str | None) -> None:
        for client in list(self._open) if sid is None else filter(None, [self._by_sid.get(sid)]):
            client.push(message)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """GET /ws?clientId=…: greet, answer feature flags, and write messages until the client leaves."""
        sid = request.query.get("clientId", "") or uuid.uuid4().hex
        if len(sid) > MAX_CLIENT_ID:
            return web.Response(status=400, text=f"clientId is longer than {MAX_CLIENT_ID} characters")
        socket = web.WebSocketResponse(compress=False, max_msg_size=self._limits.socket_message_bytes)
        await socket.prepare(request)
        client = Client(socket, request, sid, self._limits.socket_backlog_bytes)
        # A page that reconnects keeps its id: messages go to the newest socket of an id.
        self._by_sid[sid] = client
        self._open.add(client)
        writer = asyncio.create_task(client.write_forever())
        try:
            for event, data in self._greeting(sid):
                client.push(encode_json(event, data))
            await self._read(socket, client)
        finally:
            self._open.discard(client)
            if self._by_sid.get(sid) is client:
                del self._by_sid[sid]
            writer.cancel()
        return socket

    async def _read(self, socket: web.WebSocketResponse, client: Client) -> None:
        first = True
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                continue
            flags = _feature_flags(message.data) if first else None
            first = False
            if flags is not None:
                client.features = flags
                client.push(encode_json("feature_flags", self._features))

    async def close_all(self) -> None:
        await asyncio.gather(*(client.close() for client in list(self._open)), return_exceptions=True)


def _feature_flags(text: str) -> dict[str, Any] | None:
    """The flags of a client's first message, None when it is something else."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(message, dict) and message.get("type") == "feature_flags" and isinstance(message.get("data"), dict):
        return message["data"]
    return None
