"""One host's side of the graph-overhead measurement: `python graph_overhead.py embedded|comfyui NODES`.

Answers each line on standard input, the name of a shape, with one JSON line: seconds of validating a fresh graph of trivial
nodes of that shape, of running it, and of running it again when everything is cached. The messages of the run are taken and
dropped, as for a client that listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time


class TrivialAdd:
    """Costs nothing, so that what is measured is the engine."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {"default": 0}), "b": ("INT", {"default": 0})}}

    RETURN_TYPES = ("INT",)
    FUNCTION = "add"
    CATEGORY = "bench"

    def add(self, a, b):
        return ((a + b) % 1000,)


class TrivialOutput:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 0})}}

    RETURN_TYPES = ()
    FUNCTION = "show"
    CATEGORY = "bench"
    OUTPUT_NODE = True

    def show(self, value):
        return {"ui": {"value": [value]}}


CLASSES = {"TrivialAdd": TrivialAdd, "TrivialOutput": TrivialOutput}


def chain(nodes: int, start: int) -> dict:
    """Each node adds the two before it; the last one is the output."""
    prompt = {"0": _add(start, 1)}
    for index in range(1, nodes - 1):
        prompt[str(index)] = _add([str(index - 1), 0], [str(max(0, index - 2)), 0])
    prompt[str(nodes - 1)] = {"class_type": "TrivialOutput", "inputs": {"value": [str(nodes - 2), 0]}}
    return prompt


def groups(nodes: int, start: int) -> dict:
    """Separate groups of five, each with its own output, as in a sheet of small workflows."""
    prompt = {}
    for first in range(0, nodes, 5):
        prompt[str(first)] = _add(start, first)
        for index in range(first + 1, first + 4):
            prompt[str(index)] = _add([str(index - 1), 0], 1)
        prompt[str(first + 4)] = {"class_type": "TrivialOutput", "inputs": {"value": [str(first + 3), 0]}}
    return prompt


def _add(a, b) -> dict:
    return {"class_type": "TrivialAdd", "inputs": {"a": a, "b": b}}


SHAPES = {"chain": chain, "groups": groups}


class Embedded:
    def __init__(self):
        import torch
        from rectiflow import __version__
        from rectiflow.host.embedded import Host
        from rectiflow.host.embedded.execution.executor import PromptExecutor
        from rectiflow.host.embedded.execution.registry import NodeRegistry
        from rectiflow.host.embedded.execution.validation import validate_prompt

        self.version, self.torch = __version__, torch.__version__
        registry = NodeRegistry()
        registry.add(CLASSES)
        self.executor = PromptExecutor(Host(paths=None, registry=registry, memory=None), send=lambda event, data, client: None)
        self.validate = lambda prompt: asyncio.run(validate_prompt(registry, prompt)).outputs

    def run(self, prompt, outputs):
        history = self.executor.execute(prompt, "bench", {"client_id": "bench"}, outputs)
        assert history["status"]["completed"]


class ComfyUI:
    def __init__(self):
        sys.path.insert(0, os.environ["COMFYUI_PATH"])
        sys.argv = ["main.py", "--cpu"]
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfyui_version
        import execution
        import torch

        import nodes

        self.version, self.torch = comfyui_version.__version__, torch.__version__
        nodes.NODE_CLASS_MAPPINGS.update(CLASSES)
        self.executor = execution.PromptExecutor(_SilentServer())
        self.validate = lambda prompt: asyncio.run(execution.validate_prompt("bench", prompt, None))[2]

    def run(self, prompt, outputs):
        self.executor.execute(prompt, "bench", {"client_id": "bench"}, outputs)
        assert self.executor.success


class _SilentServer:
    """What ComfyUI's executor asks of its server."""

    client_id = "bench"
    last_node_id = None
    sockets_metadata: dict = {}

    def send_sync(self, event, data, client=None):
        pass


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def main() -> None:
    nodes = int(sys.argv[2])
    with contextlib.redirect_stdout(sys.stderr):  # imports may print
        host = {"embedded": Embedded, "comfyui": ComfyUI}[sys.argv[1]]()
    versions = {"version": host.version, "torch": host.torch, "python": sys.version.split()[0]}
    print(json.dumps(versions), flush=True)
    for number, shape in enumerate(sys.stdin):
        prompt = SHAPES[shape.strip()](nodes, number)
        validate, outputs = timed(host.validate, prompt)
        run, _ = timed(host.run, prompt, outputs)
        cached, _ = timed(host.run, prompt, outputs)
        print(json.dumps({"validate": validate, "run": run, "run_cached": cached}), flush=True)


if __name__ == "__main__":
    main()
