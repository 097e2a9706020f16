"""The port: every name our nodes need from a host, from ComfyUI where the pack runs inside it, else from host/embedded.

The names are looked up when they are first asked for: `from ..host import ProgressBar` loads the host behind it, while
`import rectiflow.host` and the embedded host's light modules (node table, folders) stay free of torch.

The embedded host announces itself (sys.modules["rectiflow_embedded_host"]) before anything asks the port, so that the
`comfy` alias package its server offers to third-party packs is never taken for ComfyUI.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

ANNOUNCED = "rectiflow_embedded_host"


def _inside_comfyui() -> bool:
    return ANNOUNCED not in sys.modules and importlib.util.find_spec("comfy") is not None


def __getattr__(name: str):
    if name.startswith("__") and name != "__all__" or name in ("embedded", "comfyui"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    port = importlib.import_module(".comfyui" if _inside_comfyui() else ".embedded.port", __name__)
    return getattr(port, name)
