"""/users, /settings and /userdata: what the interface keeps for a person on the server."""

from __future__ import annotations

import os
import shutil
from typing import Any

from aiohttp import web

from ..safe_files import UnsafePathError, checked_path
from .files import file_answer, replace_file
from .state import json_answer, read_json, server_of
from .users import DEFAULT_USER, DuplicateUser, UnknownUser, Users

__all__ = ["ROUTES"]


def _users(request: web.Request) -> Users:
    return server_of(request).users


def _user(request: web.Request) -> str:
    try:
        return _users(request).identify(request.headers.get("Comfy-User"))
    except UnknownUser as error:
        raise web.HTTPUnauthorized(text="Unknown user") from error


# -- users and settings


async def get_users(request: web.Request) -> web.Response:
    users = _users(request)
    if users.multi_user:
        return json_answer({"storage": "server", "users": users.names()})
    return json_answer({"storage": "server", "migrated": os.path.isdir(users.folder(DEFAULT_USER))})


async def post_user(request: web.Request) -> web.Response:
    users, body = _users(request), await read_json(request)
    name = body.get("username")
    if not users.multi_user or not isinstance(name, str):
        return json_answer({"error": "This server keeps one user." if not users.multi_user else "username must be text."}, 400)
    try:
        return json_answer(users.add(name))
    except DuplicateUser:
        return json_answer({"error": "Duplicate username."}, 400)
    except ValueError as error:
        return json_answer({"error": str(error)}, 400)


async def get_settings(request: web.Request) -> web.Response:
    return json_answer(_users(request).settings(_user(request)))


async def get_setting(request: web.Request) -> web.Response:
    return json_answer(_users(request).settings(_user(request)).get(request.match_info["id"]))


async def post_settings(request: web.Request) -> web.Response:
    user, changes = _user(request), await read_json(request)
    await server_of(request).in_thread(_users(request).change_settings, user, changes)
    return web.Response()


async def post_setting(request: web.Request) -> web.Response:
    user, value = _user(request), await read_json(request, object)
    await server_of(request).in_thread(_users(request).change_settings, user, {request.match_info["id"]: value})
    return web.Response()


# -- userdata


def _path(request: web.Request, name: str, *, status: int = 403) -> str:
    """The path below the user's folder that a name means; answers `status` where it leads out of it."""
    try:
        return checked_path(_users(request).folder(_user(request)), name, for_writing=True)
    except UnsafePathError as error:
        if status == 400:
            raise web.HTTPBadRequest(text=f"Invalid path requested: {error}") from error
        raise web.HTTPForbidden(text=f"Invalid path: {error}") from error


def _file_info(path: str, root: str) -> dict[str, Any]:
    status = os.stat(path)
    relative = os.path.relpath(path, root).replace(os.sep, "/")
    return {"path": relative, "size": status.st_size, "modified": status.st_mtime, "created": status.st_ctime}


def _files_below(folder: str, recurse: bool) -> list[str]:
    """Visible files, sorted; links to folders are not followed."""
    found: list[str] = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recurse else []
        found += [os.path.join(directory, name) for name in sorted(names) if not name.startswith(".")]
    return found


async def list_userdata(request: web.Request) -> web.Response:
    """Files of one folder: paths, `full_info` objects, or with `split` the path and its parts."""
    query = request.query
    if not query.get("dir"):
        return web.Response(status=400, text="Directory not provided")
    folder = _path(request, query["dir"])
    if not os.path.isdir(folder):
        return web.Response(status=404, text="Directory not found")
    wants = {name: query.get(name, "").lower() == "true" for name in ("recurse", "full_info", "split")}

    def describe() -> list:
        files = [_file_info(path, folder) for path in _files_below(folder, wants["recurse"])]
        if wants["full_info"]:
            return files
        names = [file["path"] for file in files]
        return [[name, *name.split("/")] for name in names] if wants["split"] else names

    return json_answer(await server_of(request).in_thread(describe))


async def list_userdata_v2(request: web.Request) -> web.Response:
    """Everything below `path`, folders first, each with its path from the user's folder."""
    root = _path(request, "")
    folder = _path(request, request.query.get("path", ""), status=400)
    if not os.path.exists(folder):
        return json_answer([]) if folder == root else web.Response(status=404, text="Requested path not found")
    if not os.path.isdir(folder):
        return web.Response(status=400, text="Requested path is not a directory")
    return json_answer(await server_of(request).in_thread(_describe_tree, folder, root))


def _describe_tree(folder: str, root: str) -> list[dict[str, Any]]:
    entries = []
    for directory, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            path = os.path.relpath(os.path.join(directory, name), root).replace(os.sep, "/")
            entries.append({"name": name, "path": path, "type": "directory"})
        for name in names:
            if not name.startswith("."):
                info = _file_info(os.path.join(directory, name), root)
                entries.append({"name": name, "path": info["path"], "type": "file", "size": info["size"], "modified": info["modified"]})
    entries.sort(key=lambda entry: (entry["type"] != "directory", entry["name"].lower(), entry["path"]))
    return entries


async def get_userdata(request: web.Request) -> web.StreamResponse:
    name = request.match_info["file"]
    # The one file of a user that the interface loads as a style sheet; it comes from that user alone.
    return file_answer(_path(request, name), trusted=name == "user.css")


async def post_userdata(request: web.Request) -> web.Response:
    path = _path(request, request.match_info["file"])
    if request.query.get("overwrite") == "false" and os.path.exists(path):
        return web.Response(status=409, text="File already exists")
    content = await request.read()
    try:
        await server_of(request).in_thread(replace_file, path, content)
    except OSError as error:
        return web.Response(status=400, text=f"Cannot save the file: {error.strerror}. Choose another name.")
    return _saved(request, path)


async def delete_userdata(request: web.Request) -> web.Response:
    path = _path(request, request.match_info["file"])
    if not os.path.isfile(path):
        return web.Response(status=404)
    os.remove(path)
    return web.Response(status=204)


async def move_userdata(request: web.Request) -> web.Response:
    source, target = _path(request, request.match_info["file"]), _path(request, request.match_info["dest"])
    if not os.path.exists(source):
        return web.Response(status=404)
    if request.query.get("overwrite") == "false" and os.path.exists(target):
        return web.Response(status=409, text="File already exists")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.move(source, target)
    except OSError as error:
        return web.Response(status=400, text=f"Cannot move the file: {error.strerror}. Choose another name.")
    return _saved(request, target)


def _saved(request: web.Request, path: str) -> web.Response:
    info = _file_info(path, _path(request, ""))
    return json_answer(info if request.query.get("full_info", "").lower() == "true" else info["path"])


ROUTES = (
    web.get("/users", get_users),
    web.post("/users", post_user),
    web.get("/settings", get_settings),
    web.get("/settings/{id}", get_setting),
    web.post("/settings", post_settings),
    web.post("/settings/{id}", post_setting),
    web.get("/userdata", list_userdata),
    web.get("/v2/userdata", list_userdata_v2),
    web.get("/userdata/{file}", get_userdata),
    web.post("/userdata/{file}", post_userdata),
    web.delete("/userdata/{file}", delete_userdata),
    web.post("/userdata/{file}/move/{dest}", move_userdata),
)
