"""One prompt being executed: which node is next, what is done with it, what is told about it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..context import Host
from .caching import ResultCache, UncachedResults
from .graph import DuplicateNodeError, DynamicPrompt, ExecutionList, NodeInputError
from .graph_utils import ExecutionBlocker, GraphBuilder, is_link
from .node_call import NodeReturns, Spread, call_over_lists, finished_results, gather_inputs, merge_results, read_returns
from .node_face import Faces, NodeFace
from .progress import ProgressRegistry, get_executing_context

__all__ = ["NodeFailure", "NodeObjects", "PromptRun"]

INTERRUPT_POLL_SECONDS = 0.1  # how often the flag is looked at while only asynchronous nodes are under way


class NodeFailure(Exception):
    """A run stopped at a node. `node_id` is a node of the prompt (an expansion's error is its parent's), `inputs` its arguments."""

    def __init__(self, node_id: str, error: BaseException, inputs: Mapping[str, Any] | None = None):
        super().__init__(str(error))
        self.node_id = node_id
        self.error = error
        self.inputs = inputs or {}


class NodeObjects:
    """One instance per node id and class, reused while the node (or the one it was expanded from) stays in the prompt."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str], tuple[tuple[str, str], Any]] = {}

    def begin(self, prompt: Mapping[str, Mapping]) -> None:
        present = {(node_id, node["class_type"]) for node_id, node in prompt.items()}
        self._objects = {name: kept for name, kept in self._objects.items() if kept[0] in present}

    def get(self, node_id: str, face: NodeFace, dynprompt: DynamicPrompt) -> Any:
        name = (node_id, face.class_type)
        if name not in self._objects:
            real_id = dynprompt.get_real_node_id(node_id)
            owner = (real_id, dynprompt.get_node(real_id)["class_type"])
            self._objects[name] = (owner, face.cls())
        return self._objects[name][1]

    def clear(self) -> None:
        self._objects.clear()


class PromptRun:
    """The state of one run.

    Args:
        tell: called with (event, data) for the messages of a node; None where nobody listens.

    After the run: `executed` (ids in order), `ui` (id → what the node showed), `seconds` (id → time in its own function).
    """

    def __init__(
        self,
        host: Host,
        cache: ResultCache | UncachedResults,
        objects: NodeObjects,
        prompt: dict[str, dict],
        prompt_id: str,
        extra_data: Mapping[str, Any],
        tell: Callable[[str, dict], None] | None,
    ):
        self.host = host
        self.cache = cache
        self.objects = objects
        self.prompt_id = prompt_id
        self.extra_data = extra_data
        self.tell = tell
        self.dynprompt = DynamicPrompt(prompt)
        self.faces = Faces(host.registry)
        self.todo = ExecutionList(self.dynprompt, self.faces, lambda node_id: cache.get(node_id) is not None)
        self.progress = ProgressRegistry(prompt_id, self.dynprompt, self._tell_progress if tell is not None else None)
        self.executed: dict[str, None] = {}
        self.ui: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}
        self.last_node_id: str | None = None
        self._parked: dict[str, tuple[list, asyncio.Future]] = {}
        self._expanded: dict[str, NodeReturns] = {}

    # --- the run as a whole

    async def begin(self, outputs: Iterable[str]) -> list[str]:
        """Key the prompt. Returns the ids whose results are there already."""
        prompt = self.dynprompt.original_prompt
        self.objects.begin(prompt)
        await self.cache.begin(self.dynprompt, self.faces, self._change_token, outputs)
        return [node_id for node_id in prompt if self.cache.get(node_id) is not None]

    async def execute(self, outputs: Iterable[str]) -> None:
        """Run the outputs and what they need.

        Raises:
            NodeFailure: a node raised, was interrupted, or nodes wait for each other. What had run before stays cached.
        """
        try:
            for node_id in outputs:
                self._blame(node_id, self.todo.add_node, node_id)
            while not self.todo.is_empty():
                node_id = await self._next_node()
                if await self._step(node_id):
                    self.todo.pop_node(node_id)
                else:
                    self.todo.put_back(node_id)
        finally:
            await self._cancel_parked()

    async def _next_node(self) -> str:
        while (node_id := self.todo.take()) is None:
            if self.todo.external_blocks == 0:
                error = self.todo.cycle_error()
                raise NodeFailure(self.dynprompt.get_real_node_id(error.node_id), error)
            self.todo.unblocked.clear()
            try:
                await asyncio.wait_for(self.todo.unblocked.wait(), INTERRUPT_POLL_SECONDS)
            except asyncio.TimeoutError:
                self._blame(next(iter(self._parked)), self._stop_if_interrupted)
        if self.todo.external_blocks:
            await asyncio.sleep(0)  # let asynchronous nodes go on between two ordinary ones
        return node_id

    async def _cancel_parked(self) -> None:
        tasks = [task for results, _ in self._parked.values() for task in results if isinstance(task, asyncio.Task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _blame(self, node_id: str, call: Callable, *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            raise NodeFailure(self.dynprompt.get_real_node_id(node_id), error) from error

    def _stop_if_interrupted(self, *_: Any) -> None:
        if self.host.interrupt.is_set():
            from ..model_management import InterruptProcessingException

            self.host.interrupt.clear()
            raise InterruptProcessingException

    # --- one node

    async def _step(self, node_id: str) -> bool:
        """Bring a node further; True when it is done."""
        if self.cache.get(node_id) is not None:
            ui = self.cache.get_ui(node_id)
            if ui is not None:
                self.ui[node_id] = ui
            self._tell_executed(node_id, ui)
            self.progress.finish_progress(node_id)
            return True
        inputs: dict[str, Any] = {}
        try:
            done = await self._advance(node_id, inputs)
        except Exception as error:
            self.progress.fail_progress(node_id)
            raise NodeFailure(self.dynprompt.get_real_node_id(node_id), error, inputs) from error
        if done:
            self.executed[node_id] = None
            self.cache.completed(node_id)
            self.progress.finish_progress(node_id)
        return done

    async def _advance(self, node_id: str, inputs: dict[str, Any]) -> bool:
        face = self.faces[self.dynprompt.get_node(node_id)["class_type"]]
        if node_id in self._expanded:
            self.cache.put(node_id, self._outputs_of_expansion(self._expanded.pop(node_id), face))
            return True
        if node_id in self._parked:
            results, _ = self._parked.pop(node_id)
            results = await finished_results(results)
            self.seconds[node_id] += time.perf_counter()
        else:
            results = await self._call(node_id, face, inputs)
            if results is None:
                return False
        returns = read_returns(results, face)
        if returns.ui:
            self.ui[node_id] = returns.ui
            self.cache.put_ui(node_id, returns.ui)
            self._tell_executed(node_id, returns.ui)
        if returns.expands:
            await self._expand(node_id, returns)
            return False
        self.cache.put(node_id, merge_results(returns.results, face))
        return True

    async def _call(self, node_id: str, face: NodeFace, inputs: dict[str, Any]) -> list | None:
        """Call the node's function; None when it has to wait, for a lazy input or for its own asynchronous calls."""
        self.progress.start_progress(node_id)
        prompt_inputs = self.dynprompt.get_node(node_id)["inputs"]
        gathered = gather_inputs(prompt_inputs, face, node_id, self.cache.get, self.dynprompt, self.extra_data)
        inputs.update(gathered.values)
        self._tell_executing(node_id)
        instance = self.objects.get(node_id, face, self.dynprompt)
        if face.has_lazy_check and await self._wait_for_lazy(node_id, face, instance, gathered.values, gathered.missing):
            return None

        def before_call(index: int) -> None:
            self._stop_if_interrupted()
            GraphBuilder.set_default_prefix(node_id, index)

        started = time.perf_counter()
        results = await call_over_lists(
            self.prompt_id,
            node_id,
            instance,
            face.cls.FUNCTION,
            gathered.values,
            face.input_is_list,
            before_call=before_call,
            on_block=lambda blocker: self._tell_blocked(node_id, face, blocker),
        )
        tasks = [result for result in results if isinstance(result, asyncio.Task)]
        if not tasks:
            self.seconds[node_id] = time.perf_counter() - started
            return results
        self.seconds[node_id] = -started
        unblock = self.todo.add_external_block(node_id)
        finished = asyncio.gather(*tasks, return_exceptions=True)
        finished.add_done_callback(lambda _: unblock())
        self._parked[node_id] = (results, finished)
        return None

    async def _wait_for_lazy(self, node_id: str, face: NodeFace, instance: Any, values: Mapping, missing: frozenset) -> bool:
        """Ask the node which lazy inputs it needs; True when it has to wait for some."""
        calls = await call_over_lists(
            self.prompt_id, node_id, instance, "check_lazy_status", values, face.input_is_list, before_call=self._stop_if_interrupted
        )
        answers = [answer for answer in await finished_results(calls) if isinstance(answer, (list, tuple, set))]
        wanted = dict.fromkeys(name for answer in answers for name in answer)
        needed = [name for name in wanted if isinstance(name, str) and (name not in values or name in missing)]
        for name in needed:
            self.todo.make_input_strong_link(node_id, name)
        if needed and self.todo.blocks[node_id] == 0:
            raise NodeInputError(f"Node {node_id} needs {', '.join(needed)}, but the linked outputs have no value")
        return bool(needed)

    # --- expansion

    async def _expand(self, node_id: str, returns: NodeReturns) -> None:
        """Add the graphs that a node returned, and let it wait for the outputs that its result links to."""
        children: list[str] = []
        for graph in returns.expansions:
            for child_id, child in (graph or {}).items():
                if self.dynprompt.has_node(child_id):
                    raise DuplicateNodeError(
                        f"The expansion adds node {child_id!r}, which is there already; "
                        "make ids with GraphBuilder, or keep them unique and the same on every run"
                    )
                self.dynprompt.add_ephemeral_node(child_id, child, node_id, child.get("override_display_id", node_id))
                children.append(child_id)
        outputs = [child for child in children if self.faces[self.dynprompt.get_node(child)["class_type"]].output_node]
        await self.cache.expand(node_id, children)
        for child_id in outputs:
            self.todo.add_node(child_id)
        for result, graph in zip(returns.results, returns.expansions):
            for value in result if graph is not None else ():
                if is_link(value):
                    self.todo.add_strong_link(value[0], value[1], node_id)
        self._expanded[node_id] = returns

    def _outputs_of_expansion(self, returns: NodeReturns, face: NodeFace) -> list[list]:
        results = [
            result if graph is None else [self._resolved(value) for value in result]
            for result, graph in zip(returns.results, returns.expansions)
        ]
        return merge_results(results, face)

    def _resolved(self, value: Any) -> Any:
        return Spread(self.cache.get(value[0])[value[1]]) if is_link(value) else value

    # --- IS_CHANGED

    async def _change_token(self, node_id: str) -> Any:
        """What IS_CHANGED says, asked once per run with constants only. An exception counts as "always changed"."""
        face = self.faces[self.dynprompt.get_node(node_id)["class_type"]]
        values = gather_inputs(self.dynprompt.get_node(node_id)["inputs"], face, node_id).values
        try:
            calls = await call_over_lists(self.prompt_id, node_id, face.cls, "IS_CHANGED", values, face.input_is_list)
            return [None if isinstance(token, ExecutionBlocker) else token for token in await finished_results(calls)]
        except Exception as error:
            logging.warning("IS_CHANGED of node %s (%s) failed, so it runs again: %s", node_id, face.class_type, error)
            return float("nan")

    # --- messages

    def _send(self, event: str, data: dict[str, Any]) -> None:
        if self.tell is not None:
            self.tell(event, data)

    def on_progress(self, value: float, total: float, preview: Any = None, prompt_id: str | None = None, node_id: str | None = None):
        """The hook behind ProgressBar: `preview` is ("JPEG" | "PNG", PIL image, largest side) or None."""
        context = get_executing_context()
        node_id = node_id or (context.node_id if context is not None else self.last_node_id)
        self._stop_if_interrupted()
        if node_id is None or not self.dynprompt.has_node(node_id):
            return
        self.progress.update_progress(node_id, value, total, preview)
        self._send("progress", {"value": value, "max": total, "prompt_id": self.prompt_id, "node": node_id})

    def _tell_progress(self, node_id: str, preview: Any) -> None:
        self.tell("progress_state", {"prompt_id": self.prompt_id, "nodes": dict(self.progress.nodes)})
        if preview is not None:
            self.tell("preview_image", {"image": preview, "metadata": {**self.progress.where(node_id), "prompt_id": self.prompt_id}})

    def _tell_executing(self, node_id: str) -> None:
        self.last_node_id = self.dynprompt.get_display_node_id(node_id)
        self._send("executing", {"node": node_id, "display_node": self.last_node_id, "prompt_id": self.prompt_id})

    def _tell_executed(self, node_id: str, ui: dict | None) -> None:
        shown_on = self.dynprompt.get_display_node_id(node_id)
        self._send("executed", {"node": node_id, "display_node": shown_on, "output": ui, "prompt_id": self.prompt_id})

    def _tell_blocked(self, node_id: str, face: NodeFace, blocker: ExecutionBlocker) -> ExecutionBlocker:
        if blocker.message is None:
            return blocker
        self._send(
            "execution_error",
            {
                "prompt_id": self.prompt_id,
                "node_id": node_id,
                "node_type": face.class_type,
                "executed": list(self.executed),
                "exception_message": f"Execution Blocked: {blocker.message}",
                "exception_type": "ExecutionBlocked",
                "traceback": [],
                "current_inputs": [],
                "current_outputs": [],
            },
        )
        return ExecutionBlocker(None)
