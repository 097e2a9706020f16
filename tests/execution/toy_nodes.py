"""Node classes that do almost nothing, each showing one rule of the engine, and a host that knows them."""

from __future__ import annotations

import asyncio
from typing import Any

from rectiflow.host.embedded import Host
from rectiflow.host.embedded.execution.executor import PromptExecutor
from rectiflow.host.embedded.execution.graph_utils import ExecutionBlocker, GraphBuilder
from rectiflow.host.embedded.execution.registry import NodeRegistry
from rectiflow.host.embedded.execution.validation import Validation, validate_prompt


def toy_classes(log: list) -> dict[str, type]:
    """Fresh classes; every call appends (class id, its arguments) to `log`."""

    def node(required=None, optional=None, hidden=None, returns=(), **attributes):
        def decorate(function):
            kinds = {"required": required or {}, "optional": optional or {}, "hidden": hidden or {}}

            def logged(self, **inputs):
                log.append((function.__name__, inputs))
                return function(self, **inputs)

            async def logged_async(self, **inputs):
                log.append((function.__name__, inputs))
                return await function(self, **inputs)

            body = {
                "INPUT_TYPES": classmethod(lambda cls: {kind: dict(declared) for kind, declared in kinds.items() if declared}),
                "RETURN_TYPES": returns,
                "FUNCTION": "go",
                "CATEGORY": "toy",
                "go": logged_async if asyncio.iscoroutinefunction(function) else logged,
                **attributes,
            }
            classes[function.__name__] = type(function.__name__, (), body)
            return function

        return decorate

    classes: dict[str, type] = {}
    integer = ("INT", {"default": 0, "min": -1000, "max": 1000})

    @node({"value": integer}, returns=("INT",))
    def Number(self, value):
        return (value,)

    @node({"a": integer, "b": integer}, returns=("INT",))
    def Add(self, a, b):
        return (a + b,)

    @node({"value": ("*", {})}, OUTPUT_NODE=True)
    def Show(self, value):
        return {"ui": {"value": [value]}}

    @node({"a": ("*", {})}, {"b": ("*", {}), "c": ("*", {})}, returns=("*",), OUTPUT_IS_LIST=(True,))
    def ListOf(self, **values):
        return (list(values.values()),)

    @node({"values": ("INT", {})}, returns=("INT",), INPUT_IS_LIST=True)
    def Total(self, values):
        return (sum(values),)

    def needed(self, pick, yes=None, no=None):
        return [name for name, value in (("yes", yes), ("no", no)) if value is None and (name == "yes") is pick]

    @node({"pick": ("BOOLEAN", {}), "yes": ("*", {"lazy": True}), "no": ("*", {"lazy": True})}, returns=("*",), check_lazy_status=needed)
    def Pick(self, pick, yes=None, no=None):
        return (yes if pick else no,)

    @node({"value": ("*", {}), "block": ("BOOLEAN", {})}, {"message": ("STRING", {})}, returns=("*",))
    def Gate(self, value, block, message=None):
        return (ExecutionBlocker(message) if block else value,)

    @node({"value": integer, "times": ("INT", {"min": 0, "max": 2000})}, returns=("INT",))
    def AddOneTimes(self, value, times):
        """Expands into a chain of `times` additions."""
        graph, link = GraphBuilder(), value
        for _ in range(times):
            link = graph.node("Add", a=link, b=1).out(0)
        return {"result": (link,), "expand": graph.finalize()} if times else (value,)

    @node({"value": integer}, returns=("INT",))
    def CountDown(self, value):
        """Expands into itself until nothing is left."""
        if value == 0:
            return (0,)
        graph = GraphBuilder()
        return {"result": (graph.node("CountDown", value=value - 1).out(0),), "expand": graph.finalize()}

    @node({"value": ("*", {}), "seconds": ("FLOAT", {"min": 0.0, "max": 10.0})}, returns=("*",))
    async def Wait(self, value, seconds):
        await asyncio.sleep(seconds)
        return (value,)

    @node({"value": ("*", {})}, returns=("*",))
    def Fail(self, value):
        raise RuntimeError(f"cannot take {value}")

    @node({"value": ("*", {})}, returns=("*",))
    async def FailLater(self, value):
        await asyncio.sleep(0.01)
        raise RuntimeError("failed later")

    @node({"value": integer}, returns=("STRING",), hidden={"me": "UNIQUE_ID", "prompt": "PROMPT", "extra": "EXTRA_PNGINFO"})
    def Self(self, value, me, prompt, extra):
        return (me,)

    @node({"first": ("INT", {})}, returns=("INT",))
    def Sum(self, **numbers):
        """Variadic: takes undeclared linked inputs."""
        return (sum(numbers.values()),)

    return classes


class ToyHost:
    """A host with the toy classes, an executor, and what they said and did."""

    def __init__(self, cache: Any = None, **classes: type):
        self.log: list[tuple[str, dict]] = []
        self.messages: list[tuple[str, dict]] = []
        self.registry = NodeRegistry()
        self.registry.add({**toy_classes(self.log), **classes}, python_module="custom_nodes.toy")
        self.host = Host(paths=None, registry=self.registry, memory=None)
        self.executor = PromptExecutor(self.host, cache, self._hear)

    def _hear(self, event: str, data: dict, client_id: str | None) -> None:
        self.messages.append((event, data))

    def validate(self, prompt: Any, targets: Any = None) -> Validation:
        return asyncio.run(validate_prompt(self.registry, prompt, targets))

    def run(self, prompt: dict, targets: Any = None, client: str | None = "me", **extra: Any) -> dict:
        """Validate, run, return the history entry; `log` and `messages` are those of this run."""
        checked = self.validate(prompt, targets)
        assert checked.valid, checked
        self.log.clear()
        self.messages.clear()
        return self.executor.execute(prompt, "run", {"client_id": client, **extra}, checked.outputs)

    def shown(self, prompt: dict, node_id: str = "out", targets: Any = None) -> list:
        """The values that a Show node showed."""
        result = self.run(prompt, targets)
        assert result["status"]["status_str"] == "success", result["status"]
        return result["outputs"].get(node_id, {}).get("value", [])

    def calls(self, class_id: str | None = None) -> list:
        return [name if class_id is None else inputs for name, inputs in self.log if class_id in (None, name)]

    def events(self, *names: str) -> list:
        return [(event, data) for event, data in self.messages if not names or event in names]


def graph(**nodes: tuple) -> dict:
    """`graph(n=("Number", {"value": 1}), out=("Show", {"value": "n.0"}))`: a string "id.slot" of a node here is a link."""

    def linked(value):
        if isinstance(value, str) and "." in value:
            source, _, slot = value.rpartition(".")
            if source in nodes and slot.isdigit():
                return [source, int(slot)]
        return value

    return {
        node_id: {"class_type": class_type, "inputs": {name: linked(value) for name, value in inputs.items()}}
        for node_id, (class_type, inputs) in nodes.items()
    }
