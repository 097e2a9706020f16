"""Where the ComfyUI interface lies, and which ComfyUI this host speaks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

__all__ = ["COMFYUI_VERSION", "PACKAGE", "find_front_end", "front_end_version"]

# The release whose routes, messages and node descriptions this server gives; the interface compares it with what it needs.
COMFYUI_VERSION = "0.3.64"
PACKAGE = "comfyui-frontend-package"


def front_end_version() -> str | None:
    """Version of the installed interface package."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_front_end(chosen: Path | None) -> Path | None:
    """The folder with the interface's index.html: `chosen`, else the installed package's; None where there is none."""
    if chosen is not None:
        return chosen
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(location) / "static" / "index.html").is_file():
            return Path(location) / "static"
    return None
