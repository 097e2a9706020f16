"""The core nodes that graphs for flow models use, under ComfyUI's class ids, inputs and defaults.

Importing this package imports neither torch nor Pillow.
"""

from __future__ import annotations

from . import (
    conditioning,
    custom_sampling,
    image,
    latent,
    latent_files,
    loaders,
    mask,
    model_sampling,
    pictures,
    sampling,
    sigmas,
    utils,
    vae,
)
from .declare import CoreNode

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

_MODULES = (
    loaders,
    conditioning,
    latent,
    latent_files,
    vae,
    sampling,
    custom_sampling,
    sigmas,
    model_sampling,
    pictures,
    image,
    mask,
    utils,
)

NODE_CLASS_MAPPINGS: dict[str, type[CoreNode]] = {
    name: value
    for module in _MODULES
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, CoreNode) and value.__module__ == module.__name__ and not name.startswith("_")
}
NODE_DISPLAY_NAME_MAPPINGS = {name: cls.DISPLAY_NAME for name, cls in NODE_CLASS_MAPPINGS.items() if cls.DISPLAY_NAME is not None}
