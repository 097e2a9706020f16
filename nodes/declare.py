"""How a node is written: one table of inputs, one of outputs, a short `run`; the V1 class face is derived from them.

A node file imports nothing heavy at its top. `run` imports the room it needs, so that the pack's root imports with the
standard library alone and a missing package costs only the nodes that need it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import input_error

__all__ = ["Input", "Output", "Node", "integer", "number", "boolean", "text", "choice", "socket", "seed_input", "steps_of"]


@dataclass(frozen=True)
class Input:
    """One input: its name and type as ComfyUI knows them, the widget's options, and whether it may be left open."""

    name: str
    type: str | tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    optional: bool = False

    def as_v1(self) -> tuple:
        kind = list(self.type) if isinstance(self.type, tuple) else self.type
        return (kind, dict(self.options))


@dataclass(frozen=True)
class Output:
    """One output: socket type, the name beside the socket, and what it holds."""

    type: str
    name: str
    tooltip: str
    is_list: bool = False


def _input(name: str, kind, tooltip: str, optional: bool, advanced: bool, **options) -> Input:
    options = {key: value for key, value in options.items() if value is not None}
    options["tooltip"] = tooltip
    if advanced:
        options["advanced"] = True
    return Input(name, kind, options, optional)


def integer(name: str, default: int, low: int, high: int, tooltip: str, *, step: int = 1, optional=False, advanced=False) -> Input:
    """An INT widget; `low` and `high` are inclusive."""
    return _input(name, "INT", tooltip, optional, advanced, default=default, min=low, max=high, step=step)


def number(
    name: str, default: float, low: float, high: float, tooltip: str, *, step=0.01, round=False, optional=False, advanced=False
) -> Input:
    """A FLOAT widget; `low` and `high` are inclusive; `round` is ComfyUI's option (False keeps every digit)."""
    return _input(name, "FLOAT", tooltip, optional, advanced, default=default, min=low, max=high, step=step, round=round)


def boolean(name: str, default: bool, tooltip: str, *, optional=False, advanced=False) -> Input:
    return _input(name, "BOOLEAN", tooltip, optional, advanced, default=default)


def text(name: str, default: str, tooltip: str, *, multiline=False, optional=False, advanced=False) -> Input:
    return _input(name, "STRING", tooltip, optional, advanced, default=default, multiline=multiline)


def choice(name: str, values: tuple[str, ...], tooltip: str, *, default: str | None = None, optional=False, advanced=False) -> Input:
    """A drop-down; the first value is the default unless another is named."""
    return _input(name, tuple(values), tooltip, optional, advanced, default=default or values[0])


def socket(name: str, kind: str, tooltip: str, *, optional=False) -> Input:
    """A link-only input such as MODEL, SIGMAS or LATENT."""
    return _input(name, kind, tooltip, optional, False)


def seed_input(tooltip: str, name: str = "seed") -> Input:
    return _input(name, "INT", tooltip, False, False, default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True)


def steps_of(total: int) -> Callable[[], None]:
    """What a computation of `total` parts calls for each: it moves the running node's bar and raises where the person interrupts."""
    from ..host import ProgressBar, throw_if_interrupted

    bar = ProgressBar(total)

    def step() -> None:
        bar.update(1)
        throw_if_interrupted()

    return step


class Node:
    """Base of every Rectiflow node.

    A subclass sets TITLE, GROUP, INPUTS, OUTPUTS and defines `run(self, **inputs)` returning a tuple (or ComfyUI's result
    dict); its docstring is the description shown on hover. Optional: SEARCH_ALIASES, OUTPUT_NODE, EXPERIMENTAL, HIDDEN.
    """

    TITLE = ""
    GROUP = ""
    INPUTS: tuple[Input, ...] = ()
    OUTPUTS: tuple[Output, ...] = ()
    HIDDEN: dict[str, str] = {}
    FUNCTION = "execute"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.CATEGORY = f"rectiflow/{cls.GROUP}" if cls.GROUP else "rectiflow"
        cls.DESCRIPTION = inspect.cleandoc(cls.__doc__ or "")
        cls.RETURN_TYPES = tuple(output.type for output in cls.OUTPUTS)
        cls.RETURN_NAMES = tuple(output.name for output in cls.OUTPUTS)
        cls.OUTPUT_TOOLTIPS = tuple(output.tooltip for output in cls.OUTPUTS)
        if any(output.is_list for output in cls.OUTPUTS):
            cls.OUTPUT_IS_LIST = tuple(output.is_list for output in cls.OUTPUTS)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict]:
        table: dict[str, dict] = {"required": {}}
        for declared in cls.INPUTS:
            table.setdefault("optional" if declared.optional else "required", {})[declared.name] = declared.as_v1()
        if cls.HIDDEN:
            table["hidden"] = dict(cls.HIDDEN)
        return table

    def execute(self, **inputs):
        """Refuse numbers that no range check catches (NaN compares false with everything), then run."""
        for declared in self.INPUTS:
            value = inputs.get(declared.name)
            if declared.type == "FLOAT" and isinstance(value, float) and not math.isfinite(value):
                low, high = declared.options["min"], declared.options["max"]
                raise input_error(self.TITLE, declared.name, value, f"a finite number from {low} to {high}", "Enter a number.")
        return self.run(**inputs)
