"""Models side by side for people: what each weighs, how long it takes, and how far its pictures are from the first one's."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

from torch import Tensor

from .stopwatch import RunTimes

__all__ = ["ModelRow", "model_captions", "model_csv", "model_row", "model_table", "shrunk"]

LARGEST = 128  # pixels a side that a feature distance by the tiny model is measured at; it was trained at 64


@dataclass(frozen=True)
class ModelRow:
    """One model. mib: of its weights; seconds: median of the timed runs; speed: the first model's seconds over these; calls: of the network
    in a run; psnr (dB), ssim, features: means over the batch against the first model's pictures."""

    label: str
    mib: float
    seconds: float
    speed: float
    calls: int
    psnr: float
    ssim: float
    features: float


def model_row(
    label: str, nbytes: int, timed: Sequence[RunTimes], first: Sequence[RunTimes], distances: tuple[float, float, float]
) -> ModelRow:
    """Args:
        timed: runs after the warming one, at least one; first: those of the first model.
        distances: PSNR, SSIM, feature distance.
    """
    seconds = median(run.seconds for run in timed)
    speed = median(run.seconds for run in first) / seconds if seconds else float("nan")
    return ModelRow(label, nbytes / 2**20, seconds, speed, timed[-1].calls, *distances)


def model_table(rows: Sequence[ModelRow], rounds: int) -> str:
    wide = max(len("model"), *(len(row.label) for row in rows))
    lines = [f"{'model':{wide}s}      MiB   seconds   speed  calls  PSNR dB    SSIM  features"]
    for row in rows:
        lines.append(
            f"{row.label:{wide}s} {row.mib:8.1f} {row.seconds:9.3f} {row.speed:6.2f}× {row.calls:6d} {row.psnr:8.2f} {row.ssim:7.4f} "
            f"{row.features:9.4f}"
        )
    runs = "one run" if rounds == 1 else f"the median of {rounds} runs"
    return "\n".join([*lines, f"seconds: {runs} after one that warms up; PSNR, SSIM and features: against {rows[0].label}"])


def model_captions(rows: Sequence[ModelRow]) -> list[str]:
    """A caption a model: its label, then what it costs and how near it is. Pillow's own font has no ×."""
    first = f"{rows[0].label}: {rows[0].mib:.1f} MiB, {rows[0].seconds:.2f} s"
    return [first] + [f"{row.label}: {row.mib:.1f} MiB, {row.speed:.2f}x, {row.psnr:.1f} dB" for row in rows[1:]]


def model_csv(rows: Sequence[ModelRow]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in fields(ModelRow)])
    for row in rows:
        costs = (f"{row.mib:.3f}", f"{row.seconds:.4f}", f"{row.speed:.3f}", row.calls)
        writer.writerow([row.label, *costs, f"{row.psnr:.3f}", f"{row.ssim:.5f}", f"{row.features:.5f}"])
    return out.getvalue()


def shrunk(pictures: Tensor) -> Tensor:
    """Pictures (b, h, w, c) averaged down by a whole number to sides of at most LARGEST, cut to multiples of 16."""
    factor = -(-max(pictures.shape[1:3]) // LARGEST)
    height, width = (side // (16 * factor) * 16 for side in pictures.shape[1:3])
    if min(height, width) == 0:
        return pictures
    part = pictures[:, : height * factor, : width * factor]
    return part.unflatten(1, (height, factor)).unflatten(3, (width, factor)).mean(dim=(2, 4))
