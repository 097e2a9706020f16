"""`comfyui_version`: the release this host speaks for."""

from __future__ import annotations

from ..front_end import COMFYUI_VERSION

__version__ = COMFYUI_VERSION
