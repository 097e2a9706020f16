"""The command line: `rectiflow COMMAND`, one module a command, each with a SUMMARY line and `main(arguments) -> exit status`.

A command's module imports what is heavy inside its functions, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys

from .failures import BAD_INPUT, INTERRUPTED, CommandError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "run": "run a graph and save its pictures",
    "serve": "serve the ComfyUI interface and its HTTP API",
    "test": "run the tests",
    "nodes": "list the nodes, or show the inputs and outputs of one",
    "train": "train by a recipe, such as the tiny model that ships",
    "doctor": "show what is installed, which device is used, and what to mend",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return "\n".join(("usage: rectiflow COMMAND …", "", *lines, "", "`rectiflow COMMAND --help` tells more.", ""))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the console script and `python -m rectiflow` come here.

    Returns:
        0, 1 for a failure, 2 for input that cannot be used, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # Threads of torch that spin while they wait make a run ten times slower where other programs want the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if arguments else BAD_INPUT
    if command == "--version":
        from .. import __version__

        print(f"rectiflow {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"rectiflow: there is no command '{command}'.\n\n{usage()}", end="", file=sys.stderr)
        return BAD_INPUT
    try:
        status = importlib.import_module(f".{command}", __name__).main(arguments[1:])
        sys.stdout.flush()
        return status
    except CommandError as error:
        if error.message:
            print(f"rectiflow: {error.message}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("rectiflow: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe such as `| head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
