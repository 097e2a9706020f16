"""The running host: where its folders are, which device it uses, its interrupt flag, its progress hook, its node registry.

ComfyUI keeps these as globals of several modules. Here they are fields of one object, reached through `current_host()`, so
that two hosts can live in one process (tests do that) and a server can be torn down without a trace.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

__all__ = ["HostSettings", "Host", "current_host", "use_host"]


@dataclass(frozen=True)
class HostSettings:
    """What the command line decides once.

    device: "auto" (CUDA, then MPS, then CPU), or a torch device string.
    dtype: "auto" (fp32 on CPU, bf16 where the device is fast at it), "fp32", "bf16" or "fp16".
    preview_method: "auto" or "latent2rgb" (Latent2RGB where the latent format has factors), or "none".
    """

    device: str = "auto"
    dtype: str = "auto"
    preview_method: str = "auto"
    disable_metadata: bool = False


@dataclass
class Host:
    """State of one running host. `paths` is a folder_paths.FolderPaths, `registry` an execution.registry.NodeRegistry,
    `memory` a model_management.MemoryManager; they are built by `rectiflow.host.embedded.make_host`."""

    paths: Any
    registry: Any
    memory: Any
    settings: HostSettings = field(default_factory=HostSettings)
    interrupt: threading.Event = field(default_factory=threading.Event)
    progress_hook: Callable[..., None] | None = None


_current: ContextVar[Host | None] = ContextVar("rectiflow_host", default=None)


def current_host() -> Host:
    """The host of this thread of execution; a default one (folders beside the pack, CPU or the first GPU) when none is active."""
    host = _current.get()
    if host is None:
        from . import make_host

        host = make_host()
        _current.set(host)
    return host


class use_host:
    """`with use_host(host): …` makes `host` the current one inside the block."""

    def __init__(self, host: Host):
        self.host = host

    def __enter__(self) -> Host:
        self._token = _current.set(self.host)
        return self.host

    def __exit__(self, *exc) -> None:
        _current.reset(self._token)
