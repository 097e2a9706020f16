"""The one form of a user's error: which node, which input, what was given, what is allowed, what to do."""

from __future__ import annotations

__all__ = ["NodeInputError", "input_error"]


class NodeInputError(ValueError):
    """A value that a user gave cannot be used; the message says where it was given and how to mend it."""


def input_error(node: str, input_name: str, got: object, allowed: str, remedy: str) -> NodeInputError:
    """Build (not raise) the error: `raise input_error("RF-Solver", "probe", 0.5, "1e-4 to 0.1", "…")`.

    Args:
        node: display name or class id of the node, or the name of the public function.
        input_name: the input or parameter as the user sees it.
        got: the offending value; long values are shortened.
        allowed: the values that work, with units.
        remedy: one short imperative sentence.
    """
    shown = repr(got)
    if len(shown) > 200:
        shown = shown[:197] + "…"
    return NodeInputError(f"{node}: input '{input_name}' got {shown}; allowed: {allowed}. {remedy}")
