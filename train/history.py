"""What a run tells about itself while it learns: the loss of every step, every validation and every straightness, in memory and as CSV."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["History", "StepRecord", "StraightnessRecord", "ValidationRecord"]

LOSS_COLUMNS = ("step", "loss", "gradient_norm", "lr_factor", "skipped")
STRAIGHTNESS_COLUMNS = ("step", "beta", "s", "s_relative")
FLUSH_EVERY = 20


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. step counts from 1; loss and gradient_norm may be NaN where the step was skipped."""

    step: int
    loss: float
    gradient_norm: float
    lr_factor: float
    skipped: bool = False


@dataclass(frozen=True)
class ValidationRecord:
    """Velocity error after `step` steps on fixed examples: a mean and one number a sigma of `sigmas`, with the weights or their average."""

    step: int
    weights: str
    mean: float
    bins: tuple[float, ...]
    sigmas: tuple[float, ...]


@dataclass(frozen=True)
class StraightnessRecord:
    """S of the flow's own paths after `step` steps, of the average where one is kept; relative: over the squared length of the paths.

    beta: how much of a pair's noise was fresh then, 0 where nothing is annealed.
    """

    step: int
    beta: float
    value: float
    relative: float


@dataclass
class History:
    """Records of a run. `folder` None keeps them in memory alone."""

    folder: Path | None = None
    steps: list[StepRecord] = field(default_factory=list)
    validations: list[ValidationRecord] = field(default_factory=list)
    straightness: list[StraightnessRecord] = field(default_factory=list)
    _waiting: int = 0

    @classmethod
    def load(cls, folder: Path, up_to: int) -> History:
        """The records up to step `up_to`; rows that a killed process wrote after its last checkpoint are dropped from the files."""
        history = cls(folder)
        for row in _rows(folder / "loss.csv"):
            record = StepRecord(int(row[0]), float(row[1]), float(row[2]), float(row[3]), row[4] == "1")
            if record.step <= up_to:
                history.steps.append(record)
        sigmas = tuple(float(name.removeprefix("sigma_")) for name in _header(folder / "validation.csv")[3:])
        for row in _rows(folder / "validation.csv"):
            if int(row[0]) <= up_to:
                history.validations.append(ValidationRecord(int(row[0]), row[1], float(row[2]), tuple(map(float, row[3:])), sigmas))
        for row in _rows(folder / "straightness.csv"):
            if int(row[0]) <= up_to:
                history.straightness.append(StraightnessRecord(int(row[0]), *map(float, row[1:])))
        history.rewrite()
        return history

    def add(self, record: StepRecord) -> None:
        self.steps.append(record)
        self._waiting += 1
        if self._waiting >= FLUSH_EVERY:
            self.flush()

    def validated(self, record: ValidationRecord) -> None:
        self.validations.append(record)
        if self.folder is not None:
            _append(self.folder / "validation.csv", self._validation_header(), [_validation_row(record)])

    def straightened(self, record: StraightnessRecord) -> None:
        self.straightness.append(record)
        if self.folder is not None:
            _append(self.folder / "straightness.csv", STRAIGHTNESS_COLUMNS, [_straightness_row(record)])

    def flush(self) -> None:
        if self.folder is not None and self._waiting:
            _append(self.folder / "loss.csv", LOSS_COLUMNS, [_step_row(record) for record in self.steps[-self._waiting :]])
        self._waiting = 0

    def rewrite(self) -> None:
        """Write both files from what is in memory."""
        self._waiting = 0
        if self.folder is None:
            return
        _write(self.folder / "loss.csv", LOSS_COLUMNS, [_step_row(record) for record in self.steps])
        if self.validations:
            _write(self.folder / "validation.csv", self._validation_header(), [_validation_row(r) for r in self.validations])
        if self.straightness:
            _write(self.folder / "straightness.csv", STRAIGHTNESS_COLUMNS, [_straightness_row(r) for r in self.straightness])

    def mean_loss(self, last: int = 50) -> float:
        """Mean over the last finite losses; NaN where there are none."""
        losses = [record.loss for record in self.steps[-last:] if math.isfinite(record.loss)]
        return sum(losses) / len(losses) if losses else math.nan

    def best(self) -> ValidationRecord | None:
        """The validation with the least error of averaged weights, the earliest of equals."""
        averaged = [record for record in self.validations if record.weights == "ema"] or self.validations
        return min(averaged, key=lambda record: record.mean, default=None)

    def _validation_header(self) -> tuple[str, ...]:
        return ("step", "weights", "mean", *(f"sigma_{sigma:.3f}" for sigma in self.validations[-1].sigmas))


def _step_row(record: StepRecord) -> tuple:
    return record.step, repr(record.loss), repr(record.gradient_norm), repr(record.lr_factor), int(record.skipped)


def _validation_row(record: ValidationRecord) -> tuple:
    return record.step, record.weights, repr(record.mean), *map(repr, record.bins)


def _straightness_row(record: StraightnessRecord) -> tuple:
    return record.step, repr(record.beta), repr(record.value), repr(record.relative)


def _header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def _rows(path: Path) -> list[list[str]]:
    """Rows without the header; a last row that was cut off is dropped."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    return [row for row in rows[1:] if len(row) == len(rows[0])]


def _write(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _append(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    new = not path.is_file()
    with open(path, "a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows] if new else rows)
