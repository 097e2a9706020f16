"""The nodes that a graph may name, described without computing anything."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .failures import CommandError

if TYPE_CHECKING:
    from ..host.embedded.execution.registry import NodeRegistry

__all__ = ["describe_all", "describe_one", "known_nodes"]

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def known_nodes() -> Iterator[NodeRegistry]:
    """The registry of the embedded host; inside the block its folders answer the inputs that list files.

    The host has no memory manager: nothing can run on it, and so torch stays unloaded.
    """
    from ..host.embedded import Host, announce, use_host
    from ..host.embedded.core_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from ..host.embedded.execution.registry import NodeRegistry
    from ..host.embedded.folder_paths import FolderPaths

    announce()
    paths, registry = FolderPaths(ROOT), NodeRegistry()
    with use_host(Host(paths=paths, registry=registry, memory=None)):
        registry.add(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS)
        core = frozenset(registry)
        registry.load_pack(ROOT, name="rectiflow", protected=core)
        for folder in paths.get_folder_paths("custom_nodes"):
            registry.load_folder(folder, protected=core)
        yield registry


def describe_all(registry: NodeRegistry) -> dict[str, dict[str, Any]]:
    """/object_info of every node."""
    return registry.all_object_info()


def describe_one(registry: NodeRegistry, name: str) -> dict[str, dict[str, Any]]:
    """/object_info of the node of that class id or display name, whatever its case.

    Raises:
        CommandError: there is none, or several nodes carry that display name.
    """
    if name in registry:
        return {name: registry.object_info(name)}
    shown = {class_id: registry.display_names.get(class_id, class_id) for class_id in registry}
    wanted = name.casefold()
    matches = [class_id for class_id, title in shown.items() if wanted in (class_id.casefold(), title.casefold())]
    if len(matches) == 1:
        return {matches[0]: registry.object_info(matches[0])}
    if matches:
        raise CommandError(f"several nodes are called '{name}': {', '.join(matches)}. Give the class id of one.")
    by_name = {spelling.casefold(): class_id for class_id, title in shown.items() for spelling in (class_id, title)}
    nearest = dict.fromkeys(by_name[match] for match in difflib.get_close_matches(wanted, by_name, n=4, cutoff=0.5))
    hint = f"The nearest are: {', '.join(nearest)}." if nearest else "`rectiflow nodes` lists them all."
    raise CommandError(f"there is no node '{name}'. {hint}")
