"""The embedded host: runs graphs in this process, without ComfyUI and without a server.

    from rectiflow.host.embedded import make_host, run_graph

    result = run_graph("workflows/api/text_to_image.json", make_host("my_folder"))
    print(result.files)

Importing this module loads neither torch nor any node; `make_host` does.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .. import ANNOUNCED
from .context import Host, HostSettings, current_host, use_host

if TYPE_CHECKING:
    from .execution.caching import CacheSettings
    from .execution.executor import PromptExecutor

__all__ = [
    "Host",
    "HostSettings",
    "NodeExecutionError",
    "PromptError",
    "RunInterrupted",
    "RunResult",
    "announce",
    "current_host",
    "make_host",
    "run_graph",
    "use_host",
]

PACKAGE = __name__.rsplit(".", 2)[0]  # the pack's root, `rectiflow` or what a host called it
PathArgument = str | os.PathLike | None


class PromptError(Exception):
    """A graph cannot run. `error` and `node_errors` are the objects that a server answers with."""

    def __init__(self, error: Mapping[str, Any], node_errors: Mapping[str, Mapping] | None = None):
        self.error = dict(error)
        self.node_errors = dict(node_errors or {})
        super().__init__("\n".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        if not self.node_errors:
            yield ": ".join(part for part in (self.error["message"], self.error.get("details")) if part)
            return
        yield self.error["message"]
        for node_id, entry in self.node_errors.items():
            for error in entry["errors"]:
                yield f"  node {node_id} ({entry['class_type']}): {error['message']}: {error['details']}"


class NodeExecutionError(Exception):
    """A node raised while it ran.

    `message` is the node's own; `exception_type` its class as `module.Class`; `traceback` formatted lines.
    """

    def __init__(self, node_id: str, node_type: str, message: str, exception_type: str = "", traceback: Iterable[str] = ()):
        super().__init__(f"node {node_id} ({node_type}): {message}")
        self.node_id = node_id
        self.node_type = node_type
        self.message = message
        self.exception_type = exception_type
        self.traceback = tuple(traceback)


class RunInterrupted(Exception):
    """The host's interrupt flag stopped the run at a node."""

    def __init__(self, node_id: str, node_type: str):
        super().__init__(f"interrupted at node {node_id} ({node_type})")
        self.node_id = node_id
        self.node_type = node_type


@dataclass(frozen=True)
class RunResult:
    """What one run of a graph produced.

    outputs: node id → what the node shows (`{"images": [{"filename", "subfolder", "type"}]}` and the like).
    files: the files among them, as paths. seconds: wall clock of the run, validation left out.
    node_seconds: node id → seconds in the node's own function; cached nodes do not appear.
    cached: ids of the nodes whose results were there already. history: the entry as a server stores it.
    """

    prompt_id: str
    outputs: Mapping[str, Mapping[str, Any]]
    files: tuple[Path, ...]
    seconds: float
    node_seconds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    cached: tuple[str, ...] = ()
    history: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), repr=False)


def announce() -> None:
    """Say that this process runs on the embedded host, before anything asks the port for one."""
    sys.modules.setdefault(ANNOUNCED, sys.modules[__name__])


def make_host(
    base_directory: PathArgument = None,
    *,
    output_directory: PathArgument = None,
    input_directory: PathArgument = None,
    temp_directory: PathArgument = None,
    user_directory: PathArgument = None,
    models_directory: PathArgument = None,
    extra_model_paths: Iterable[str | os.PathLike] = (),
    custom_nodes: Iterable[str | os.PathLike] = (),
    settings: HostSettings | None = None,
) -> Host:
    """Build a host with the core nodes, this pack, and the packs of its custom_nodes folders.

    Args:
        base_directory: holds models/, input/, output/, temp/, user/ and custom_nodes/; by default the pack's own folder.
            The other directories replace single ones of these. None of them is created here.
        extra_model_paths: files in the form of ComfyUI's extra_model_paths.yaml.
        custom_nodes: further folders whose entries are node packs.
        settings: device, dtype, previews.

    A pack that cannot be loaded is named in `host.registry.failures`; nothing is raised for it.
    """
    announce()
    from .core_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .execution.registry import NodeRegistry
    from .extra_model_paths import load_extra_path_config
    from .folder_paths import FolderPaths
    from .model_management import MemoryManager

    root = Path(importlib.import_module(PACKAGE).__file__).parent
    paths = FolderPaths(
        base_directory or root,
        output_directory=output_directory,
        input_directory=input_directory,
        temp_directory=temp_directory,
        user_directory=user_directory,
        models_directory=models_directory,
    )
    for config in extra_model_paths:
        load_extra_path_config(os.fspath(config), paths)
    for folder in custom_nodes:
        paths.add_model_folder_path("custom_nodes", os.path.abspath(folder))
    settings = settings or HostSettings()
    host = Host(paths=paths, registry=NodeRegistry(), memory=MemoryManager(settings), settings=settings)
    with use_host(host):  # packs may look at the folders while they are imported
        host.registry.add(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS)
        core = frozenset(host.registry)
        host.registry.load_pack(root, PACKAGE, core)
        for folder in paths.get_folder_paths("custom_nodes"):
            host.registry.load_folder(folder, protected=core)
    return host


def run_graph(
    graph: Mapping[str, Any] | str | os.PathLike,
    host: Host | None = None,
    cache: CacheSettings | str | None = None,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
    *,
    targets: Iterable[str] | None = None,
    prompt_id: str | None = None,
    executor: PromptExecutor | None = None,
) -> RunResult:
    """Validate and run a graph, here and now.

    Args:
        graph: a prompt in API format, a workflow in UI format, or the path of a JSON or PNG file that holds one.
            It is not changed.
        host: where it runs; the current host by default.
        cache: "classic", "lru:N", "none" or CacheSettings, for a graph that expands or runs its nodes more than once.
        on_event: called with (event, data) for every message that a server would send.
        targets: ids of the output nodes to run; all by default.
        executor: reuse one to keep results between runs; its host and cache settings are the ones that count.

    Raises:
        NodeInputError: the file or the object holds no graph.
        PromptError: the graph is not valid; nothing ran. A prompt of which only some outputs are valid counts as not valid.
        NodeExecutionError: a node failed.
        RunInterrupted: `host.interrupt` was set.
        KeyboardInterrupt: Ctrl-C; the run stops at the node's next step, a second one at once.
    """
    from .execution.caching import CacheSettings
    from .execution.executor import PromptExecutor, run_to_end
    from .execution.graph_files import load_graph
    from .execution.validation import validate_prompt

    host = executor.host if executor is not None else host or current_host()
    prompt_id = prompt_id or str(uuid.uuid4())
    with use_host(host):
        loaded = load_graph(graph, host.registry)
        targets = None if targets is None else list(targets)
        checked = run_to_end(validate_prompt(host.registry, loaded.prompt, targets, prompt_id))
        if not checked.valid or checked.node_errors:
            raise PromptError(checked.error or {"message": "Prompt outputs failed validation"}, checked.node_errors)
        if executor is None:
            settings = CacheSettings.parse(cache) if isinstance(cache, str) else cache
            executor = PromptExecutor(host, settings)
        executor.send = (lambda event, data, _: on_event(event, data)) if on_event is not None else None
        extra_data = {"client_id": prompt_id}
        if loaded.workflow is not None:
            extra_data["extra_pnginfo"] = {"workflow": loaded.workflow}
        started = time.perf_counter()
        with _ctrl_c_interrupts(host) as pressed:
            history = executor.execute(loaded.prompt, prompt_id, extra_data, checked.outputs)
        seconds = time.perf_counter() - started
    if pressed.is_set():
        raise KeyboardInterrupt
    return _result(host, prompt_id, history, seconds, executor.node_seconds)


def _result(host: Host, prompt_id: str, history: dict[str, Any], seconds: float, node_seconds: dict[str, float]) -> RunResult:
    messages = dict(history["status"]["messages"])
    if "execution_interrupted" in messages:
        stopped = messages["execution_interrupted"]
        raise RunInterrupted(stopped["node_id"], stopped["node_type"])
    if "execution_error" in messages:
        failed = messages["execution_error"]
        message = failed["exception_message"].rstrip("\n")
        raise NodeExecutionError(failed["node_id"], failed["node_type"], message, failed["exception_type"], failed["traceback"])
    return RunResult(
        prompt_id=prompt_id,
        outputs=MappingProxyType(history["outputs"]),
        files=tuple(_files_of(host, history["outputs"])),
        seconds=seconds,
        node_seconds=MappingProxyType(node_seconds),
        cached=tuple(messages["execution_cached"]["nodes"]),
        history=MappingProxyType(history),
    )


def _files_of(host: Host, outputs: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """Every `{"filename", "subfolder", "type"}` that a node showed, as a path."""
    for ui in outputs.values():
        for items in ui.values():
            for item in items if isinstance(items, (list, tuple)) else ():
                if isinstance(item, Mapping) and "filename" in item:
                    folder = host.paths.get_directory_by_type(item.get("type", "output"))
                    if folder is not None:
                        yield Path(folder, item.get("subfolder") or "", item["filename"])


@contextmanager
def _ctrl_c_interrupts(host: Host) -> Iterator[threading.Event]:
    """Let the first Ctrl-C set the interrupt flag and the second one raise, unless the program handles the signal itself."""
    pressed = threading.Event()
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def handle(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        host.interrupt.set()

    if ours:
        signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
