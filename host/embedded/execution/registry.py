"""Which node classes there are, where they came from, and how /object_info describes them."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["NodeRegistry", "describe_class"]

NEAREST_NAMES = 3


class NodeRegistry(Mapping[str, type]):
    """Node classes by class id, with what a server needs to know about the packs that brought them.

    Fields:
        classes: class id → class. display_names: class id → name shown on the node.
        python_modules: class id → `nodes`, `comfy_extras.x` or `custom_nodes.<folder>` (badge and help address in the interface).
        web_directories: pack → folder served under /extensions/<pack>. pack_directories: pack → its folder or file.
        failures: path of a pack that could not be loaded → reason.
    """

    def __init__(self) -> None:
        self.classes: dict[str, type] = {}
        self.display_names: dict[str, str] = {}
        self.python_modules: dict[str, str] = {}
        self.web_directories: dict[str, str] = {}
        self.pack_directories: dict[str, str] = {}
        self.failures: dict[str, str] = {}

    def __getitem__(self, class_id: str) -> type:
        return self.classes[class_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    def add(
        self,
        classes: Mapping[str, type],
        display_names: Mapping[str, str] | None = None,
        python_module: str | None = None,
        protected: Iterable[str] = (),
    ) -> None:
        """Register a NODE_CLASS_MAPPINGS and its display names.

        Args:
            python_module: reported for all of them; None leaves it to each class's RELATIVE_PYTHON_MODULE (default `nodes`).
            protected: class ids that must not be replaced (a pack cannot take a core node's place); they are skipped with a warning.
        """
        kept = set(protected)
        for class_id, cls in classes.items():
            if class_id in kept:
                logging.warning("%s: class id %r is taken by a core node and was skipped", python_module, class_id)
                continue
            self.classes[class_id] = cls
            self.python_modules.pop(class_id, None)
            if python_module is not None:
                self.python_modules[class_id] = python_module
        for class_id, name in (display_names or {}).items():
            if class_id not in kept:
                self.display_names[class_id] = name

    def load_pack(self, path: str | os.PathLike, name: str | None = None, protected: Iterable[str] = ()) -> bool:
        """Load one pack: a folder with an `__init__.py`, or a single `.py` file, as ComfyUI loads an entry of custom_nodes.

        A folder that is already imported as a package (our own root, or a pack that another host of this process loaded) is
        used as it is, never imported a second time. Nothing is raised: a pack that fails is recorded in `failures`.

        Args:
            name: the pack's name in `custom_nodes.<name>`; by default the folder's.

        Returns:
            whether the pack brought nodes.
        """
        path = Path(os.path.abspath(path))
        name = name or (path.stem if path.is_file() else path.name)
        if os.path.realpath(path) in map(os.path.realpath, self.pack_directories.values()):
            return True  # the same folder under another link
        try:
            module = _import_pack(path)
            classes = getattr(module, "NODE_CLASS_MAPPINGS", None)
            if classes is None:
                v3 = "; comfy_entrypoint (V3) is not supported here" if hasattr(module, "comfy_entrypoint") else ""
                raise ImportError(f"{path.name} has no NODE_CLASS_MAPPINGS{v3}")
            self.add(classes, getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", None), f"custom_nodes.{name}", protected)
            self._note_directories(name, path, getattr(module, "WEB_DIRECTORY", None))
        except (Exception, SystemExit) as error:  # whatever a foreign pack does at import must not stop the host
            self.failures[str(path)] = f"{type(error).__name__}: {error}"
            logging.warning("Cannot load the node pack %s (%s)", path, self.failures[str(path)])
            logging.debug("Traceback of the failed import of %s", path, exc_info=error)
            return False
        self.failures.pop(str(path), None)
        return True

    def load_folder(self, folder: str | os.PathLike, protected: Iterable[str] = ()) -> list[str]:
        """Load every pack in a `custom_nodes` folder, in order of name; entries starting with a dot, ending in `.disabled` or
        called `__pycache__` are left alone.

        Returns:
            names of the packs that brought nodes.
        """
        if not os.path.isdir(folder):
            return []
        loaded = []
        for entry in sorted(Path(folder).iterdir()):
            if entry.name.startswith(".") or entry.name == "__pycache__" or entry.name.endswith(".disabled"):
                continue
            if entry.is_file() and entry.suffix != ".py":
                continue
            if self.load_pack(entry, protected=protected):
                loaded.append(entry.stem if entry.is_file() else entry.name)
        return loaded

    def nearest(self, class_id: str) -> list[str]:
        """Up to three registered class ids that look like a mistyped one."""
        by_lower = {known.lower(): known for known in self.classes}
        matches = difflib.get_close_matches(class_id[:100].lower(), by_lower, n=NEAREST_NAMES, cutoff=0.6)
        return [by_lower[match] for match in matches]

    def object_info(self, class_id: str) -> dict[str, Any]:
        """The /object_info entry of one class, in the shape of ComfyUI 0.3.64.

        Raises:
            KeyError: the class is not registered; whatever the class's INPUT_TYPES raises.
        """
        return describe_class(class_id, self.classes[class_id], self.display_names.get(class_id), self.python_modules.get(class_id))

    def all_object_info(self) -> dict[str, dict]:
        """/object_info of every class; one whose description fails is left out and logged."""
        described = {}
        for class_id in self.classes:
            try:
                described[class_id] = self.object_info(class_id)
            except Exception as error:  # one broken class must not empty the interface
                logging.error("Cannot describe node class %r: %s: %s", class_id, type(error).__name__, error)
        return described

    def _note_directories(self, name: str, path: Path, web_directory: str | None) -> None:
        self.pack_directories[name] = str(path)
        if web_directory is not None:
            web = os.path.abspath((path if path.is_dir() else path.parent) / web_directory)
            if os.path.isdir(web):
                self.web_directories[name] = web
            else:
                logging.warning("%s: WEB_DIRECTORY %r is not a folder", name, web_directory)


def describe_class(class_id: str, cls: type, display_name: str | None = None, python_module: str | None = None) -> dict[str, Any]:
    """The /object_info entry of a V1 class. A class may offer `node_info()` that returns the entry itself (the core nodes of
    ComfyUI's V3 schema are described differently there)."""
    if hasattr(cls, "node_info"):
        return cls.node_info()
    inputs = cls.INPUT_TYPES()
    outputs = cls.RETURN_TYPES
    entry = {
        "input": inputs,
        "input_order": {category: list(declared) for category, declared in inputs.items()},
        "output": outputs,
        "output_is_list": getattr(cls, "OUTPUT_IS_LIST", [False] * len(outputs)),
        "output_name": getattr(cls, "RETURN_NAMES", outputs),
        "name": class_id,
        "display_name": display_name or class_id,
        "description": getattr(cls, "DESCRIPTION", ""),
        "python_module": python_module or getattr(cls, "RELATIVE_PYTHON_MODULE", "nodes"),
        "category": getattr(cls, "CATEGORY", "sd"),
        "output_node": getattr(cls, "OUTPUT_NODE", False) is True,
    }
    if hasattr(cls, "OUTPUT_TOOLTIPS"):
        entry["output_tooltips"] = cls.OUTPUT_TOOLTIPS
    if getattr(cls, "DEPRECATED", False):
        entry["deprecated"] = True
    if getattr(cls, "EXPERIMENTAL", False):
        entry["experimental"] = True
    if hasattr(cls, "API_NODE"):
        entry["api_node"] = cls.API_NODE
    return entry


def _import_pack(path: Path) -> ModuleType:
    """Import a pack under a name made of its whole path, so that two packs of one folder name do not collide."""
    source = path / "__init__.py" if path.is_dir() else path
    if not source.is_file():
        raise ImportError(f"{path.name} has no __init__.py")
    known = _already_imported(source)
    if known is not None:
        return known
    module_name = str(path).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(module_name, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for key in [key for key in sys.modules if key == module_name or key.startswith(module_name + ".")]:
            del sys.modules[key]
        raise
    return module


def _already_imported(source: Path) -> ModuleType | None:
    """The module of this very file, under whatever name and through whatever links it was imported."""
    wanted = os.path.realpath(source)
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith(source.name) and os.path.realpath(file) == wanted:
            return module
    return None
