"""Run a graph on a server, ours or ComfyUI's, and fetch what it saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .failures import FAILED, INTERRUPTED, CommandError, node_failure, rejection
from .overrides import Override, apply_overrides, refuse_non_finite
from .progress_line import ProgressLine
from .run import Outcome

if TYPE_CHECKING:
    from ..client import Client, OutputFile
    from ..host.embedded.execution.registry import NodeRegistry

__all__ = ["run_remote"]


def run_remote(graph: Path, overrides: Sequence[Override], url: str, out: Path) -> Outcome:
    """Send the graph of a file to a server and save its pictures below `out`, never over an existing file.

    Raises:
        CommandError: no server answers, it refuses the graph, or a node failed there.
        KeyboardInterrupt: Ctrl-C; the run is taken from the server's queue or interrupted there.
    """
    from ..client import Client, ClientError, ExecutionFailed, ExecutionInterrupted, PromptRejected

    try:
        with Client(url) as client:
            object_info = client.object_info()
            prompt, workflow = read_for(graph, object_info)
            apply_overrides(prompt, overrides, object_info)
            refuse_non_finite(prompt)
            try:
                with ProgressLine(prompt) as line:
                    finished = client.run(
                        prompt, workflow=None if overrides else workflow, on_event=lambda event: line(event.type, event.data)
                    )
            except PromptRejected as error:
                raise rejection(error.error, error.node_errors, prompt, object_info) from error
            except ExecutionFailed as error:
                failed = error.details
                message = str(failed.get("exception_message", "")).strip()
                kind, lines = str(failed.get("exception_type", "")), failed.get("traceback") or ()
                raise node_failure(error.node_id, kind, message, prompt, lines) from error
            except ExecutionInterrupted as error:
                raise CommandError(str(error), INTERRUPTED) from error
            files = tuple(_save(client, file, out) for file in finished.files if file.type == "output")
            return Outcome(files, finished.seconds, finished.outputs)
    except ClientError as error:
        raise CommandError(str(error), FAILED) from error


def read_for(graph: Path, object_info: Mapping[str, Mapping]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(prompt in API format, UI form or None); a UI graph is translated with what the server says about its nodes."""
    from ..host.embedded import PromptError
    from ..host.embedded.execution.graph_files import load_graph
    from .run_local import unreadable

    try:
        loaded = load_graph(graph, _registry(object_info))
    except (PromptError, ValueError, OSError) as error:
        raise unreadable(graph, error) from error
    return loaded.prompt, loaded.workflow


def _registry(object_info: Mapping[str, Mapping]) -> NodeRegistry:
    """The server's nodes as far as their descriptions go: enough to read a saved workflow, nothing to run."""
    from ..host.embedded.execution.registry import NodeRegistry

    registry = NodeRegistry()
    for class_id, entry in object_info.items():
        inputs = MappingProxyType(entry.get("input") or {})
        described = {"INPUT_TYPES": staticmethod(lambda inputs=inputs: inputs), "RETURN_TYPES": tuple(entry.get("output") or ())}
        registry.add({class_id: type(class_id, (), described)}, {class_id: entry.get("display_name") or class_id})
    return registry


def _save(client: Client, file: OutputFile, out: Path) -> Path:
    """Fetch one file under its own name, with a number where that is taken. The server's name is checked like a user's."""
    from ..host.embedded.safe_files import UnsafePathError, checked_path, write_new_file

    content = client.download(file)
    name = PurePosixPath(file.filename.replace("\\", "/")).name
    try:
        folder = Path(checked_path(out, file.subfolder, for_writing=True))
        checked_path(out, name, for_writing=True)
    except UnsafePathError as error:
        named = f"{file.subfolder}/{file.filename}"
        raise CommandError(f"the server names a file '{named}' that is not written here: {error}.", FAILED) from error
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = Path(name).stem, Path(name).suffix

    def numbered(count: int) -> str:
        return name if count == 0 else f"{stem} ({count}){suffix}"

    saved, _ = write_new_file(str(folder), numbered, 0, lambda to: to.write(content))
    return (folder / saved).absolute()
