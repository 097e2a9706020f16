"""One node and its values: gather the inputs, call the function over lists, merge what came back.

Every value travels wrapped in a list. A node is called once per index up to its longest input list; shorter lists repeat
their last element. INPUT_IS_LIST hands the lists over whole, in one call.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .graph import DynamicPrompt
from .graph_utils import ExecutionBlocker, is_link
from .node_face import NodeFace
from .progress import executing_node

__all__ = [
    "GatheredInputs",
    "NodeReturns",
    "Spread",
    "gather_inputs",
    "call_over_lists",
    "finished_results",
    "read_returns",
    "merge_results",
]

ABSENT = (None,)


@dataclass(frozen=True)
class GatheredInputs:
    """Arguments of a node, each a list, and the names of linked inputs whose value is not there (lazy, or only constants asked for)."""

    values: dict[str, Sequence]
    missing: frozenset[str]


def unwrapped(value: Any) -> Any:
    """A list constant that would read as a link stays wrapped in the prompt as `{"__value__": [...]}`; here it is taken out."""
    return value["__value__"] if isinstance(value, dict) and len(value) == 1 and "__value__" in value else value


def gather_inputs(
    inputs: Mapping[str, Any],
    face: NodeFace,
    node_id: str,
    outputs_of: Callable[[str], Sequence[Sequence] | None] | None = None,
    dynprompt: DynamicPrompt | None = None,
    extra_data: Mapping[str, Any] | None = None,
) -> GatheredInputs:
    """Collect a node's arguments.

    Constants are passed when they are declared, links always (variadic nodes take undeclared ones), hidden inputs by their kind.

    Args:
        outputs_of: results of a node that ran, or None; without it every linked input counts as missing.
    """
    values: dict[str, Sequence] = {}
    missing: set[str] = set()
    for name, value in inputs.items():
        if is_link(value) and name not in face.raw_links:
            source = outputs_of(value[0]) if outputs_of is not None else None
            if source is None or value[1] >= len(source):
                missing.add(name)
                values[name] = ABSENT
            else:
                values[name] = source[value[1]]
        elif name in face.inputs:
            values[name] = [unwrapped(value)]
    for name, kind in face.hidden.items():
        if kind in HIDDEN:
            values[name] = [HIDDEN[kind](node_id, dynprompt, extra_data or {})]
    return GatheredInputs(values, frozenset(missing))


HIDDEN: dict[str, Callable[[str, DynamicPrompt | None, Mapping], Any]] = {
    "PROMPT": lambda node_id, dynprompt, extra: dynprompt.get_original_prompt() if dynprompt is not None else {},
    "DYNPROMPT": lambda node_id, dynprompt, extra: dynprompt,
    "EXTRA_PNGINFO": lambda node_id, dynprompt, extra: extra.get("extra_pnginfo"),
    "UNIQUE_ID": lambda node_id, dynprompt, extra: node_id,
    "AUTH_TOKEN_COMFY_ORG": lambda node_id, dynprompt, extra: extra.get("auth_token_comfy_org"),
    "API_KEY_COMFY_ORG": lambda node_id, dynprompt, extra: extra.get("api_key_comfy_org"),
}


def _calls(values: Mapping[str, Sequence], input_is_list: bool) -> Iterator[dict[str, Any]]:
    """The keyword arguments of each call."""
    if input_is_list:
        yield dict(values)
        return
    longest = max(map(len, values.values()), default=1)
    empty = [name for name, items in values.items() if len(items) == 0]
    if empty:
        raise ValueError(f"input '{empty[0]}' received an empty list, so there is nothing to run this node on")
    if longest == 1:
        yield {name: items[0] for name, items in values.items()}
        return
    for index in range(longest):
        yield {name: items[min(index, len(items) - 1)] for name, items in values.items()}


def _blocker_in(arguments: Mapping[str, Any], input_is_list: bool) -> ExecutionBlocker | None:
    for value in arguments.values():
        if isinstance(value, ExecutionBlocker):
            return value
        if input_is_list:
            for item in value:
                if isinstance(item, ExecutionBlocker):
                    return item
    return None


async def call_over_lists(
    prompt_id: str,
    node_id: str,
    owner: Any,
    function: str,
    values: Mapping[str, Sequence],
    input_is_list: bool = False,
    *,
    before_call: Callable[[int], None] | None = None,
    on_block: Callable[[ExecutionBlocker], ExecutionBlocker] | None = None,
) -> list[Any]:
    """Call `owner.function` for every index of its input lists.

    Args:
        owner: the node's instance, or its class for class methods.
        before_call: called with the index before each call; what it raises stops the node.
        on_block: what a call yields instead when an argument is an ExecutionBlocker (the blocker itself without it).

    Returns:
        one entry per call: its return value, or an asyncio.Task where an asynchronous function has not finished yet.
    """
    call = getattr(owner, function)
    asynchronous = inspect.iscoroutinefunction(call)
    results: list[Any] = []
    for index, arguments in enumerate(_calls(values, input_is_list)):
        if before_call is not None:
            before_call(index)
        blocker = _blocker_in(arguments, input_is_list)
        if blocker is not None:
            results.append(on_block(blocker) if on_block is not None else blocker)
        elif asynchronous:
            task = asyncio.create_task(_awaited(call, arguments, prompt_id, node_id, index))
            await asyncio.sleep(0)  # a function that never waits finishes here
            results.append(task.result() if task.done() else task)
        else:
            with executing_node(prompt_id, node_id, index):
                results.append(call(**arguments))
    return results


async def _awaited(call: Callable, arguments: Mapping[str, Any], prompt_id: str, node_id: str, index: int) -> Any:
    with executing_node(prompt_id, node_id, index):
        return await call(**arguments)


async def finished_results(results: Sequence[Any]) -> list[Any]:
    """Wait for the tasks among results of `call_over_lists`; the first one that failed raises."""
    return [await result if isinstance(result, asyncio.Task) else result for result in results]


@dataclass(frozen=True)
class NodeReturns:
    """What the calls of one node returned.

    results: per call the output tuple (or the list that an expansion's outputs come from).
    expansions: per call the graph to run first, or None. ui: what the interface shows, lists of all calls joined.
    """

    results: list[Sequence]
    expansions: list[dict[str, dict] | None]
    ui: dict[str, list]

    @property
    def expands(self) -> bool:
        return any(graph is not None for graph in self.expansions)


def read_returns(returned: Sequence[Any], face: NodeFace) -> NodeReturns:
    """Sort return values: a tuple, an ExecutionBlocker for all outputs, or a dict of `result`, `ui` and `expand` in any mix."""
    results: list[Sequence] = []
    expansions: list[dict[str, dict] | None] = []
    ui: dict[str, list] | None = None
    for value in returned:
        result, graph = value, None
        if isinstance(value, dict):
            result, graph = value.get("result"), value.get("expand")
            if "ui" in value:
                ui = _joined_ui(ui, value["ui"])
            if result is None and graph is None:
                continue
            if result is None and not face.return_types:
                result = ()
        if isinstance(result, ExecutionBlocker):
            result = (result,) * len(face.return_types)
        elif not isinstance(result, (tuple, list)):
            raise TypeError(
                f"{face.class_type}.{face.cls.FUNCTION} returned {type(result).__name__}; allowed: a tuple with one value "
                "per output, or a dict of 'result', 'ui' and 'expand'"
            )
        results.append(result)
        expansions.append(graph)
    return NodeReturns(results, expansions, ui or {})


def _joined_ui(joined: dict[str, list] | None, ui: Mapping[str, Sequence]) -> dict[str, list]:
    """Lists of several calls joined per key; the keys are those of the first call."""
    if joined is None:
        return {key: list(items) for key, items in ui.items()}
    for key, items in joined.items():
        items.extend(ui[key])
    return joined


@dataclass(frozen=True)
class Spread:
    """Stands in a result for an output of an expansion: its values take the place of one."""

    values: Sequence


def merge_results(results: Sequence[Sequence], face: NodeFace) -> list[list]:
    """Per output, the values of all calls: appended, or concatenated where OUTPUT_IS_LIST says so. No call, no outputs."""
    if not results:
        return []
    width = len(results[0])
    flags = face.output_is_list or (False,) * width
    merged: list[list] = []
    for slot, is_list in zip(range(width), flags):
        values: list = []
        for result in results:
            value = result[slot]
            if isinstance(value, Spread):
                values.extend(value.values)
            elif is_list and not isinstance(value, ExecutionBlocker):
                values.extend(value)
            else:
                values.append(value)
        merged.append(values)
    return merged
