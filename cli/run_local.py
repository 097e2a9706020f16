"""Run a graph on the embedded host in this process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .failures import INTERRUPTED, CommandError, node_failure, node_name, rejection
from .overrides import Override, apply_overrides, refuse_non_finite
from .progress_line import LogAbove, ProgressLine
from .run import Outcome

if TYPE_CHECKING:
    from ..host.embedded import Host

__all__ = ["LocalSettings", "run_local", "unreadable"]

TERMINATED = 143  # SIGTERM, as a shell reports it


@dataclass(frozen=True)
class LocalSettings:
    """Folders and device of one run. `inputs` None takes the project's input folder."""

    out: Path
    inputs: Path | None = None
    extra_model_paths: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"


def run_local(graph: Path, overrides: Sequence[Override], settings: LocalSettings) -> Outcome:
    """Run the graph of a file.

    Raises:
        CommandError: the file, the graph, a value or a node is at fault; nothing half-written is left.
        KeyboardInterrupt: Ctrl-C.
    """
    from ..host.embedded import NodeExecutionError, PromptError, RunInterrupted, run_graph, use_host
    from ..host.embedded.execution.graph_files import load_graph

    with TemporaryDirectory(prefix="rectiflow-") as temp:
        host = _make_host(settings, temp)
        try:
            with use_host(host):
                loaded = load_graph(graph, host.registry)
        except (PromptError, ValueError, OSError) as error:
            raise unreadable(graph, error) from error
        prompt = loaded.prompt
        object_info = _Described(host)
        apply_overrides(prompt, overrides, object_info)
        refuse_non_finite(prompt)
        # A UI graph is written into the picture as it is, so a changed one keeps only its changed prompt.
        runnable = graph if loaded.workflow is not None and not overrides else prompt
        try:
            with _watched(prompt, host) as (line, terminated):
                result = run_graph(runnable, host, on_event=line)
        except PromptError as error:
            raise rejection(error.error, error.node_errors, prompt, object_info) from error
        except RunInterrupted as error:
            raise CommandError(f"stopped at {node_name(error.node_id, prompt)}", TERMINATED if terminated else INTERRUPTED) from error
        except NodeExecutionError as error:
            raise node_failure(error.node_id, error.exception_type, error.message, prompt, error.traceback) from error
        files = tuple(path for path in result.files if Path(temp) not in path.parents)
        return Outcome(files, result.seconds, dict(result.outputs), dict(result.node_seconds))


def _make_host(settings: LocalSettings, temp: str) -> Host:
    from ..host.embedded import HostSettings, make_host

    for name, folder in (("--input", settings.inputs), *(("--extra-model-paths", Path(path)) for path in settings.extra_model_paths)):
        if folder is not None and not folder.exists():
            raise CommandError(f"{name}: there is no {folder}.")
    if settings.out.exists() and not settings.out.is_dir():
        raise CommandError(f"--out: {settings.out} is a file; name a folder.")
    try:
        return make_host(
            output_directory=settings.out,
            input_directory=settings.inputs,
            temp_directory=temp,
            extra_model_paths=settings.extra_model_paths,
            settings=HostSettings(device=settings.device, dtype=settings.dtype),
        )
    except ValueError as error:
        raise CommandError(str(error)) from error


class _Described(Mapping):
    """/object_info as a mapping, each class described when it is asked for."""

    def __init__(self, host: Host):
        self._host = host

    def __getitem__(self, class_id: str) -> dict[str, Any]:
        from ..host.embedded import use_host

        with use_host(self._host):
            return self._host.registry.object_info(class_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._host.registry)

    def __len__(self) -> int:
        return len(self._host.registry)


def unreadable(graph: Path, error: Exception) -> CommandError:
    text = f"{error.strerror}: {graph}" if isinstance(error, OSError) and error.strerror else str(error)
    return CommandError(text if str(graph) in text else f"{graph}: {text}")


@contextmanager
def _watched(prompt: Mapping[str, Any], host: Host) -> Iterator[tuple[ProgressLine, list[int]]]:
    """Show progress and log lines; let SIGTERM stop the run between two steps, as Ctrl-C does."""
    terminated: list[int] = []

    def stop(number: int, frame: Any) -> None:
        terminated.append(number)
        host.interrupt.set()

    logger = logging.getLogger()
    with ProgressLine(prompt) as line:
        above = LogAbove(line)
        above.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        above.addFilter(_said_by_the_command)
        logger.addHandler(above)
        previous = signal.signal(signal.SIGTERM, stop)
        try:
            yield line, terminated
        finally:
            signal.signal(signal.SIGTERM, previous)
            logger.removeHandler(above)


def _said_by_the_command(record: logging.LogRecord) -> bool:
    """The executor logs a failing node, and the command prints the same in its own words."""
    return not (record.module == "executor" and record.levelno == logging.ERROR)

