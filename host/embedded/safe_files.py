"""The one gate between a name that a user gave and the file system: `checked_path` for every name, `write_new_file` for every
file that a graph makes.

A name may come from a graph of a stranger or from a socket, so it is judged by what it resolves to: links are followed
first, then the result must lie inside the folder it was meant for.
"""

from __future__ import annotations

import contextlib
import ntpath
import os
import re
import secrets
from collections.abc import Callable
from typing import BinaryIO

__all__ = ["UnsafePathError", "checked_path", "is_inside", "write_new_file"]

_SEPARATORS = re.compile(r"[\\/]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Windows opens a device for these whatever the folder and the extension, so a file of that name can never be copied there.
_WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(?:\.|$)", re.IGNORECASE)
_WINDOWS_FORBIDDEN = re.compile(r'[<>:"|?*]')
_MAX_NAME_TRIES = 100_000
# Every common file system takes 255 bytes a component; what is written gets a counter and an ending as well.
_MAX_PATH_BYTES, _MAX_PART_BYTES, _MAX_WRITTEN_PART_BYTES = 1000, 255, 200


class UnsafePathError(ValueError):
    """A name from a user that leads out of its folder or that no file system takes."""


def is_inside(root: str, path: str) -> bool:
    """Whether `path` is `root` or lies below it, after links in both are resolved; neither has to exist."""
    root, path = (os.path.normcase(os.path.realpath(p)) for p in (root, path))
    try:
        return os.path.commonpath((root, path)) == root
    except ValueError:  # different drives
        return False


def checked_path(root: str | os.PathLike, name: str, *, follow_links: bool = False, for_writing: bool = False) -> str:
    """`root` joined with the relative `name`, or UnsafePathError saying what is wrong with `name`.

    Args:
        root: the folder that must not be left; it may itself be a link.
        name: a relative path as the user gave it; empty means `root`.
        follow_links: links below `root` may lead out of it. Only for model folders, where links are how people share
            weights between programs and where a graph cannot create one.
        for_writing: also read backslashes as separators, and refuse names that Windows keeps for devices, so that what
            is written here can be copied anywhere.
    """
    root = os.fspath(root)
    if not isinstance(name, str):
        raise UnsafePathError(f"a path must be text, not {type(name).__name__}")
    if _CONTROL.search(name):
        raise UnsafePathError("the name holds a control character")
    try:
        sizes = [len(os.fsencode(part)) for part in _SEPARATORS.split(name)]
    except UnicodeEncodeError:
        raise UnsafePathError("the name holds text that cannot be a file name") from None
    if sum(sizes) + len(sizes) > _MAX_PATH_BYTES or max(sizes) > (_MAX_WRITTEN_PART_BYTES if for_writing else _MAX_PART_BYTES):
        raise UnsafePathError("the name is too long")
    if name[:1] in ("/", "\\") or ntpath.splitdrive(name)[0] or os.path.isabs(name):
        raise UnsafePathError("the name is an absolute path")
    parts = _SEPARATORS.split(name)
    if ".." in parts:
        raise UnsafePathError("the name steps out of its folder with '..'")
    if for_writing:
        name = "/".join(parts)
    if (for_writing or os.name == "nt") and any(_WINDOWS_DEVICE.match(part.strip(" ")) for part in parts):
        raise UnsafePathError("the name is one that Windows keeps for a device")
    if os.name == "nt" and _WINDOWS_FORBIDDEN.search(name):
        raise UnsafePathError('the name holds one of <>:"|?*')
    path = os.path.join(root, os.path.normpath(name)) if name else root
    if not follow_links and not is_inside(root, path):
        raise UnsafePathError("a link in the name leads out of its folder")
    return path


def write_new_file(folder: str, name: Callable[[int], str], counter: int, write: Callable[[BinaryIO], None]) -> tuple[str, int]:
    """Write a file whole or not at all, under the first free name; an existing file is never touched.

    The bytes go to a hidden file beside the target and get their name in one step, so that Ctrl-C, a full disk or an error
    in `write` leave nothing behind and a reader never sees half a file.

    Args:
        folder: an existing folder that `checked_path` allowed.
        name: file name for a counter; it must change with the counter.
        counter: first counter to try.
        write: writes the content into the open binary file.

    Returns:
        (file name, counter) that were free.
    """
    hidden = os.path.join(folder, f".{secrets.token_hex(8)}.part")
    try:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(hidden, flags, 0o666), "wb") as file:
            write(file)
        for number in range(counter, counter + _MAX_NAME_TRIES):
            try:
                _name_without_overwriting(hidden, os.path.join(folder, name(number)))
            except FileExistsError:
                continue
            return name(number), number
        raise FileExistsError(f"no free name among {_MAX_NAME_TRIES} in {folder}")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden)


def _name_without_overwriting(source: str, target: str) -> None:
    if os.name == "nt":
        os.rename(source, target)  # Windows refuses an existing target
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links (exFAT, some network shares): reserve the name, then move onto it
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            os.replace(source, target)
        except BaseException:
            os.unlink(target)
            raise
