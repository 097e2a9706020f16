"""Is this prompt runnable: every check that is made before a prompt is queued, with ComfyUI's error objects.

Each error is `{"type", "message", "details", "extra_info"}`. Types, messages and the in-place coercion of constants are those
of ComfyUI; details are worded so that a person knows what to mend. Nodes are visited with an explicit stack, so a chain of
any length is checked, and cycles are found as such (`dependency_cycle`).
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .graph_utils import ExecutionBlocker, is_link
from .node_call import call_over_lists, finished_results, gather_inputs
from .node_face import Faces, InputFace, NodeFace
from .registry import NodeRegistry

__all__ = ["Validation", "validate_prompt", "validate_node_input"]

LONGEST_LIST_SHOWN = 20
LONGEST_VALUE_SHOWN = 300
CASTS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class Validation(NamedTuple):
    """Outcome of `validate_prompt`; unpacks like ComfyUI's tuple.

    valid: at least one output can run. error: the object to answer with when not valid. outputs: ids of the outputs to run, in
    prompt order. node_errors: node id → {"errors", "dependent_outputs", "class_type"}, also for outputs dropped from a valid prompt.
    """

    valid: bool
    error: dict[str, Any] | None
    outputs: list[str]
    node_errors: dict[str, dict]


def validate_node_input(received_type: Any, input_type: Any, strict: bool = False) -> bool:
    """Whether an output of `received_type` may feed an input of `input_type`.

    Both may be unions "A,B": any overlap is enough, or with `strict` all of the received types must be wanted. "*" fits all.
    `!=` is asked first, so that string types which override `__ne__` decide for themselves.
    """
    if not received_type != input_type:
        return True
    if isinstance(received_type, (list, tuple)):
        return input_type == "COMBO"
    if not isinstance(received_type, str) or not isinstance(input_type, str):
        return False
    if received_type == "*" or input_type == "*":
        return True
    received = {part.strip() for part in received_type.split(",")}
    wanted = {part.strip() for part in input_type.split(",")}
    return received <= wanted if strict else bool(received & wanted)


async def validate_prompt(
    registry: NodeRegistry, prompt: Any, partial_execution_targets: Collection[str] | None = None, prompt_id: str = ""
) -> Validation:
    """Check a prompt in API format and coerce its constants in place.

    Args:
        registry: the known node classes.
        prompt: node id → {"class_type", "inputs"}; anything at all is answered with an error, never an exception.
        partial_execution_targets: ids of the output nodes to run; None runs them all.
        prompt_id: handed to the execution context of VALIDATE_INPUTS.
    """
    error = _malformed(prompt) or _unknown_class(registry, prompt)
    if error is not None:
        return Validation(False, error, [], {})
    outputs = [
        node_id
        for node_id, node in prompt.items()
        if getattr(registry[node["class_type"]], "OUTPUT_NODE", False) is True
        and (partial_execution_targets is None or node_id in partial_execution_targets)
    ]
    if not outputs:
        return Validation(False, _error("prompt_no_outputs", "Prompt has no outputs", ""), [], {})
    checker = _Checker(prompt, Faces(registry), prompt_id)
    good = [node_id for node_id in outputs if await checker.check_output(node_id)]
    if good:
        return Validation(True, None, good, checker.node_errors())
    details = "\n".join(f"{e['message']}: {e['details']}" for node_id in outputs for e in checker.errors_of(node_id))
    failed = _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
    return Validation(False, failed, [], checker.node_errors())


def _error(type_: str, message: str, details: str, **extra_info: Any) -> dict[str, Any]:
    return {"type": type_, "message": message, "details": details, "extra_info": extra_info}


def _shown(value: Any) -> str:
    """`str(value)` for a message: never fails (integers of thousands of digits do), never floods."""
    try:
        text = str(value)
    except Exception as error:
        text = f"<{type(value).__name__} that cannot be shown: {error}>"
    return text if len(text) <= LONGEST_VALUE_SHOWN else text[:LONGEST_VALUE_SHOWN] + "…"


def _malformed(prompt: Any) -> dict[str, Any] | None:
    """What is wrong with the outer form, before any class is looked at. Absent inputs become an empty object."""

    def invalid(message: str, node_id: Any) -> dict[str, Any]:
        return _error("invalid_prompt", message, f"Node ID '#{_shown(node_id)}'")

    if not isinstance(prompt, dict):
        return _error("invalid_prompt", "Cannot execute because the prompt is not an object of nodes.", f"got {type(prompt).__name__}")
    for node_id, node in prompt.items():
        if not isinstance(node_id, str):
            return invalid("Cannot execute because a node id is not a string.", node_id)
        if not isinstance(node, dict):
            return invalid("Cannot execute because a node is not an object.", node_id)
        if "class_type" not in node:
            return invalid("Cannot execute because a node is missing the class_type property.", node_id)
        if not isinstance(node["class_type"], str):
            return invalid("Cannot execute because the class_type of a node is not a string.", node_id)
        inputs = node.setdefault("inputs", {})
        if not isinstance(inputs, dict) or not all(isinstance(name, str) for name in inputs):
            return invalid("Cannot execute because the inputs of a node are not an object.", node_id)
    return None


def _unknown_class(registry: NodeRegistry, prompt: dict[str, dict]) -> dict[str, Any] | None:
    for node_id, node in prompt.items():
        class_type = node["class_type"]
        if class_type not in registry:
            nearest = registry.nearest(class_type)
            hint = f"; nearest known classes: {', '.join(nearest)}" if nearest else ""
            return _error(
                "invalid_prompt",
                f"Cannot execute because node {_shown(class_type)} does not exist.",
                f"Node ID '#{_shown(node_id)}'{hint}",
                node_id=node_id,
                class_type=class_type,
                nearest=nearest,
            )
    return None


class _Arrival(NamedTuple):
    """The link through which a node was reached; an exception while checking the node is reported with it."""

    input_name: str
    declared: InputFace
    link: list


@dataclass
class _State:
    """What is known of one node: its own errors, the links that passed their check, and whether all of it is valid."""

    errors: list[dict] = field(default_factory=list)
    received_types: dict[str, Any] = field(default_factory=dict)
    upstream: dict[str, _Arrival] = field(default_factory=dict)
    finished: bool = False
    valid: bool = True


class _Checker:
    """Validates outputs depth first through their links; every node once."""

    def __init__(self, prompt: dict[str, dict], faces: Faces, prompt_id: str):
        self.prompt = prompt
        self.faces = faces
        self.prompt_id = prompt_id
        self.states: dict[str, _State] = {}
        self.cycles: dict[str, dict] = {}
        self._searched: set[str] = set()
        self._links: dict[str, list[str]] = {}
        self._failed_outputs: list[str] = []

    async def check_output(self, output_id: str) -> bool:
        self._find_cycles(output_id)
        await self._visit(output_id)
        valid = self.states[output_id].valid and not (self.cycles and self.cycles.keys() & self._ancestry(output_id).keys())
        if not valid:
            self._failed_outputs.append(output_id)
        return valid

    def errors_of(self, node_id: str) -> list[dict]:
        own = self.states[node_id].errors if node_id in self.states else []
        return [self.cycles[node_id], *own] if node_id in self.cycles else own

    def node_errors(self) -> dict[str, dict]:
        """Errors by node, with the failed outputs that depend on it. Nodes that only suffer from upstream do not appear."""
        report: dict[str, dict] = {}
        for output_id in self._failed_outputs:
            for node_id in self._ancestry(output_id):
                errors = self.errors_of(node_id)
                if errors:
                    entry = {"errors": errors, "dependent_outputs": [], "class_type": self.prompt[node_id]["class_type"]}
                    report.setdefault(node_id, entry)["dependent_outputs"].append(output_id)
        return report

    def _sources(self, node_id: str) -> list[str]:
        """Every node of the prompt that this one links to, through declared inputs or not."""
        known = self._links.get(node_id)
        if known is None:
            linked = (value[0] for value in self.prompt[node_id]["inputs"].values() if is_link(value))
            known = self._links[node_id] = [source for source in linked if source in self.prompt]
        return known

    def _ancestry(self, node_id: str) -> dict[str, None]:
        """The node and everything it depends on, nearest first."""
        seen, stack = {node_id: None}, [node_id]
        while stack:
            for source in self._sources(stack.pop()):
                if source not in seen:
                    seen[source] = None
                    stack.append(source)
        return seen

    def _find_cycles(self, root: str) -> None:
        """Mark every node on a cycle that the walk closes. Such nodes would wait for each other for ever."""
        path: dict[str, Iterator[str]] = {}
        if root not in self._searched:
            path[root] = iter(self._sources(root))
        while path:
            node_id = next(reversed(path))
            source = next(path[node_id], None)
            if source is None:
                del path[node_id]
                self._searched.add(node_id)
            elif source in path:
                self._mark_cycle([*path][[*path].index(source) :])
            elif source not in self._searched:
                path[source] = iter(self._sources(source))

    def _mark_cycle(self, cycle: list[str]) -> None:
        """Every node on it gets the error; of a long one only the start is told, or the answer would grow with its square."""
        shown = cycle[:LONGEST_LIST_SHOWN]
        steps = [f"{node_id} ({self.prompt[node_id]['class_type']})" for node_id in [*shown, cycle[0]]]
        if len(shown) < len(cycle):
            steps.insert(-1, "…")
        way = " -> ".join(steps)
        for node_id in cycle:
            extra = {"node_id": node_id, "cycle_nodes": shown}
            self.cycles.setdefault(node_id, _error("dependency_cycle", "Dependency cycle detected", way, **extra))

    async def _visit(self, root: str) -> None:
        """Post-order walk. A node is opened when it first comes to the top of the stack and finished when it is there again."""
        stack: list[tuple[str, _Arrival | None]] = [(root, None)]
        while stack:
            node_id, arrival = stack[-1]
            state = self.states.get(node_id)
            if state is None:
                state = self.states[node_id] = _State()
                self._open(node_id, state, arrival)
                stack.extend((source, link) for source, link in reversed(state.upstream.items()) if source not in self.states)
                continue
            stack.pop()
            if not state.finished:
                await self._finish(node_id, state, arrival)

    def _open(self, node_id: str, state: _State, arrival: _Arrival | None) -> None:
        try:
            face = self.faces[self.prompt[node_id]["class_type"]]
            named, takes_all = _validator_takes(face)
            inputs = self.prompt[node_id]["inputs"]
        except Exception as error:  # INPUT_TYPES of a foreign class may do anything
            state.errors.append(_exception_error(error, arrival))
            return
        for name, declared in face.declared():
            try:
                if name not in inputs:
                    if declared.category == "required":
                        state.errors.append(_error("required_input_missing", "Required input is missing", name, input_name=name))
                elif isinstance(inputs[name], list):
                    self._check_link(name, declared, inputs[name], "input_types" in named, state)
                else:
                    error = _check_constant(name, declared, inputs, checked_by_class=takes_all or name in named)
                    state.errors.extend(error)
            except Exception as error:
                state.errors.append(_exception_error(error, arrival))

    def _check_link(self, name: str, declared: InputFace, link: list, class_checks_types: bool, state: _State) -> None:
        about = {"input_name": name, "input_config": declared.as_config()}
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            state.errors.append(_error("bad_linked_input", message, name, **about, received_value=link))
            return
        source, slot = link
        if not isinstance(source, str) or source not in self.prompt:
            hint = "" if isinstance(source, str) else '; a constant list is written {"__value__": [...]}'
            raise KeyError(f"{name}: there is no node {_shown(source)!r} to link to{hint}")
        offered = self.faces[self.prompt[source]["class_type"]].return_types
        if not isinstance(slot, int) or not 0 <= slot < len(offered):
            raise IndexError(f"{name}: node {source!r} has no output {_shown(slot)}, it has {len(offered)}")
        received = offered[slot]
        state.received_types[name] = received
        if not class_checks_types and not validate_node_input(received, declared.type):
            details = f"{name}, received_type({received}) mismatch input_type({declared.type})"
            message = "Return type mismatch between linked nodes"
            state.errors.append(_error("return_type_mismatch", message, details, **about, received_type=received, linked_node=link))
            return
        state.upstream.setdefault(source, _Arrival(name, declared, link))

    async def _finish(self, node_id: str, state: _State, arrival: _Arrival | None) -> None:
        try:
            await self._check_by_class(node_id, state)
        except Exception as error:
            state.errors.append(_exception_error(error, arrival))
        state.valid = not state.errors and all(self.states[source].valid for source in state.upstream)
        state.finished = True

    async def _check_by_class(self, node_id: str, state: _State) -> None:
        """VALIDATE_INPUTS, with the constants it names (linked ones are None); one error per input that it was handed."""
        node = self.prompt[node_id]
        if any(error["type"].startswith("exception_during") for error in state.errors):
            return
        face = self.faces[node["class_type"]]
        named, takes_all = _validator_takes(face)
        absent = {error["extra_info"]["input_name"] for error in state.errors if error["type"] == "required_input_missing"}
        if not (named or takes_all) or absent & named:
            return
        gathered = gather_inputs(node["inputs"], face, node_id)
        values = {name: items for name, items in gathered.values.items() if takes_all or name in named}
        if "input_types" in named:
            values["input_types"] = [state.received_types]
        calls = await call_over_lists(self.prompt_id, node_id, face.cls, "VALIDATE_INPUTS", values, face.input_is_list)
        results = await finished_results(calls)
        for name in values:
            for result in results:
                if result is not True and not isinstance(result, ExecutionBlocker):
                    details = name if result is False else f"{name} - {_shown(result)}"
                    error = _error("custom_validation_failed", "Custom validation failed for node", details, input_name=name)
                    state.errors.append(error)


def _validator_takes(face: NodeFace) -> tuple[frozenset[str], bool]:
    """Names in the signature of the class's VALIDATE_INPUTS, and whether it takes all inputs."""
    validator = getattr(face.cls, "VALIDATE_INPUTS", None)
    if validator is None:
        return frozenset(), False
    parameters = inspect.signature(validator).parameters.values()
    named = frozenset(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _exception_error(error: Exception, arrival: _Arrival | None) -> dict[str, Any]:
    """An exception while a node was checked; of an upstream node it is told through which input it was reached."""
    details = str(error.args[0]) if isinstance(error, LookupError) and error.args else _shown(error)
    raised = {
        "exception_type": full_type_name(type(error)),
        "traceback": traceback.format_tb(error.__traceback__),
    }
    if arrival is None:
        return _error("exception_during_validation", "Exception when validating node", details, **raised)
    return _error(
        "exception_during_inner_validation",
        "Exception when validating inner node",
        details,
        input_name=arrival.input_name,
        input_config=arrival.declared.as_config(),
        exception_message=details,
        linked_node=arrival.link,
        **raised,
    )


def _check_constant(name: str, declared: InputFace, inputs: dict[str, Any], checked_by_class: bool) -> list[dict]:
    """Coerce one constant in place and check its range or choice, unless the class's own validator took that over."""
    value = inputs[name]
    about = {"input_name": name, "input_config": declared.as_config()}
    try:
        if isinstance(value, dict) and "__value__" in value:
            value = value["__value__"]
            if not is_link(value):  # one that reads as a link stays wrapped until the node is called
                inputs[name] = value
        cast = CASTS.get(str(declared.type)) if isinstance(declared.type, str) else None  # str(): subclasses may not be hashable
        if cast is not None:
            value = inputs[name] = cast(value)
    except Exception as error:
        message = f"Failed to convert an input value to a {declared.type} value"
        details = f"{name}, {_shown(value)}, {_shown(error)}"
        about |= {"received_value": value, "exception_message": _shown(error)}
        return [_error("invalid_input_type", message, details, **about)]
    if isinstance(value, float) and math.isnan(value):  # passes every range check, since it compares false with everything
        details = f"{name}: NaN; enter a number"
        return [_error("invalid_input_type", "Value is not a number", details, **about, received_value="NaN")]
    if checked_by_class:
        return []
    options = declared.options
    about["received_value"] = value
    if "min" in options and value < options["min"]:
        message = f"Value {_shown(value)} smaller than min of {options['min']}"
        return [_error("value_smaller_than_min", message, name, **about)]
    if "max" in options and value > options["max"]:
        message = f"Value {_shown(value)} bigger than max of {options['max']}"
        return [_error("value_bigger_than_max", message, name, **about)]
    choices = declared.choices
    if choices is not None and value not in choices:
        shown = str(list(choices))
        if len(choices) > LONGEST_LIST_SHOWN:
            shown = f"(list of length {len(choices)})"
            about["input_config"] = None
        return [_error("value_not_in_list", "Value not in list", f"{name}: '{_shown(value)}' not in {shown}", **about)]
    return []


def full_type_name(cls: type) -> str:
    """`module.Class`, or the bare name of a builtin."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
