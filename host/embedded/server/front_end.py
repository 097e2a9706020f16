"""Where the ComfyUI interface lies, and which ComfyUI this host speaks for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["COMFYUI_VERSION", "OLDEST_FRONT_END", "find_front_end"]

# The release whose routes, messages and node descriptions this server gives; the interface compares it with what it needs.
COMFYUI_VERSION = "0.3.64"
# The oldest interface that the browser tests open; an older one shows the person a warning.
OLDEST_FRONT_END = "1.27.10"
PACKAGE = "comfyui_frontend_package"


def find_front_end(chosen: Path | None) -> Path | None:
    """The folder with the interface's index.html: `chosen`, else the installed package's; None where there is none."""
    if chosen is not None:
        return chosen
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(location) / "static" / "index.html").is_file():
            return Path(location) / "static"
    return None
