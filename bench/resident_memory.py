"""What running a graph costs in resident memory: `python resident_memory.py embedded`.

Answers each line on standard input by running text_to_image once more on the same host (nothing is kept in the graph cache) and printing
one JSON line: MiB above the bare torch import, now and at the highest point so far.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path


def resident_mib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def main() -> None:
    import torch

    bare = resident_mib()
    from rectiflow import __version__
    from rectiflow.host.embedded import make_host, run_graph

    graph = Path(__file__).resolve().parent.parent / "workflows" / "api" / "text_to_image.json"
    versions = {"version": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    print(json.dumps({**versions, "bare_torch": bare}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        host = make_host(folder)
        for _ in sys.stdin:
            run_graph(graph, host)
            print(json.dumps({"now": resident_mib() - bare, "peak": peak_mib() - bare}), flush=True)


if __name__ == "__main__":
    main()
