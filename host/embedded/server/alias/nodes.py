"""`nodes`: the mappings of the current host, and the core node classes by name."""

from __future__ import annotations

from typing import Any

from ...context import current_host
from ...model_management import interrupt_current_processing, throw_exception_if_processing_interrupted

__all__ = ["MAX_RESOLUTION", "before_node_execution", "interrupt_processing"]

MAX_RESOLUTION = 16384


def interrupt_processing(value: bool = True) -> None:
    interrupt_current_processing(value)


def before_node_execution() -> None:
    throw_exception_if_processing_interrupted()


def __getattr__(name: str) -> Any:
    registry = current_host().registry
    tables = {
        "NODE_CLASS_MAPPINGS": registry.classes,
        "NODE_DISPLAY_NAME_MAPPINGS": registry.display_names,
        "EXTENSION_WEB_DIRS": registry.web_directories,
        "LOADED_MODULE_DIRS": registry.pack_directories,
    }
    if name in tables:
        return tables[name]
    if name in registry:
        return registry[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
