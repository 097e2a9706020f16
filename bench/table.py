"""One table of a bench: printed in columns, and kept as bench/results/<name>.csv with the machine and the versions it was measured on."""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores, threads of a tensor operation and system."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), name)
    torch = sys.modules.get("torch")  # a bench that starts others need not load it
    threads = torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    graphics = f", {torch.cuda.get_device_name()}" if torch and torch.cuda.is_initialized() else ""
    return f"{name}, {os.cpu_count()} cores, {threads} threads, {platform.system()}{graphics}"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _rectiflow() -> str:
    """The version, and in a checkout the commit, with a + where files differ from it."""
    from rectiflow import __version__

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} {commit}"


def _weights() -> str:
    """Eight digits of the hash of the shipped tiny model's file. Tables without this column were measured on its first weights."""
    file = Path(__file__).parents[1] / "tiny" / "tiny-emoji-flux.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


def surroundings(comfyui: str = "") -> dict[str, str]:
    """Columns that every table ends with; `comfyui` only where a bench ran inside it."""
    about = {
        "rectiflow": _rectiflow(), "tiny_weights": _weights(), "python": platform.python_version(), "torch": _installed("torch"),
        "machine": machine(),
    }  # fmt: skip
    return {**about, "comfyui": comfyui} if comfyui else about


def write_csv(name: str, header: Sequence[str], rows: Iterable[Sequence], comfyui: str = "") -> None:
    """Write the rows to bench/results/<name>.csv, and after their columns those of `surroundings` that the header does not name itself."""
    about = {column: value for column, value in surroundings(comfyui).items() if column not in header}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, *about])
        writer.writerows([*row, *about.values()] for row in rows)


def write_table(name: str, header: Sequence[str], rows: Sequence[Sequence], comfyui: str = "") -> None:
    """`write_csv`, and the same rows on the screen in columns."""
    write_csv(name, header, rows, comfyui)
    widths = [max(len(str(row[column])) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{name}")
    for row in [header, *rows]:
        print("  " + "  ".join(str(value).ljust(width) for value, width in zip(row, widths, strict=True)), flush=True)
