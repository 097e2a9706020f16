"""What packs bring besides nodes: example graphs, translations, shared subgraphs."""

from __future__ import annotations

import hashlib
import json
import logging
import runpy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..execution.registry import NodeRegistry
from ..folder_paths import FolderPaths

__all__ = ["example_files", "example_workflows", "global_subgraphs", "read_translations", "run_prestartup_scripts"]

# Names under which ComfyUI looks for example graphs; the first is the one its documentation recommends.
EXAMPLE_FOLDERS = ("example_workflows", "example", "examples", "workflow", "workflows")
TRANSLATION_FILES = ("nodeDefs", "commands", "settings")


def example_files(registry: NodeRegistry, pack: str) -> list[Path]:
    """The folders in which a pack keeps example graphs and their pictures."""
    root = registry.pack_directories.get(pack)
    return [] if root is None else [folder for folder in (Path(root) / name for name in EXAMPLE_FOLDERS) if folder.is_dir()]


def example_workflows(registry: NodeRegistry) -> dict[str, list[str]]:
    """Pack → names of its graphs; packs without any are left out."""
    found = {
        pack: [graph.stem for folder in example_files(registry, pack) for graph in sorted(folder.glob("*.json"))]
        for pack in registry.pack_directories
    }
    return {pack: names for pack, names in found.items() if names}


def read_translations(registry: NodeRegistry) -> dict[str, Any]:
    """Language → texts, merged over all packs in the order in which they were loaded."""
    merged: dict[str, Any] = {}
    for root in registry.pack_directories.values():
        for folder in sorted(Path(root, "locales").glob("*/")):
            texts = _read_object(folder / "main.json")
            for name in TRANSLATION_FILES:
                more = _read_object(folder / f"{name}.json")
                if more:
                    texts[name] = more
            if texts:
                _merge(merged.setdefault(folder.name, {}), texts)
    return merged


def global_subgraphs(registry: NodeRegistry) -> dict[str, dict[str, Any]]:
    """Id → shared subgraph of a pack, with its JSON text under `data`."""
    found = {}
    for pack, root in registry.pack_directories.items():
        for path in sorted(Path(root, "subgraphs").glob("*.json")):
            key = hashlib.sha256(f"{pack}/{path.name}".encode()).hexdigest()
            entry = {
                "source": "custom_node",
                "name": path.stem,
                "path": f"{pack}/subgraphs/{path.name}",
                "info": {"node_pack": f"custom_nodes.{pack}"},
            }
            found[key] = {**entry, "data": path.read_text(encoding="utf-8")}
    return found


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        logging.error("Cannot read translations in %s: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def run_prestartup_scripts(paths: FolderPaths, only: Collection[str] | None) -> None:
    """Run the `prestartup_script.py` of every pack that will be loaded, before any of them is imported.

    Args:
        only: names of the packs to be loaded; None means all of them.
    """
    for folder in paths.get_folder_paths("custom_nodes"):
        for script in sorted(Path(folder).glob("*/prestartup_script.py")):
            pack = script.parent.name
            if pack.endswith(".disabled") or (only is not None and pack not in only):
                continue
            try:
                runpy.run_path(str(script))
            except (Exception, SystemExit) as error:  # a pack's script must not keep the server from starting
                logging.error("%s failed: %s: %s", script, type(error).__name__, error)
