"""What stands between a request and its handler: foreign origins, oversized bodies, cache headers, unexpected errors.

The server has no log-in: whoever reaches it may run any graph. It therefore listens on loopback by default, and web pages
of other origins, which can reach loopback too, are turned away here.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from ..context import Host, use_host
from .json_text import dumps
from .options import ServerOptions

__all__ = ["make_middlewares", "refuse_large_body", "content_headers"]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ONE_HOUR, ONE_DAY = 3600, 86400
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
COMPRESSED_TYPES = ("application/json", "text/plain")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

# Fixed here because Python's own table depends on the machine it runs on.
CONTENT_TYPES = {
    "js": "text/javascript", "mjs": "text/javascript", "css": "text/css", "html": "text/html", "json": "application/json",
    "map": "application/json", "wasm": "application/wasm", "svg": "image/svg+xml", "png": "image/png", "jpg": "image/jpeg",
    "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif", "avif": "image/avif", "bmp": "image/bmp", "ico": "image/x-icon",
    "woff": "font/woff", "woff2": "font/woff2", "ttf": "font/ttf", "otf": "font/otf", "md": "text/markdown", "txt": "text/plain",
    "mp4": "video/mp4", "webm": "video/webm", "mp3": "audio/mpeg", "wav": "audio/wav", "ogg": "audio/ogg", "flac": "audio/flac",
    "opus": "audio/ogg", "glb": "model/gltf-binary", "gltf": "model/gltf+json", "safetensors": "application/octet-stream",
    "pdf": "application/pdf",
}  # fmt: skip
TEXT_TYPES = ("text/", "application/json", "image/svg+xml")
# Types in which a browser may run what a stranger wrote; files of users are never sent under them.
ACTIVE_ENDINGS = (
    "html",
    "htm",
    "xhtml",
    "xht",
    "shtml",
    "js",
    "mjs",
    "css",
    "svg",
    "svgz",
    "xml",
    "xsl",
    "xslt",
    "pdf",
    "swf",
    "mht",
    "mhtml",
)


def content_headers(name: str, *, trusted: bool) -> dict[str, str]:
    """Content headers for a file of that name; `trusted` files are the interface's and the packs' own."""
    ending = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    kind = CONTENT_TYPES.get(ending, "application/octet-stream")
    if trusted:
        charset = "; charset=utf-8" if kind.startswith(TEXT_TYPES) else ""
        return {hdrs.CONTENT_TYPE: kind + charset}
    if ending in ACTIVE_ENDINGS:
        kind = "application/octet-stream"
    return {
        hdrs.CONTENT_TYPE: kind,
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
    }


async def refuse_large_body(request: web.Request) -> web.StreamResponse | None:
    """Answer `Expect: 100-continue`: a body over the limit is refused before the client sends it."""
    _check_length(request)
    request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return None


def _check_length(request: web.Request) -> None:
    length, limit = request.content_length, request.client_max_size
    if length is not None and length > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=length, text=f"The body has {length} bytes; allowed: {limit}.")


def make_middlewares(options: ServerOptions, host: Host) -> list:
    """The chain every request passes, outermost first."""
    chain = [_unexpected_errors, _cache_headers]
    if options.compress:
        chain.append(_compressed)
    chain.append(_cors(options.cors_origin) if options.cors_origin else _origin_guard(options))
    chain += [_body_limit, _current_host(host)]
    return chain


@web.middleware
async def _unexpected_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as answer:
        if answer.status == 404 and not answer.prepared:
            return web.Response(status=404)
        raise
    except ConnectionError:
        raise
    except Exception as error:
        logging.exception("%s %s failed", request.method, request.path)
        text = dumps({"error": {"type": type(error).__name__, "message": "The server failed on this request; its log says why."}})
        return web.Response(status=500, text=text, content_type="application/json")


@web.middleware
async def _cache_headers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Scripts and styles are asked for anew each time, pictures are kept for a day (an absent one for an hour)."""
    response = await handler(request)
    path = request.path.lower()
    name = path.rsplit("/", 1)[-1]
    if response.prepared:
        return response
    if path.endswith((".js", ".mjs", ".css")) or (name.startswith("index") and name.endswith(".json")):
        response.headers.setdefault(hdrs.CACHE_CONTROL, "no-cache")
    elif path.endswith(IMAGE_ENDINGS):
        if response.status == 404:
            response.headers.setdefault(hdrs.CACHE_CONTROL, f"public, max-age={ONE_HOUR}")
        elif response.status in (302, 303, 307):
            response.headers.setdefault(hdrs.CACHE_CONTROL, "no-cache")
        elif response.status in (200, 201, 202, 203, 204, 205, 206, 301, 308):
            response.headers.setdefault(hdrs.CACHE_CONTROL, f"public, max-age={ONE_DAY}")
    return response


@web.middleware
async def _compressed(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    if isinstance(response, web.Response) and response.body and response.content_type in COMPRESSED_TYPES:
        if "gzip" in request.headers.get(hdrs.ACCEPT_ENCODING, ""):
            response.enable_compression()
    return response


@web.middleware
async def _body_limit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A declared length over the limit is refused unread; an undeclared one is counted while it is read."""
    _check_length(request)
    return await handler(request)


def _current_host(host: Host):
    @web.middleware
    async def with_host(request: web.Request, handler: Handler) -> web.StreamResponse:
        with use_host(host):
            return await handler(request)

    return with_host


def _cors(allowed_origin: str):
    headers = {
        "Access-Control-Allow-Origin": allowed_origin,
        "Access-Control-Allow-Methods": "POST, GET, DELETE, PUT, PATCH, OPTIONS",
        "Access-Control-Allow-Headers": "Content-Type, Authorization, Comfy-User",
        "Access-Control-Allow-Credentials": "true",
    }

    @web.middleware
    async def cors(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = web.Response() if request.method == "OPTIONS" else await handler(request)
        if not response.prepared:
            response.headers.update(headers)
        return response

    return cors


def _origin_guard(options: ServerOptions):
    """Refuse requests that a page of another origin makes, or that reach loopback under a foreign name (DNS rebinding)."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        reason = _foreign(request, options)
        if reason:
            logging.warning("%s %s refused: %s", request.method, request.path, reason)
            return web.Response(status=403)
        return web.Response() if request.method == "OPTIONS" else await handler(request)

    return guard


def _foreign(request: web.Request, options: ServerOptions) -> str | None:
    """Why the request is refused, None when it is welcome."""
    host = _split(f"//{request.headers.get(hdrs.HOST, '')}")
    loopback = host is not None and _names_loopback(host[0])
    if options.only_loopback and not loopback and host is not None and host[0] not in options.trusted_hosts:
        return f"host '{host[0]}' is no name of this machine (name it with --trusted-host behind a reverse proxy)"
    origin_text = request.headers.get(hdrs.ORIGIN)
    if origin_text is not None and loopback:
        origin = _split(origin_text)
        if origin is None or origin[0] != host[0] or not _same_port(origin, host):
            return f"origin '{origin_text}' is not host '{request.headers.get(hdrs.HOST)}'"
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        following_a_link = request.method in SAFE_METHODS and request.headers.get("Sec-Fetch-Mode") == "navigate"
        if not following_a_link:
            return "a page of another site made it"
    return None


def _split(url: str) -> tuple[str, int | None] | None:
    """(lower-case host name, port) of a URL; None where there is no host ("Origin: null" among them)."""
    try:
        parts = urlsplit(url)
        return (parts.hostname, parts.port) if parts.hostname else None
    except ValueError:
        return None


def _same_port(origin: tuple[str, int | None], host: tuple[str, int | None]) -> bool:
    """Browsers leave a default port out of either header; only two ports that are both named can differ."""
    return origin[1] is None or host[1] is None or origin[1] == host[1]


def _names_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
