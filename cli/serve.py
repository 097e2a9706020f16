"""`rectiflow serve`: the ComfyUI interface, served by the embedded host. The flags are the server's own."""

from __future__ import annotations

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):  # answered before torch is loaded
        from ..host.embedded.server.options import parse_arguments

        parse_arguments(["--help"])
    from ..host.embedded.server.main import main as serve

    return serve(arguments) or 0
