"""The files of a run: a safetensors file and its description for every kept step, whole or not there.

    step-000500.safetensors   params.<name>, ema.<name>, opt.<name>.<state>
    step-000500.json          step, counters, configuration, fingerprints, versions, sha256 of the tensor file
    loss.csv, validation.csv  one row a step, one row a validation

A file is written under a name of its own, flushed to the disk and renamed; the description comes last and holds the hash of the
tensors, so that a pair with the right hash was written to its end. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import input_error

__all__ = ["Checkpoint", "RunFolder", "write_whole"]

FORMAT = 1
_PAIR = re.compile(r"step-(\d{6,9})\.json")
_LARGEST_DESCRIPTION = 64 << 20  # a description is a few kilobytes; a larger one is not ours


@dataclass(frozen=True)
class Checkpoint:
    """One kept step: its tensors and its description."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under "<prefix>." without it."""
        return {name[len(prefix) + 1 :]: value for name, value in self.tensors.items() if name.startswith(f"{prefix}.")}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for half of it, power cuts included."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash_slowly(file)


def _hash_slowly(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


class RunFolder:
    """The folder of one run. `where` names the node or command in messages."""

    def __init__(self, path: Path, where: str = "Train"):
        self.path = Path(path)
        self.where = where

    # Reading ----------------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps with a description, newest first; whether their tensors are whole is seen when they are read."""
        if not self.path.is_dir():
            return []
        found = (_PAIR.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def files(self, step: int) -> tuple[Path, Path]:
        return self.path / f"step-{step:06d}.safetensors", self.path / f"step-{step:06d}.json"

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and a line for every newer one that is damaged."""
        complaints = []
        for step in self.steps():
            try:
                return self.read(step), complaints
            except (OSError, ValueError) as error:
                complaints.append(f"step {step} cannot be used ({error}); trying the one before")
        return None, complaints

    def description(self, step: int) -> dict[str, Any]:
        """The checked description of a step. Raises ValueError where it is not one of ours."""
        path = self.files(step)[1]
        if path.stat().st_size > _LARGEST_DESCRIPTION:
            raise ValueError(f"{path.name} is too large for a description")
        try:
            meta = json.loads(path.read_bytes())
        except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"{path.name} is not JSON: {error}") from None
        if not isinstance(meta, dict) or meta.get("step") != step or not isinstance(meta.get("sha256"), str):
            raise ValueError(f"{path.name} does not describe step {step}")
        if meta.get("format") != FORMAT:
            raise ValueError(f"{path.name} has format {meta.get('format')!r}; this version reads {FORMAT}")
        return meta

    def read(self, step: int) -> Checkpoint:
        """Raises ValueError or OSError for a pair that is not whole."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        meta, tensors = self.description(step), self.files(step)[0]
        if _hash(tensors) != meta["sha256"]:
            raise ValueError(f"{tensors.name} is damaged: its hash is not the one in the description")
        try:
            with torch.inference_mode(False):
                return Checkpoint(step, load_file(str(tensors), device="cpu"), meta)
        except SafetensorError as error:
            raise ValueError(f"{tensors.name}: {error}") from None

    # Writing ----------------------------------------------------------------------------------------------------------

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Write the pair of a step; returns the tensor file. Nothing of an earlier step is touched."""
        from safetensors.torch import save_file

        file, description = self.files(step)
        part = file.with_name(f".{file.name}.part")
        try:
            save_file({name: value.detach().contiguous() for name, value in tensors.items()}, str(part))
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
            digest = _hash(part)
            os.replace(part, file)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
        content = {"format": FORMAT, "step": step, "sha256": digest, **meta}
        write_whole(description, json.dumps(content, indent=1, allow_nan=False).encode())
        return file

    def check_space(self, bytes_each: int) -> None:
        """Raises NodeInputError where two checkpoints do not fit on the disk: one is written while the last one stays."""
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if free < 2 * bytes_each:
            allowed = f"at least {math.ceil(2 * bytes_each / 1e6)} MB free for two checkpoints"
            raise input_error(self.where, "name", f"{free // 1_000_000} MB free in {self.path.name}", allowed, "Make room on the disk.")

    def thin(self, keep: int, best: int | None) -> None:
        """Remove what is older than the newest `keep`, but never the step `best`."""
        for step in self.steps()[max(1, keep) :]:
            if step != best:
                tensors, description = self.files(step)
                description.unlink(missing_ok=True)  # first, so that no description is left without its tensors
                tensors.unlink(missing_ok=True)

    def set_aside(self) -> Path | None:
        """Give the folder's present content another name, for a run that starts anew; returns where it went."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        for number in range(1, 100_000):
            aside = self.path.with_name(f"{self.path.name}.before-{number}")
            if not aside.exists():
                os.replace(self.path, aside)
                return aside
        raise input_error(self.where, "resume", "new", "a run folder that can be set aside", "Remove old folders of this run.")
