"""Start-up: folders, host, packs, socket, and the orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web

from ....errors import NodeInputError
from .. import announce
from ..context import Host, use_host
from ..core_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from ..execution.registry import NodeRegistry
from ..extra_model_paths import load_extra_path_config
from ..folder_paths import FolderPaths
from ..model_management import MemoryManager
from . import alias
from .alias import prompt_server
from .app import make_app
from .front_end import find_front_end
from .logs import LogBuffer
from .options import ServerOptions, parse_arguments
from .packs import run_prestartup_scripts
from .prompt_queue import PromptQueue
from .state import Server
from .users import Users
from .websocket import Clients
from .worker import Worker

__all__ = ["build_server", "main", "serving"]

PACK = Path(__file__).resolve().parents[3]
PACK_NAME = "rectiflow"
CANNOT_LISTEN = 1
BAD_INPUT = 2
INTERRUPTED = 130


def _paths(options: ServerOptions) -> FolderPaths:
    base = options.base_directory or PACK
    paths = FolderPaths(
        base,
        input_directory=options.input_directory,
        output_directory=options.output_directory,
        temp_directory=options.temp_directory,
        user_directory=options.user_directory,
    )
    beside = base / "extra_model_paths.yaml"
    for config in ([beside] if beside.is_file() else []) + list(options.extra_model_paths):
        load_extra_path_config(str(config), paths)
    # What a graph saves can be loaded by the next one.
    for kind in ("checkpoints", "text_encoders", "vae", "diffusion_models", "loras"):
        folder = "clip" if kind == "text_encoders" else kind
        paths.add_model_folder_path(kind, os.path.join(paths.output_directory, folder))
    return paths


def _build_host(options: ServerOptions) -> Host:
    """A host with the core nodes and none of the packs yet."""
    registry = NodeRegistry()
    registry.add(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS)
    return Host(_paths(options), registry, MemoryManager(options.host), options.host)


def _features(options: ServerOptions) -> dict:
    return {"supports_preview_metadata": True, "max_upload_size": options.limits.upload_bytes}


def build_server(options: ServerOptions, host: Host, logs: LogBuffer) -> Server:
    """Put the parts together; nothing runs and nothing listens yet."""
    clients = Clients(options.limits, _features(options), lambda sid: _greeting(server, sid))
    queue = PromptQueue(options.limits, lambda: server.worker.announce_queue())
    worker = Worker(host, queue, clients, options)
    users = Users(host.paths, options.multi_user)
    server = Server(options, host, queue, clients, logs, users, worker, find_front_end(options.front_end_root), _features(options))
    return server


def _greeting(server: Server, sid: str) -> list[tuple[str, dict]]:
    """What a client hears first: the queue and its id; when its prompt is running, also where."""
    status = {"status": {"exec_info": {"queue_remaining": server.queue.remaining}}, "sid": sid}
    running, node = server.queue.running(), server.worker.current_node
    if running is None or running.client_id != sid or node is None:
        return [("status", status)]
    return [("status", status), ("executing", {"node": node, "display_node": node, "prompt_id": running.prompt_id})]


def _load_packs(server: Server) -> None:
    """Our own pack, then the folders named as custom_nodes; none may take the place of a core node."""
    registry, options = server.host.registry, server.options
    core = frozenset(registry)
    registry.load_pack(PACK, PACK_NAME, protected=core)
    folders = [Path(folder) for folder in server.host.paths.get_folder_paths("custom_nodes") if os.path.isdir(folder)]
    if options.custom_nodes:
        for folder in folders:
            registry.load_folder(folder, protected=core)
    else:
        for path in (folder / name for folder in folders for name in options.custom_nodes_kept):
            if path.exists():
                registry.load_pack(path, protected=core)


@contextlib.contextmanager
def serving(options: ServerOptions, logs: LogBuffer | None = None) -> Iterator[web.Application]:
    """An application with all its packs loaded; ComfyUI's module names answer inside the block only."""
    announce()
    host = _build_host(options)
    server = build_server(options, host, logs or LogBuffer())
    with alias.installed(), use_host(host):
        prompt_server.offer(server)
        host.paths.empty_temp_directory()
        try:
            if options.custom_nodes or options.custom_nodes_kept:
                run_prestartup_scripts(host.paths, None if options.custom_nodes else options.custom_nodes_kept)
            _load_packs(server)
            for folder in (host.paths.input_directory, host.paths.output_directory, host.paths.temp_directory):
                os.makedirs(folder, exist_ok=True)
            yield make_app(server)
        finally:
            host.paths.empty_temp_directory()
            prompt_server.withdraw()


# -- the process


def _configure_logging(options: ServerOptions) -> None:
    """Messages go to stderr, or with --log-stdout to stdout with only errors on stderr."""
    root = logging.getLogger()
    root.setLevel(options.verbose)
    form = logging.Formatter("%(message)s")
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(form)
    root.handlers[:] = [to_stderr]
    if options.log_stdout:
        to_stderr.setLevel(logging.ERROR)
        to_stdout = logging.StreamHandler(sys.stdout)
        to_stdout.setFormatter(form)
        to_stdout.addFilter(lambda record: record.levelno < logging.ERROR)
        root.addHandler(to_stdout)


def _listening_sockets(options: ServerOptions) -> list[socket.socket]:
    """One listening socket an address, all on one port; raises OSError naming the address."""
    sockets: list[socket.socket] = []
    port = options.port
    try:
        for address in options.listen:
            try:
                family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
                listener = socket.socket(family, kind, protocol)
            except OSError as error:
                if address == "::" and sockets:  # "every interface" on a machine without IPv6
                    logging.warning("Not listening on IPv6: %s", error)
                    continue
                raise OSError(f"cannot listen on {address}: {error}; give an address of this machine with --listen") from error
            sockets.append(listener)
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listener.bind(place)
            except OSError as error:
                raise OSError(f"cannot listen on {address} port {port}: {error.strerror}; choose another --port or --listen") from error
            port = listener.getsockname()[1]
            listener.setblocking(False)
    except OSError:
        for listener in sockets:
            listener.close()
        raise
    return sockets


def _tls(options: ServerOptions) -> ssl.SSLContext | None:
    if options.tls_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.tls_certfile, options.tls_keyfile)
    return context


async def _serve(app: web.Application, sockets: list[socket.socket], options: ServerOptions) -> int:
    """Answer requests until SIGINT or SIGTERM; returns the exit status."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    received: list[int] = []

    def stop(number: int, _frame=None) -> None:
        received.append(number)
        loop.call_soon_threadsafe(stopped.set)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    # Open sockets and downloads get a moment to finish; the worker's own patience is in Worker.stop.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    tls = _tls(options)
    try:
        for listener in sockets:
            await web.SockSite(runner, listener, ssl_context=tls, backlog=1024).start()
        urls = _urls(sockets, "http" if tls is None else "https")
        if not options.quiet:
            for url in urls:
                logging.info("To see the GUI go to: %s", url)
        if options.auto_launch:
            webbrowser.open(urls[0])
        await stopped.wait()
        logging.info("Stopping")
    finally:
        await runner.cleanup()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return INTERRUPTED if signal.SIGINT in received else 0


def _urls(sockets: list[socket.socket], scheme: str) -> list[str]:
    urls = []
    for listener in sockets:
        address, port = listener.getsockname()[:2]
        urls.append(f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}")
    return urls


def main(arguments: list[str] | None = None) -> int:
    """`rectiflow serve`: returns 0 after SIGTERM, 130 after Ctrl-C, 1 where the port is taken, 2 for unusable input."""
    options = parse_arguments(arguments)
    if options.cuda_visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.cuda_visible
    sockets: list[socket.socket] = []
    with LogBuffer() as logs:
        _configure_logging(options)
        try:
            if not options.quick_test:
                sockets = _listening_sockets(options)
            with serving(options, logs) as app:
                return 0 if options.quick_test else asyncio.run(_serve(app, sockets, options))
        except NodeInputError as error:
            logging.error("rectiflow serve: %s", error)
            return BAD_INPUT
        except OSError as error:
            logging.error("rectiflow serve: %s", error)
            return CANNOT_LISTEN
        finally:
            for listener in sockets:
                listener.close()
