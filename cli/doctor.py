"""`rectiflow doctor`: what is installed, which host and device, which palettes are missing, and what to mend."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict

from .checks import SECTIONS, Finding

__all__ = ["main"]

MARKS = {"ok": "✓", "note": "·", "fault": "✗"}
ASCII_MARKS = {"ok": "+", "note": "-", "fault": "!"}


def main(arguments: list[str]) -> int:
    """Returns 1 when something that everything needs is broken, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="rectiflow doctor", description="Show what is installed and used here, and what to mend.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    given = parser.parse_args(arguments)
    sections = {title: list(_guarded(title, look)) for title, look in SECTIONS.items()}
    if given.json:
        print(json.dumps({title: [asdict(finding) for finding in found] for title, found in sections.items()}, indent=2))
    else:
        print("\n".join(_lines(sections)))
    return int(any(finding.state == "fault" for found in sections.values() for finding in found))


def _guarded(title: str, look) -> Iterable[Finding]:
    """A doctor must not fall ill: a check that fails is itself a finding."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(title, f"{type(error).__name__}: {error}", "fault", "This check itself failed; please report it.")


def _lines(sections: dict[str, list[Finding]]) -> Iterable[str]:
    marks = MARKS if (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" else ASCII_MARKS
    width = max(len(finding.name) for found in sections.values() for finding in found)
    for title, found in sections.items():
        yield title
        for finding in found:
            yield f"  {marks[finding.state]} {finding.name:<{width}}  {finding.value}"
            if finding.remedy:
                yield f"    {'':<{width}}  → {finding.remedy}"
        yield ""
    faults = sum(finding.state == "fault" for found in sections.values() for finding in found)
    yield "Everything that is needed is here." if not faults else f"{faults} thing{'s' * (faults > 1)} to mend, marked {marks['fault']}."
