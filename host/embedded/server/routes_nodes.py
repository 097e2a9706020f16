"""What the interface asks about nodes, models, packs and the machine."""

from __future__ import annotations

import json
import os
import sys
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from aiohttp import web
from PIL import Image, UnidentifiedImageError

from .. import model_management
from ..folder_paths import FolderPaths, filter_files_content_types, map_legacy, supported_pt_extensions
from ..safe_files import UnsafePathError, checked_path
from .files import packaged_file
from .front_end import COMFYUI_VERSION, OLDEST_FRONT_END
from .json_text import dumps
from .packs import example_files, example_workflows, global_subgraphs, read_translations
from .state import Server, json_answer, server_of, text_answer

__all__ = ["ROUTES", "STATIC_ROUTES"]

HIDDEN_KINDS = ("configs", "custom_nodes")
MAX_METADATA_HEADER = 1 << 20


# -- nodes


async def get_object_info(request: web.Request) -> web.Response:
    server = server_of(request)
    return text_answer(await server.in_thread(lambda: dumps(server.host.registry.all_object_info())))


async def get_object_info_of(request: web.Request) -> web.Response:
    registry, class_id = server_of(request).host.registry, request.match_info["node_class"]
    if class_id not in registry:
        return json_answer({})
    return json_answer({class_id: await server_of(request).in_thread(registry.object_info, class_id)})


async def get_embeddings(request: web.Request) -> web.Response:
    names = await server_of(request).in_thread(server_of(request).host.paths.get_filename_list, "embeddings")
    return json_answer([os.path.splitext(name)[0] for name in names])


# -- models


def _folders(request: web.Request) -> tuple[FolderPaths, str, list[str]]:
    paths, kind = server_of(request).host.paths, request.match_info["folder"]
    if map_legacy(kind) not in paths.folder_names_and_paths:
        raise web.HTTPNotFound
    return paths, kind, paths.get_folder_paths(kind)


async def get_models(request: web.Request) -> web.Response:
    return json_answer(list(server_of(request).host.paths.folder_names_and_paths))


async def get_models_of(request: web.Request) -> web.Response:
    paths, kind, _ = _folders(request)
    return json_answer(await server_of(request).in_thread(paths.get_filename_list, kind))


async def get_model_folders(request: web.Request) -> web.Response:
    paths = server_of(request).host.paths
    kinds = [kind for kind in paths.folder_names_and_paths if kind not in HIDDEN_KINDS]
    return json_answer([{"name": kind, "folders": paths.get_folder_paths(kind)} for kind in kinds])


async def get_model_files(request: web.Request) -> web.Response:
    _, _, folders = _folders(request)
    return json_answer(await server_of(request).in_thread(_model_files, folders))


def _model_files(folders: list[str]) -> list[dict[str, Any]]:
    found = []
    for index, folder in enumerate(folders):
        for directory, below, names in os.walk(folder, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if os.path.relpath(directory, folder).count(os.sep) > 20:  # a link in a circle
                below.clear()
            for name in sorted(names):
                path = os.path.join(directory, name)
                if name.startswith(".") or os.path.splitext(name)[1].lower() not in supported_pt_extensions or not os.path.isfile(path):
                    continue
                status = os.stat(path)
                relative = os.path.relpath(path, folder)
                found.append(
                    {"name": relative, "pathIndex": index, "modified": status.st_mtime, "created": status.st_ctime, "size": status.st_size}
                )
    return found


async def get_model_preview(request: web.Request) -> web.Response:
    """The picture beside a model file, as webp."""
    _, _, folders = _folders(request)
    index = request.match_info["index"]
    if not (index.isascii() and index.isdigit() and int(index[:9]) < len(folders)):
        raise web.HTTPNotFound
    body = await server_of(request).in_thread(_model_preview, folders[int(index)], request.match_info["filename"])
    if body is None:
        raise web.HTTPNotFound
    return web.Response(body=body, content_type="image/webp")


def _model_preview(folder: str, name: str) -> bytes | None:
    try:
        stem = os.path.splitext(checked_path(folder, name, follow_links=True))[0]
    except UnsafePathError:
        return None
    directory, base = os.path.split(stem)
    beside = os.listdir(directory) if os.path.isdir(directory) else []
    fitting = [name for name in beside if os.path.splitext(name)[0] in (base, f"{base}.preview")]
    for picture in sorted(filter_files_content_types(fitting, ["image"])):
        try:
            with Image.open(os.path.join(directory, picture)) as image:
                target = BytesIO()
                image.save(target, format="WEBP")
            return target.getvalue()
        except (UnidentifiedImageError, OSError, ValueError):
            continue
    return None


async def view_metadata(request: web.Request) -> web.Response:
    """The `__metadata__` of a safetensors file."""
    paths, kind, _ = _folders(request)
    name = request.query.get("filename", "")
    path = paths.get_full_path(kind, name) if name.endswith(".safetensors") else None
    metadata = None if path is None else await server_of(request).in_thread(_safetensors_metadata, path)
    if metadata is None:
        raise web.HTTPNotFound
    return json_answer(metadata)


def _safetensors_metadata(path: str) -> dict | None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_METADATA_HEADER:
            return None
        try:
            metadata = json.loads(file.read(length)).get("__metadata__")
        except (ValueError, RecursionError, AttributeError):
            return None
    return metadata if isinstance(metadata, dict) else None


# -- the machine


async def get_system_stats(request: web.Request) -> web.Response:
    return json_answer(await server_of(request).in_thread(_system_stats, server_of(request)))


def _system_stats(server: Server) -> dict[str, Any]:
    memory, device = server.host.memory, server.host.memory.device
    cpu = torch.device("cpu")
    held = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return {
        "system": {
            "os": os.name,
            "ram_total": memory.total(cpu),
            "ram_free": memory.free(cpu),
            "comfyui_version": COMFYUI_VERSION,
            "required_frontend_version": OLDEST_FRONT_END,
            "installed_templates_version": None,
            "required_templates_version": None,
            "python_version": sys.version,
            "pytorch_version": torch.__version__,
            "embedded_python": False,
            "argv": sys.argv,
        },
        "devices": [
            {
                "name": model_management.get_torch_device_name(device),
                "type": device.type,
                "index": device.index,
                "vram_total": memory.total(device),
                "vram_free": memory.free(device),
                "torch_vram_total": held,
                "torch_vram_free": held - used,
            }
        ],
    }


async def get_features(request: web.Request) -> web.Response:
    return json_answer(server_of(request).features)


# -- packs and the interface's own files


async def get_extensions(request: web.Request) -> web.Response:
    """Every script of the interface's extensions and of the packs' web folders."""
    server = server_of(request)

    def find() -> list[str]:
        found = [f"/extensions/{name}" for name in _scripts(server.front_end / "extensions")] if server.front_end else []
        for pack, folder in server.host.registry.web_directories.items():
            found += [f"/extensions/{quote(pack)}/{name}" for name in _scripts(Path(folder))]
        return found

    return json_answer(await server.in_thread(find))


def _scripts(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.js"))


async def get_extension_file(request: web.Request) -> web.StreamResponse:
    """A file of a pack's web folder, its help pages among them; other names are the interface's own extensions."""
    server, pack, name = server_of(request), request.match_info["pack"], request.match_info["name"]
    folder = server.host.registry.web_directories.get(pack)
    if folder is not None:
        return packaged_file(folder, name)
    return packaged_file(server.front_end / "extensions", f"{pack}/{name}") if server.front_end else web.Response(status=404)


async def get_workflow_templates(request: web.Request) -> web.Response:
    """Pack → names of its example graphs, for the template browser."""
    server = server_of(request)
    return json_answer(await server.in_thread(example_workflows, server.host.registry))


async def get_workflow_template(request: web.Request) -> web.StreamResponse:
    """An example graph (.json) or its picture (.jpg)."""
    server = server_of(request)
    for folder in example_files(server.host.registry, request.match_info["pack"]):
        answer = packaged_file(folder, request.match_info["name"])
        if answer.status == 200:
            return answer
    return web.Response(status=404)


async def get_i18n(request: web.Request) -> web.Response:
    server = server_of(request)
    return json_answer(await server.in_thread(read_translations, server.host.registry))


async def get_subgraphs(request: web.Request) -> web.Response:
    server = server_of(request)
    found = await server.in_thread(global_subgraphs, server.host.registry)
    return json_answer({key: {name: value for name, value in entry.items() if name != "data"} for key, entry in found.items()})


async def get_subgraph(request: web.Request) -> web.Response:
    server = server_of(request)
    found = await server.in_thread(global_subgraphs, server.host.registry)
    entry = found.get(request.match_info["id"])
    return json_answer(None) if entry is None else json_answer(entry)


async def get_node_replacements(request: web.Request) -> web.Response:
    return json_answer({})


async def get_template_index(request: web.Request) -> web.StreamResponse:
    """The list of ComfyUI's own templates; this host ships none, an empty list keeps the browser's console quiet."""
    server, name = server_of(request), request.match_info["name"]
    if server.front_end is not None:
        answer = packaged_file(server.front_end / "templates", name)
        if answer.status == 200:
            return answer
    if name == "index_logo.json":
        return json_answer({})
    return json_answer([]) if name.startswith("index") and name.endswith(".json") else web.Response(status=404)


async def get_static(request: web.Request) -> web.StreamResponse:
    """The interface: `/` is its page, everything else a file below its folder."""
    server, name = server_of(request), request.match_info.get("name", "")
    if server.front_end is None:
        if name:
            return web.Response(status=404)
        return web.Response(text="The interface is not installed: pip install comfyui-frontend-package, or give --front-end-root.")
    answer = packaged_file(server.front_end, name or "index.html")
    if not name:
        answer.headers.update({"Cache-Control": "no-cache", "Pragma": "no-cache", "Expires": "0"})
    return answer


ROUTES = (
    web.get("/object_info", get_object_info),
    web.get("/object_info/{node_class}", get_object_info_of),
    web.get("/embeddings", get_embeddings),
    web.get("/models", get_models),
    web.get("/models/{folder}", get_models_of),
    web.get("/experiment/models", get_model_folders),
    web.get("/experiment/models/{folder}", get_model_files),
    web.get("/experiment/models/preview/{folder}/{index}/{filename:.*}", get_model_preview),
    web.get("/view_metadata/{folder}", view_metadata),
    web.get("/system_stats", get_system_stats),
    web.get("/features", get_features),
    web.get("/extensions", get_extensions),
    web.get("/workflow_templates", get_workflow_templates),
    web.get("/workflow_templates/{pack}/{name}", get_workflow_template),
    web.get("/i18n", get_i18n),
    web.get("/global_subgraphs", get_subgraphs),
    web.get("/global_subgraphs/{id}", get_subgraph),
    web.get("/node_replacements", get_node_replacements),
)
# Without a twin under /api, and asked last: the final pattern takes every path.
STATIC_ROUTES = (
    web.get("/extensions/{pack}/{name:.+}", get_extension_file),
    web.get("/templates/{name:.+}", get_template_index),
    web.get("/", get_static),
    web.get("/{name:.+}", get_static),
)
