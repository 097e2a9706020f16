"""How a command says no: one message for a person, an exit status for a script."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "CommandError", "node_failure", "node_name", "rejection", "shortened"]

FAILED = 1  # a fault that the user's input does not explain
BAD_INPUT = 2  # what the user gave cannot be used; as argparse
INTERRUPTED = 130  # Ctrl-C, as a shell reports it

LONGEST_MESSAGE = 2000
ALLOCATION = re.compile(r"tr(?:y|ied|ying) to allocate ([\d.]+) ?(bytes|[KMGT]iB)")
BYTES = {"bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


@dataclass
class CommandError(Exception):
    """Ends a command. `details` goes into the JSON form of the message (`--json`)."""

    message: str
    status: int = BAD_INPUT
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def rejection(
    error: Mapping[str, Any] | None,
    node_errors: Mapping[str, Mapping],
    prompt: Mapping[str, Any],
    object_info: Mapping[str, Mapping],
) -> CommandError:
    """The answer of a graph's validation, ours or a server's, as lines that name node and input.

    Args:
        error: ComfyUI's error object. node_errors: node id → {"errors", "class_type", …}.
        prompt: the graph, for node titles. object_info: descriptions of the classes, for the nearest allowed value.
    """
    lines = list(_node_lines(node_errors, prompt, object_info))
    if not lines:
        error = error or {}
        details = f" ({error['details']})" if error.get("details") else ""
        lines = [f"{error.get('message', '')}{details}"]
    message = shortened("The graph cannot run:\n" + "\n".join(f"  {line}" for line in lines))
    return CommandError(message, BAD_INPUT, {"validation": error, "node_errors": node_errors})


def _node_lines(node_errors: Mapping[str, Mapping], prompt: Mapping[str, Any], object_info: Mapping[str, Mapping]) -> Iterable[str]:
    for node_id, found in node_errors.items():
        for problem in found.get("errors", ()):
            extra = problem.get("extra_info") or {}
            name, details = extra.get("input_name"), str(problem.get("details") or "")
            where = node_name(node_id, prompt) + (f", input '{name}'" if name else "")
            line = f"{where}: {problem.get('message', '')}" + (f" ({details})" if details and details != name else "")
            if problem.get("type") == "value_not_in_list":
                line += _nearest(object_info.get(found.get("class_type")) or {}, name, extra.get("received_value"))
            yield line


def _nearest(description: Mapping[str, Any], name: str, value: Any) -> str:
    """The allowed value that a mistyped one was probably meant to be; a long list is not shown in the details."""
    for group in (description.get("input") or {}).values():
        for kind, *rest in [group[name]] if name in group and not isinstance(group[name], str) else ():
            choices = kind if isinstance(kind, (list, tuple)) else (rest[0] if rest else {}).get("options") or ()
            near = difflib.get_close_matches(str(value), [choice for choice in choices if isinstance(choice, str)], n=3, cutoff=0.5)
            return f". Nearest: {', '.join(near)}" if near else ""
    return ""


def node_failure(node_id: str, exception_type: str, message: str, prompt: Mapping[str, Any], traceback: Iterable[str] = ()) -> CommandError:
    """A node raised: a value it refused is the user's to mend (status 2), anything else is a fault (status 1).

    Args:
        exception_type: `module.Class`, builtins bare, as the messages of a run name it.
    """
    where, kind = node_name(node_id, prompt), exception_type.rpartition(".")[2]
    details = {"node_id": node_id, "exception_type": exception_type, "traceback": list(traceback)}
    allocation = ALLOCATION.search(message)
    if allocation or kind in ("MemoryError", "OutOfMemoryError"):
        asked = f" It asked for {float(allocation[1]) * BYTES[allocation[2]] / BYTES['GiB']:,.1f} GB." if allocation else ""
        return CommandError(f"{where} needs more memory than there is.{asked} Lower width, height or batch size.", BAD_INPUT, details)
    if _refuses_a_value(exception_type):
        return CommandError(shortened(f"{where}: {message}"), BAD_INPUT, details)
    return CommandError(shortened(f"{where} failed: {kind}: {message}"), FAILED, details)


def _refuses_a_value(exception_type: str) -> bool:
    """Whether the class, looked up among the loaded modules, is a ValueError or a file that cannot be used."""
    module, _, name = exception_type.rpartition(".")
    cls = getattr(sys.modules.get(module or "builtins"), name, None)
    if isinstance(cls, type):
        return issubclass(cls, (ValueError, OSError))
    return name.endswith(("ValueError", "InputError", "PathError"))  # a class that only the server has


def node_name(node_id: str, prompt: Mapping[str, Any]) -> str:
    """`node 3 (KSampler)`, with the title where the graph gives one of its own."""
    node = prompt.get(str(node_id))
    if not isinstance(node, dict):
        return f"node {node_id}"
    class_type = node.get("class_type", "?")
    title = (node.get("_meta") or {}).get("title")
    return f"node {node_id} ({class_type})" if not title or title == class_type else f"node {node_id} ({class_type} '{title}')"


def shortened(text: str, longest: int = LONGEST_MESSAGE) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
