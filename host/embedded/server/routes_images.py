"""GET /view and POST /upload/image, /upload/mask."""

from __future__ import annotations

import json
import os
from io import BytesIO

from aiohttp import web
from PIL import Image, UnidentifiedImageError

from ..safe_files import UnsafePathError, checked_path
from .files import file_answer
from .images import encode_channel, encode_preview_file, store_upload, with_alpha_of
from .state import json_answer, server_of

__all__ = ["ROUTES"]

UNREADABLE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def _locate(request: web.Request, name: str, kind: str, subfolder: str) -> str:
    """The file that name, type and subfolder mean. 400: bad name or type; 403: out of the folder; 404: not there."""
    paths = server_of(request).host.paths
    name, annotated = paths.annotated_filepath(name)
    root = annotated or paths.get_directory_by_type(kind)
    if not name or root is None:
        raise web.HTTPBadRequest(text="" if name else "The name is empty.")
    name = name.replace("\\", "/")
    try:
        checked_path(root, name, follow_links=True)
    except UnsafePathError as error:
        raise web.HTTPBadRequest(text="") from error
    try:
        checked_path(root, name)
        path = checked_path(root, os.path.join(subfolder, os.path.basename(name)))
    except UnsafePathError as error:
        raise web.HTTPForbidden(text="") from error
    if not os.path.isfile(path):
        raise web.HTTPNotFound
    return path


async def view(request: web.Request) -> web.StreamResponse:
    """A file of output/, input/ or temp/; `preview` asks for a lossy copy, `channel` for colours or alpha alone."""
    query = request.query
    if "filename" not in query:
        return web.Response(status=404)
    path = _locate(request, query["filename"], query.get("type", "output"), query.get("subfolder", ""))
    disposition = {"Content-Disposition": f'filename="{_header_safe(os.path.basename(path))}"'}
    channel = query.get("channel", "")
    try:
        if "preview" in query:
            body, kind = await server_of(request).in_thread(encode_preview_file, path, query["preview"], channel)
            return web.Response(body=body, content_type=f"image/{kind}", headers=disposition)
        if channel in ("rgb", "a"):
            body = await server_of(request).in_thread(encode_channel, path, channel)
            return web.Response(body=body, content_type="image/png", headers=disposition)
    except UNREADABLE as error:
        return web.Response(status=400, text=f"{os.path.basename(path)} is not a picture that can be converted: {error}")
    return file_answer(path, trusted=False, headers=disposition)


def _header_safe(name: str) -> str:
    return name.replace("\\", "_").replace('"', "_").encode("utf-8", "replace").decode("latin-1")


async def _store(request: web.Request, form, content) -> web.Response:
    """Write `content` (a binary file) where the form's type and subfolder say."""
    kind, subfolder = form.get("type") or "input", form.get("subfolder") or ""
    root = server_of(request).host.paths.get_directory_by_type(kind) if isinstance(kind, str) else None
    filename = form["image"].filename
    if root is None or not filename or not isinstance(subfolder, str):
        return web.Response(status=400, text="type must be input, output or temp, and the file must have a name.")
    try:
        folder = checked_path(root, subfolder, for_writing=True)
        inner, name = os.path.split(checked_path(folder, filename, for_writing=True))
        checked_path(root, os.path.relpath(inner, root), for_writing=True)
    except UnsafePathError as error:
        return web.Response(status=400, text=f"Invalid path: {error}")
    overwrite = form.get("overwrite") in ("true", "1")
    try:
        stored = await server_of(request).in_thread(store_upload, inner, name, content, overwrite)
    except OSError as error:
        return web.Response(status=400, text=f"Cannot store the file: {error.strerror}. Choose another name.")
    nested = os.path.relpath(inner, folder).replace(os.sep, "/")
    return json_answer({"name": stored if nested == "." else f"{nested}/{stored}", "subfolder": subfolder, "type": kind})


async def _form(request: web.Request):
    """The multipart form with a file under `image`, or 400."""
    try:
        form = await request.post()
    except (ValueError, AssertionError) as error:
        raise web.HTTPBadRequest(text=f"The body is not a form: {error}") from error
    if not isinstance(form.get("image"), web.FileField):
        raise web.HTTPBadRequest(text="The form has no file 'image'.")
    return form


async def upload_image(request: web.Request) -> web.Response:
    form = await _form(request)
    return await _store(request, form, form["image"].file)


async def upload_mask(request: web.Request) -> web.Response:
    """Store the picture that `original_ref` names with the alpha channel of the upload."""
    form = await _form(request)
    try:
        reference = json.loads(form.get("original_ref") or "")
        name, kind, subfolder = (
            str(reference.get(key, default)) for key, default in (("filename", ""), ("type", "output"), ("subfolder", ""))
        )
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise web.HTTPBadRequest(text=f"original_ref is not a JSON object: {error}") from error
    original = _locate(request, name, kind, subfolder)
    try:
        merged = await server_of(request).in_thread(with_alpha_of, original, form["image"].file)
    except UNREADABLE as error:
        raise web.HTTPBadRequest(text=f"A picture cannot be read: {error}") from error
    return await _store(request, form, BytesIO(merged))


ROUTES = (
    web.get("/view", view),
    web.post("/upload/image", upload_image),
    web.post("/upload/mask", upload_mask),
)
