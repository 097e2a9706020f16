"""The palettes: one module a palette. A palette that fails to import costs its own nodes and says which and why."""

from __future__ import annotations

import importlib
import logging

from .declare import Node

PALETTES = (
    "tiny", "samplers", "schedules", "inversion", "pictures", "guidance", "steering", "metrics", "compare",
    "editing", "masks", "prediction", "caching", "region", "cache_schedules", "gated_caching", "cache_reports", "pairs", "rope", "training",
    "attention", "accelerate", "context_drop",
    "quantization", "compressed_files",
    "pruning", "depth", "width", "timestep_width", "low_rank", "token_tools", "wavelets", "packing",
)


def load_palettes(names: tuple[str, ...] = PALETTES) -> tuple[dict[str, type], dict[str, str]]:
    """Import each palette and collect its node classes.

    Returns:
        (class id → class, palette → reason) where the second names the palettes that could not be imported.
    """
    classes: dict[str, type] = {}
    missing: dict[str, str] = {}
    for palette in names:
        try:
            module = importlib.import_module(f".{palette}", __name__)
        except Exception as error:  # any failure of one palette must leave the others standing
            missing[palette] = f"{type(error).__name__}: {error}"
            logging.warning("Rectiflow: palette '%s' is not available (%s)", palette, missing[palette])
            continue
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Node) and value.__module__ == module.__name__ and value.TITLE:
                classes[value.__name__] = value
    return classes, missing


NODE_CLASS_MAPPINGS, MISSING_PALETTES = load_palettes()
NODE_DISPLAY_NAME_MAPPINGS = {class_id: cls.TITLE for class_id, cls in NODE_CLASS_MAPPINGS.items()}
