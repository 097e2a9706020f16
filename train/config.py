"""The description of a run, printable and comparable; what may change when a run is resumed, and what may not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from ..errors import input_error
from .densities import Density
from .losses import Loss
from .optim import Optim
from .targets import AT_NOISE, Target

__all__ = ["RESUME", "TrainConfig"]

RESUME = ("auto", "new", "error_if_exists")


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    Args:
        steps: optimiser steps in all. steps_this_run: at most this many now, 0 for all that are left.
        batch, accumulate: pictures a micro-batch, micro-batches a step. seed: of every draw.
        density, target, loss, optim: see their classes.
        ema: decay of the running average, 0 for none. dropout: probability of the empty condition.
        save_every: steps between checkpoints, 0 for the end alone; save_minutes: as well after this time, 0 for never.
        keep: checkpoints kept besides the best one. validate_every, preview_every: steps between them, 0 for never.
        resume: "auto" goes on from the newest whole checkpoint, "new" sets earlier files aside, "error_if_exists" refuses.
        checkpointing: run blocks again in the backward pass instead of keeping what they made.
    """

    steps: int = 500
    steps_this_run: int = 0
    batch: int = 1
    accumulate: int = 1
    seed: int = 0
    density: Density = field(default_factory=Density)
    target: Target = field(default_factory=Target)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    ema: float = 0.999
    dropout: float = 0.1
    save_every: int = 250
    save_minutes: float = 0.0
    keep: int = 2
    validate_every: int = 100
    preview_every: int = 0
    resume: str = "auto"
    checkpointing: bool = False

    def __post_init__(self):
        checks = (
            ("steps", 1 <= self.steps <= 100_000_000, "1 or more"),
            ("steps_this_run", self.steps_this_run >= 0, "0 (all that are left) or more"),
            ("batch", 1 <= self.batch <= 65536, "1 to 65536"),
            ("accumulate", 1 <= self.accumulate <= 65536, "1 to 65536"),
            ("ema", 0.0 <= self.ema < 1.0, "0 (none) to below 1"),
            ("dropout", 0.0 <= self.dropout <= 1.0, "0 to 1"),
            ("save_every", self.save_every >= 0, "0 (only at the end) or more steps"),
            ("save_minutes", self.save_minutes >= 0.0, "0 (never) or more minutes"),
            ("keep", 1 <= self.keep <= 1000, "1 to 1000"),
            ("validate_every", self.validate_every >= 0, "0 (never) or more steps"),
            ("preview_every", self.preview_every >= 0, "0 (never) or more steps"),
            ("resume", self.resume in RESUME, ", ".join(RESUME)),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise input_error("Train", name, getattr(self, name), allowed, "Correct the value.")
        if self.loss.kind == "huber_wavelet" and self.target.kind in AT_NOISE:
            allowed = f"another loss with target {self.target.kind}: at sigma 1, where it stands, this one's weight has no value"
            raise input_error("Train", "loss", self.loss.kind, allowed, "Choose pseudo_huber.")

    @property
    def examples(self) -> int:
        """Examples a step."""
        return self.batch * self.accumulate

    @classmethod
    def from_table(cls, table: dict[str, Any], where: str) -> TrainConfig:
        """From nested tables as a recipe file has them. Raises NodeInputError for a name that is not known."""
        pieces = {"density": Density, "target": Target, "loss": Loss, "optim": Optim}
        built = {name: _built(pieces[name], value, f"{where}, {name}") if name in pieces else value for name, value in table.items()}
        return _built(cls, built, where)

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def check_resume(self, before: dict[str, Any], model: dict[str, Any], model_before: dict[str, Any]) -> list[str]:
        """What changed since a checkpoint, one line each.

        Args:
            before: as_dict() of the run that wrote it. model, model_before: what is trained, now and then.
        Raises: NodeInputError naming a field that cannot change: what is trained, the seed, the optimiser.
        """
        remedy = "Put it back, set resume to new, or choose another name."
        for name in sorted({*model, *model_before}):
            if model.get(name) != model_before.get(name):
                raise input_error("Train", name, model.get(name), f"{model_before.get(name)!r}, as in the checkpoint", remedy)
        now = self.as_dict()
        for name, new, old in (
            ("seed", now["seed"], before.get("seed")),
            ("optimiser", now["optim"]["kind"], before.get("optim", {}).get("kind")),
            ("target", now["target"]["kind"], before.get("target", {}).get("kind")),
        ):
            if new != old:
                raise input_error("Train", name, new, f"{old!r}, as in the checkpoint", remedy)
        passing = {"steps_this_run", "resume", "save_every", "save_minutes", "keep"}
        return [f"{name}: {before.get(name)!r} → {now[name]!r}" for name in now if name not in passing and now[name] != before.get(name)]


def _built(kind: type, table: Any, where: str) -> Any:
    names = [entry.name for entry in dataclasses.fields(kind)]
    if not isinstance(table, dict):
        raise input_error(where, kind.__name__, table, f"a table of {', '.join(names)}", "Write it as a table.")
    for name in table:
        if name not in names:
            raise input_error(where, name, table[name], ", ".join(names), "Correct the name.")
    try:
        return kind(**table)
    except TypeError as error:  # a comparison of the wrong types inside a check
        raise input_error(where, kind.__name__, table, f"values of the types of {kind.__name__}", str(error)) from None
