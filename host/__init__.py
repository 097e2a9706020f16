"""The port: every name our nodes need from a host, from ComfyUI where the pack runs inside it, else from host/embedded.

The embedded host announces itself (sys.modules["rectiflow_embedded_host"]) before anything imports the port, so that the
`comfy` alias package its server offers to third-party packs is never taken for ComfyUI.
"""

from __future__ import annotations

import importlib.util
import sys

ANNOUNCED = "rectiflow_embedded_host"


def _inside_comfyui() -> bool:
    return ANNOUNCED not in sys.modules and importlib.util.find_spec("comfy") is not None


if _inside_comfyui():
    from .comfyui import *  # noqa: F403
    from .comfyui import __all__
else:
    from .embedded.port import *  # noqa: F403
    from .embedded.port import __all__  # noqa: F401
