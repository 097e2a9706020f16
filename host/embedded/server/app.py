"""The web application: every route under its own path and under /api, behind the security chain."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from . import routes_images, routes_internal, routes_nodes, routes_prompt, routes_users
from .security import make_middlewares, refuse_large_body
from .state import SERVER, Server, server_of

__all__ = ["make_app"]


async def _websocket(request: web.Request) -> web.StreamResponse:
    return await server_of(request).clients.serve(request)


def _routes(server: Server) -> list[web.AbstractRouteDef]:
    """All routes in the order in which they are tried: ours, those of third-party packs, the interface's files."""
    doubled = [
        web.get("/ws", _websocket),
        *routes_prompt.ROUTES,
        *routes_users.ROUTES,
        *routes_images.ROUTES,
        *routes_nodes.ROUTES,
        *(route for route in server.pack_routes if isinstance(route, web.RouteDef)),
    ]
    prefixed = [web.RouteDef(route.method, "/api" + route.path, route.handler, route.kwargs) for route in doubled]
    mounted = [route for route in server.pack_routes if not isinstance(route, web.RouteDef)]
    routes = [*doubled, *prefixed, *routes_prompt.API_ROUTES, *routes_internal.ROUTES, *mounted, *routes_nodes.STATIC_ROUTES]
    return [_with_expectation(route) for route in routes]


def _with_expectation(route: Any) -> Any:
    if not isinstance(route, web.RouteDef):
        return route
    return web.RouteDef(route.method, route.path, route.handler, {**route.kwargs, "expect_handler": refuse_large_body})


def make_app(server: Server) -> web.Application:
    """Build the application; packs must have added their routes before."""
    app = web.Application(client_max_size=server.options.limits.upload_bytes, middlewares=make_middlewares(server.options, server.host))
    app[SERVER] = server
    app.add_routes(_routes(server))
    app.on_startup.append(_start)
    app.on_shutdown.append(_stop)
    return app


async def _start(app: web.Application) -> None:
    server, loop = app[SERVER], asyncio.get_running_loop()
    server.clients.bind(loop)
    server.logs.added = lambda: _announce_logs(server, loop)
    server.worker.start()


async def _stop(app: web.Application) -> None:
    """Stop the run, wait for its last step, then say goodbye to the sockets."""
    server = app[SERVER]
    server.logs.added = lambda: None
    await asyncio.to_thread(server.worker.stop)
    await server.clients.close_all()
    server.validation.shutdown(wait=False, cancel_futures=True)


def _announce_logs(server: Server, loop: asyncio.AbstractEventLoop) -> None:
    if server.log_subscribers and not loop.is_closed():
        loop.call_soon_threadsafe(_send_logs, server)


def _send_logs(server: Server) -> None:
    entries = server.logs.take_unsent()
    server.log_subscribers &= {client for client in server.log_subscribers if server.clients.has(client)}
    if entries:
        for client in server.log_subscribers:
            server.clients.send_json("logs", {"entries": entries, "size": server.logs.size()}, client)
