"""Users, their folders and their settings, kept as files below the user folder.

There is one user, `default`, unless the server was started for several; then the header `Comfy-User` names one. That keeps
people's workflows apart, it does not protect them: there is no password.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import uuid
from typing import Any

from ..folder_paths import FolderPaths
from .files import replace_file

__all__ = ["DEFAULT_USER", "DuplicateUser", "UnknownUser", "Users"]

DEFAULT_USER = "default"
SETTINGS_FILE = "comfy.settings.json"
USERS_FILE = "users.json"
MAX_NAME = 100


class UnknownUser(LookupError):
    """The request names a user that was never made."""


class DuplicateUser(ValueError):
    """The name is taken."""


class Users:
    """The users of one server. Methods block on small files; call them in a thread."""

    def __init__(self, paths: FolderPaths, multi_user: bool):
        self._paths = paths
        self.multi_user = multi_user
        self._lock = threading.Lock()

    def names(self) -> dict[str, str]:
        """User id → name."""
        if not self.multi_user:
            return {DEFAULT_USER: DEFAULT_USER}
        names = _read_object(os.path.join(self._paths.user_directory, USERS_FILE))
        return {key: name for key, name in names.items() if isinstance(name, str)}

    def identify(self, header: str | None) -> str:
        """The id a request acts under; raises UnknownUser."""
        user = header if self.multi_user and header is not None else DEFAULT_USER
        if user not in self.names():
            raise UnknownUser(user)
        return user

    def folder(self, user: str) -> str:
        return os.path.join(self._paths.user_directory, user)

    def add(self, name: str) -> str:
        """Make a user and return the id; raises DuplicateUser, or ValueError for an unusable name."""
        name = name.strip()
        if not name or len(name) > MAX_NAME:
            raise ValueError(f"A username has 1 to {MAX_NAME} characters.")
        with self._lock:
            names = self.names()
            if name in names.values():
                raise DuplicateUser(name)
            user = re.sub("[^a-zA-Z0-9-_]+", "-", name) + "_" + str(uuid.uuid4())
            names[user] = name
            replace_file(os.path.join(self._paths.user_directory, USERS_FILE), json.dumps(names).encode())
        return user

    def settings(self, user: str) -> dict[str, Any]:
        return _read_object(os.path.join(self.folder(user), SETTINGS_FILE))

    def change_settings(self, user: str, changes: dict[str, Any]) -> None:
        """Merge `changes` into the user's settings; two requests at once lose nothing."""
        path = os.path.join(self.folder(user), SETTINGS_FILE)
        with self._lock:
            settings = {**_read_object(path), **changes}
            replace_file(path, json.dumps(settings, indent=4).encode())


def _read_object(path: str) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none; a broken file is put aside, not overwritten."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        value = error
    if isinstance(value, dict):
        return value
    logging.error("%s is not a JSON object (%s); it is kept as %s.broken", path, value, os.path.basename(path))
    os.replace(path, path + ".broken")
    return {}
