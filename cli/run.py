"""`rectiflow run GRAPH`: run a graph here, or on a server with `--server`, and say which files it wrote."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .failures import FAILED, CommandError
from .overrides import parse_override

__all__ = ["Outcome", "main"]


@dataclass(frozen=True)
class Outcome:
    """What a run made. files: absolute paths on this machine. seconds: wall clock of the run, without loading torch."""

    files: tuple[Path, ...]
    seconds: float
    outputs: dict[str, Any] = field(default_factory=dict)
    node_seconds: dict[str, float] = field(default_factory=dict)


def main(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    overrides = [parse_override(text) for text in given.overrides]
    with _reported(given):
        if given.server:
            from .run_remote import run_remote

            outcome = run_remote(given.graph, overrides, given.server, given.out)
        else:
            from .run_local import LocalSettings, run_local

            settings = LocalSettings(given.out, given.input, tuple(given.extra_model_paths), given.device, given.dtype)
            outcome = run_local(given.graph, overrides, settings)
        _print(outcome, given.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rectiflow run",
        description="Run a graph: JSON in API or UI format, or a PNG that carries one.",
        epilog="example: rectiflow run workflows/api/text_to_image.json --set 'Prompt.text=noto cat on blue' --set KSampler.seed=7",
    )
    parser.add_argument("graph", type=Path, metavar="GRAPH", help="the file that holds the graph")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="NODE.INPUT=VALUE",
                        help="change an input; NODE is an id, or a class or title that only one node has; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("output"), metavar="DIR", help="folder for the pictures (default: ./output)")
    parser.add_argument("--server", metavar="URL", help="run it on this server, ours or ComfyUI's, and fetch the pictures")
    parser.add_argument("--json", action="store_true", help="print the result, or the error, as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
    here = parser.add_argument_group("only without --server")
    here.add_argument("--input", type=Path, metavar="DIR", help="folder that LoadImage reads (default: the project's input/)")
    here.add_argument("--extra-model-paths", action="append", default=[], metavar="FILE", help="YAML file that names model folders")
    here.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")
    here.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the models' computation")
    return parser


@contextmanager
def _reported(given: argparse.Namespace):
    """Set up logging; with `--json` an error is JSON too, with `--debug` its traceback comes first."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.DEBUG if given.debug else logging.WARNING)
    try:
        yield
    except CommandError as error:
        if given.debug:
            print("".join(error.details.get("traceback") or traceback.format_exception(error)), file=sys.stderr)
        if not given.json:
            raise
        print(json.dumps({"error": error.message, **error.details}, ensure_ascii=False, default=str))
        raise CommandError("", error.status) from error
    except Exception as error:
        if given.debug:
            raise
        message = f"{type(error).__name__}: {error}. This is a fault of Rectiflow or of a node pack; --debug shows where."
        raise CommandError(message, FAILED) from error
    finally:
        logger.setLevel(level)


def _print(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        plain = {"files": [str(path) for path in outcome.files], "seconds": outcome.seconds}
        print(json.dumps({**plain, "node_seconds": outcome.node_seconds, "outputs": outcome.outputs}, ensure_ascii=False, default=str))
        return
    for path in outcome.files:
        print(_short(path))
    if not outcome.files:
        print("The graph saved no file; give it a SaveImage node to keep its pictures.")
    print(f"{outcome.seconds:.2f} s")


def _short(path: Path) -> str:
    """Relative to the current folder where the file lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
