"""Runs inside a real ComfyUI: validates and executes the prompts that come in as JSON and prints what its engine said of them.

    COMFYUI_PATH=… python comfyui_engine.py < cases.json

Standard input is a list of [prompt, partial targets or null]; each valid prompt is run twice on one executor.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import sys

sys.path[0] = os.environ["COMFYUI_PATH"]
here = os.path.dirname(os.path.abspath(__file__))
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()


class Server:
    """What ComfyUI's executor asks of its server."""

    def __init__(self):
        self.client_id = None
        self.last_node_id = None
        self.sockets_metadata: dict = {}
        self.messages: list = []

    def send_sync(self, event, data, client=None):
        self.messages.append([event, copy.deepcopy(data)])


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        import execution

        import nodes

        sys.path.append(here)
        from shared_nodes import CLASSES

    nodes.NODE_CLASS_MAPPINGS.update(CLASSES)
    answers = []
    for prompt, targets in json.load(sys.stdin):
        with contextlib.redirect_stdout(sys.stderr):
            valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("run", prompt, targets))
            runs = []
            executor = execution.PromptExecutor(Server())
            for _ in range(2 if valid else 0):
                executor.server.messages.clear()
                executor.success = True
                executor.execute(copy.deepcopy(prompt), "run", {"client_id": "me"}, sorted(outputs))
                history = {**executor.history_result, "success": executor.success}
                runs.append({"messages": list(executor.server.messages), "history": history})
        validation = {"valid": valid, "error": error, "outputs": sorted(outputs), "node_errors": node_errors}
        answers.append({**validation, "prompt": prompt, "runs": runs})
    json.dump(answers, sys.stdout, default=str)


main()
