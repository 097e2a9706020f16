"""`rectiflow nodes [CLASS]`: what can stand in a graph. Nothing is computed, so torch is not loaded."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from .failures import CommandError
from .node_table import describe_all, describe_one, known_nodes

__all__ = ["main"]

LONGEST_CHOICES_SHOWN = 12


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rectiflow nodes", description="List the nodes by category, or show one node's inputs and outputs."
    )
    parser.add_argument("name", nargs="?", metavar="CLASS", help="class id or display name of a node")
    parser.add_argument("--json", action="store_true", help="print what GET /object_info answers")
    given = parser.parse_args(arguments)
    with known_nodes() as registry:
        described = describe_all(registry) if given.name is None else describe_one(registry, given.name)
        failures = registry.failures
    if given.json:
        print(json.dumps(described, indent=2, ensure_ascii=False))
    elif given.name is None:
        print("\n".join(_listing(described)))
    else:
        print("\n".join(_page(next(iter(described.values())))))
    if failures:
        named = "\n".join(f"  {path}: {reason}" for path, reason in failures.items())
        raise CommandError(f"these node packs could not be loaded:\n{named}", status=1)
    return 0


def _listing(described: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    by_category: dict[str, list[Mapping]] = defaultdict(list)
    for entry in described.values():
        by_category[entry["category"]].append(entry)
    width = max(len(entry["name"]) for entry in described.values())
    for category in sorted(by_category, key=lambda name: (not name.startswith("rectiflow"), name)):
        yield f"{category}"
        for entry in sorted(by_category[category], key=lambda entry: entry["name"]):
            yield f"  {entry['name']:<{width}}  {_title(entry)}"
        yield ""
    yield "`rectiflow nodes CLASS` shows the inputs and outputs of one."


def _title(entry: Mapping[str, Any]) -> str:
    return entry.get("display_name") or entry["name"]


def _page(entry: Mapping[str, Any]) -> Iterator[str]:
    yield f"{entry['name']} · {_title(entry)} · {entry['category']}"
    if entry.get("description"):
        yield from ("", *_wrapped(entry["description"], ""))
    for group in ("required", "optional"):
        declared = entry["input"].get(group) or {}
        if declared:
            yield from ("", f"{group} inputs")
        for name, spec in declared.items():
            yield from _input_lines(name, spec)
    yield from ("", "outputs")
    tooltips = entry.get("output_tooltips") or ()
    for place, (kind, name) in enumerate(zip(entry["output"], entry["output_name"])):
        yield f"  {place}  {name}  {_type_name(kind)}" + ("  (a list)" if entry["output_is_list"][place] else "")
        if place < len(tooltips) and tooltips[place]:
            yield from _wrapped(tooltips[place], "       ")
    if not entry["output"]:
        yield "  none" + (" (it ends a graph)" if entry.get("output_node") else "")


def _input_lines(name: str, spec: Any) -> Iterator[str]:
    kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
    facts = [_type_name(kind)]
    if "default" in options:
        facts.append(f"= {json.dumps(options['default'], ensure_ascii=False, default=str)}")
    if "min" in options or "max" in options:
        facts.append(f"from {options.get('min', '-∞')} to {options.get('max', '∞')}")
    yield f"  {name}  {'  '.join(facts)}"
    choices = kind if isinstance(kind, (list, tuple)) else options.get("options", ())
    if choices:
        shown = ", ".join(map(str, choices[:LONGEST_CHOICES_SHOWN]))
        rest = len(choices) - LONGEST_CHOICES_SHOWN
        yield from _wrapped(f"one of: {shown}" + (f" and {rest} more" if rest > 0 else ""), "       ")
    if options.get("tooltip"):
        yield from _wrapped(options["tooltip"], "       ")


def _type_name(kind: Any) -> str:
    return "choice" if isinstance(kind, (list, tuple)) or kind == "COMBO" else str(kind)


def _wrapped(text: str, indent: str) -> Iterator[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    for paragraph in text.split("\n"):
        yield from textwrap.wrap(paragraph, width, initial_indent=indent, subsequent_indent=indent) or [""]
