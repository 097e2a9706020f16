"""/internal: what only the interface asks for (terminal panel, folders, file lists)."""

from __future__ import annotations

import os

from aiohttp import web

from .state import json_answer, read_json, server_of

__all__ = ["ROUTES"]


async def get_logs(request: web.Request) -> web.Response:
    return json_answer("".join(f"{entry['t']} - {entry['m']}" for entry in server_of(request).logs.entries()))


async def get_raw_logs(request: web.Request) -> web.Response:
    logs = server_of(request).logs
    return json_answer({"entries": logs.entries(), "size": logs.size()})


async def subscribe_logs(request: web.Request) -> web.Response:
    server, body = server_of(request), await read_json(request)
    client = body.get("clientId")
    if not isinstance(client, str) or not isinstance(body.get("enabled"), bool):
        raise web.HTTPBadRequest(text="clientId must be text and enabled true or false.")
    if not body["enabled"]:
        server.log_subscribers.discard(client)
    elif server.clients.has(client):
        server.log_subscribers.add(client)
    return web.Response()


async def get_folder_paths(request: web.Request) -> web.Response:
    kinds = server_of(request).host.paths.folder_names_and_paths
    return json_answer({kind: folders for kind, (folders, _) in kinds.items()})


async def get_files(request: web.Request) -> web.Response:
    """Names of the files in input, output or temp, newest first."""
    folder = server_of(request).host.paths.get_directory_by_type(request.match_info["type"])
    if folder is None:
        return json_answer({"error": "Invalid directory type"}, 400)

    def newest_first() -> list[str]:
        if not os.path.isdir(folder):
            return []
        files = [entry for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]
        return [entry.name for entry in sorted(files, key=lambda entry: -entry.stat().st_mtime)]

    return json_answer(await server_of(request).in_thread(newest_first))


ROUTES = (
    web.get("/internal/logs", get_logs),
    web.get("/internal/logs/raw", get_raw_logs),
    web.patch("/internal/logs/subscribe", subscribe_logs),
    web.get("/internal/folder_paths", get_folder_paths),
    web.get("/internal/files/{type}", get_files),
)
