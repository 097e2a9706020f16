"""One table of a bench: printed in columns, and kept as bench/results/<name>.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write_csv(name: str, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write the rows to bench/results/<name>.csv under their header."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_table(name: str, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """`write_csv`, and the same rows on the screen in columns."""
    write_csv(name, header, rows)
    widths = [max(len(str(row[column])) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{name}")
    for row in [header, *rows]:
        print("  " + "  ".join(str(value).ljust(width) for value, width in zip(row, widths, strict=True)), flush=True)
