"""Files that the server answers with or writes for a user."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from aiohttp import web

from ..safe_files import UnsafePathError, checked_path
from .security import content_headers

__all__ = ["file_answer", "packaged_file", "replace_file"]


def file_answer(path: str | Path, *, trusted: bool, headers: dict[str, str] | None = None) -> web.StreamResponse:
    """The file with content headers by its name; 404 where there is none. Untrusted content cannot run in the browser."""
    if not os.path.isfile(path):
        return web.Response(status=404)
    return web.FileResponse(path, headers={**content_headers(os.path.basename(path), trusted=trusted), **(headers or {})})


def packaged_file(root: str | Path, name: str) -> web.StreamResponse:
    """A file that came with the interface or a pack; a name that leads out of `root` is answered like an absent one."""
    try:
        return file_answer(checked_path(root, name), trusted=True)
    except UnsafePathError:
        return web.Response(status=404)


def replace_file(path: str, content: bytes) -> None:
    """Write a file whole or not at all; a reader sees the old or the new content, never a part."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    hidden = os.path.join(folder, f".{secrets.token_hex(8)}.part")
    try:
        with open(hidden, "xb") as file:
            file.write(content)
        os.replace(hidden, path)
    except BaseException:
        if os.path.exists(hidden):
            os.unlink(hidden)
        raise
