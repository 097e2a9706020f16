"""Reader of extra_model_paths.yaml, the file in which people name model folders of other programs.

Only the part of YAML that such files use is read: sections of `key: value`, quotes, comments and `|` blocks. Anything else
is refused with its line number instead of being half understood, and no YAML package is needed.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ...errors import input_error

if TYPE_CHECKING:
    from .folder_paths import FolderPaths

__all__ = ["load_extra_path_config", "parse_sections"]

_ENTRY = re.compile(r"""(?P<indent>\ *)(?P<key>"[^"]*"|'[^']*'|[^\s:#'"\-\[{&*!|>%@`][^:#]*?)\s*:(?:\s+(?P<value>.*))?$""")
_BLOCK = re.compile(r"[|>][+-]?$")
_TRUE = ("true", "yes", "on")


def load_extra_path_config(yaml_path: str, paths: FolderPaths) -> None:
    """Add every folder that the file names to `paths`.

    `base_path` of a section is prepended to its folders; `~` and environment variables in it are expanded; relative paths
    start at the file's own folder. `is_default: true` puts the section's folders first. Raises NodeInputError with the
    line for a file that cannot be read.
    """
    try:
        with open(yaml_path, encoding="utf-8-sig") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise _error(yaml_path, f"{error}", "a readable UTF-8 text file", "Check the path.") from error
    here = os.path.dirname(os.path.abspath(yaml_path))
    for section in parse_sections(text, yaml_path).values():
        base = section.pop("base_path", None)
        base = os.path.join(here, os.path.expandvars(os.path.expanduser(base))) if base else here
        is_default = (section.pop("is_default", None) or "").lower() in _TRUE
        for kind, folders in section.items():
            for folder in (folders or "").split("\n"):
                if folder:
                    paths.add_model_folder_path(kind, os.path.normpath(os.path.join(base, folder)), is_default)


def parse_sections(text: str, source: str = "extra_model_paths.yaml") -> dict[str, dict[str, str | None]]:
    """{section: {key: text}}; a block keeps its line breaks, a key without a value is None."""
    sections: dict[str, dict[str, str | None]] = {}
    current: dict[str, str | None] | None = None
    entry_indent = None
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        line = _without_comment(lines[index])
        index += 1
        if not line.strip() or line in ("---", "..."):
            continue
        match = _ENTRY.match(line)
        if not match:
            raise _line_error(source, index, lines[index - 1])
        indent, key, value = len(match["indent"]), _unquoted(match["key"]), match["value"] or ""
        if indent == 0:
            if value not in ("", "~", "null", "{}"):
                raise _line_error(source, index, lines[index - 1])
            current, entry_indent = sections.setdefault(key, {}), None
            continue
        entry_indent = entry_indent or indent
        if current is None or indent != entry_indent:
            raise _line_error(source, index, lines[index - 1])
        if _BLOCK.match(value):
            value, index = _block(lines, index, indent)
            current[key] = value
        elif value[:1] in ("[", "{", "&", "*", "!", "|", ">", "@", "`"):
            raise _line_error(source, index, lines[index - 1])
        else:
            current[key] = None if value in ("", "~", "null") else _unquoted(value)
    return sections


def _block(lines: list[str], index: int, indent: int) -> tuple[str, int]:
    kept = []
    while index < len(lines) and (not lines[index].strip() or len(lines[index]) - len(lines[index].lstrip(" ")) > indent):
        kept.append(lines[index].strip())
        index += 1
    return "\n".join(kept).strip("\n"), index


def _without_comment(line: str) -> str:
    quote = ""
    for position, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and (position == 0 or line[position - 1] in " :"):
            quote = character
        elif character == "#" and (position == 0 or line[position - 1] in " \t"):
            return line[:position].rstrip()
    return line.rstrip()


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _error(source: str, got: object, allowed: str, remedy: str) -> Exception:
    return input_error("Extra model paths", os.path.basename(source), got, allowed, remedy)


def _line_error(source: str, number: int, line: str) -> Exception:
    allowed = "sections at the margin, below them indented 'kind: folder' lines or 'kind: |' blocks"
    return _error(source, f"line {number}: {line.strip()}", allowed, "Write the line in that form.")
