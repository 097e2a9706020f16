"""`comfy.cli_args`: the few flags that packs read, from the current host."""

from __future__ import annotations

from typing import Any

from ...context import current_host

__all__ = ["args", "args_parsing", "enable_args_parsing"]

args_parsing = True


def enable_args_parsing(enable: bool = True) -> None:
    """ComfyUI's switch; this host has read its command line before any pack is loaded."""


class _Arguments:
    """Flags of the current host under ComfyUI's names."""

    @property
    def cpu(self) -> bool:
        return current_host().settings.device == "cpu"

    @property
    def disable_metadata(self) -> bool:
        return current_host().settings.disable_metadata

    @property
    def preview_method(self) -> str:
        return current_host().settings.preview_method

    @property
    def output_directory(self) -> str:
        return current_host().paths.output_directory

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None  # as ComfyUI's namespace holds for a flag that was not given


args = _Arguments()
