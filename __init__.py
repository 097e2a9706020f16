"""Rectiflow: samplers, inversion and accelerators for rectified-flow transformers.

This folder is the Python package `rectiflow` and, under whatever name it is linked into `custom_nodes`, a ComfyUI node
pack. Importing it loads the node tables only: torch and the algorithms are imported when a node first runs.
"""

from .nodes import MISSING_PALETTES, NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

WEB_DIRECTORY = "./web"
__version__ = "0.1.0"
__all__ = ["MISSING_PALETTES", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "__version__"]
