"""ComfyUI's module names for third-party packs, inside the server process only.

A pack written for ComfyUI imports `comfy.utils`, `folder_paths`, `nodes` and so on. `install` puts a finder on the import
path that answers those names with modules that forward, attribute by attribute, to the embedded host: reading, assigning
and deleting reach the same object that the host itself uses. A name that this host does not offer raises an ImportError
or AttributeError that says so. Nothing here imports the modules it forwards to before a pack asks for them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .table import FORWARDS, PACKAGES

__all__ = ["installed"]

HOST = __package__.rsplit(".", 2)[0]  # the package of host/embedded, under whatever name the pack was loaded


class ForwardingModule(ModuleType):
    """A module whose attributes are those of other modules, the first that has one winning."""

    _targets: tuple[ModuleType, ...]

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return sorted({public for target in self._targets for public in dir(target) if not public.startswith("_")})
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        for target in self._targets:
            try:
                return getattr(target, name)
            except AttributeError:
                continue
        raise AttributeError(f"{self.__name__}.{name} is part of ComfyUI that this host does not offer")

    def __setattr__(self, name: str, value: Any) -> None:
        # A submodule becomes an attribute of its alias; everything else is meant for the host's module.
        if name.startswith("__") or isinstance(value, ForwardingModule) or not self._targets:
            ModuleType.__setattr__(self, name, value)
        else:
            setattr(self._targets[0], name, value)

    def __dir__(self) -> list[str]:
        return sorted(set(ModuleType.__dir__(self)).union(*(dir(target) for target in self._targets)))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every name of the table, and refuses the rest of ComfyUI's packages instead of finding another ComfyUI."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name in FORWARDS or name in PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, origin="rectiflow alias", is_package=name in PACKAGES)
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"{name} is part of ComfyUI that this host does not offer", name=name)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ForwardingModule(spec.name)
        targets = tuple(importlib.import_module(target, HOST) for target in FORWARDS.get(spec.name, ()))
        ModuleType.__setattr__(module, "_targets", targets)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the targets are imported already."""


@contextmanager
def installed() -> Iterator[None]:
    """`with installed(): …` offers the names; afterwards they are gone, with every alias module that was imported."""
    finder = _Finder()
    roots = {name.split(".")[0] for name in (*FORWARDS, *PACKAGES)}
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in roots}
    for name in before:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, ForwardingModule)]:
            del sys.modules[name]
        sys.modules.update(before)
