"""Presets: for a family of models, what to do for a wished speed, and what that was measured to cost.

A preset is one JSON file in presets/:

    rectiflow_preset   1
    family             as arch_spec names it; "" is for every family without a file of its own
    measured_on        model, size, sampler, steps, prompts; "" where nothing was measured
    steps              of the runs that were searched; 0 where none was
    points             a list, each with
        ratio          steps of the run over steps computed, 1 to 4
        psnr, psnr_worst   dB, of the decoded pictures against those without a cache, mean and worst; null where not measured
        policy         "schedule": the computed steps as `shares` of the run (see spread.py); "taylor": every interval-th step
        target         last_block or output
        settings       order, and for "taylor" interval, warmup_steps and tail_steps
        shares         for "schedule": rising, from 0, below 1
        reach          for "schedule" of order 1, optional: of every step of the run how far its forecast goes (schedule_search.py)

bench/presets.py measures and writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .schedule import is_reach

__all__ = ["FOLDER", "MOST_SPEED", "Point", "Preset", "preset_for", "read_preset", "shipped_presets"]

FOLDER = Path(__file__).with_name("presets")
VERSION = 1
MOST_SPEED = 4.0
SETTINGS = {"schedule": {"order": 4}, "taylor": {"order": 4, "interval": 50, "warmup_steps": 100, "tail_steps": 100}}  # and their maxima


@dataclass(frozen=True)
class Point:
    """See the head of this file."""

    ratio: float
    psnr: float | None
    psnr_worst: float | None
    policy: str
    target: str
    settings: dict[str, int]
    shares: tuple[float, ...] = ()
    reach: tuple[float, ...] = ()


@dataclass(frozen=True)
class Preset:
    family: str
    measured_on: str
    steps: int
    points: tuple[Point, ...]

    def best(self, speed: float, targets: Collection[str]) -> Point | None:
        """What serves `speed` with one of `targets`; None where the file has nothing for them.

        Measured: the nearest ratio, of several the highest PSNR. Not measured: the fastest that is no faster than asked, else the slowest.
        """
        points = [point for point in self.points if point.target in targets]
        if not points:
            return None
        if self.measured_on:
            return min(points, key=lambda point: (round(abs(math.log(point.ratio / speed)), 6), -(point.psnr or 0.0)))
        slower = [point for point in points if point.ratio <= speed]
        return max(slower, key=lambda point: point.ratio) if slower else min(points, key=lambda point: point.ratio)


def shipped_presets() -> dict[str, Preset]:
    """By family."""
    found = [read_preset(path.read_text(encoding="utf-8"), path.name) for path in sorted(FOLDER.glob("*.json"))]
    return {preset.family: preset for preset in found}


def preset_for(family: str) -> Preset:
    """The family's own, or the one for all families that were not measured."""
    presets = shipped_presets()
    return presets.get(family, presets[""])


def read_preset(text: str, name: str) -> Preset:
    """A preset from its JSON.

    Raises: ValueError naming the file and what is wrong in it.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("rectiflow_preset") != VERSION:
        raise ValueError(f"{name}: rectiflow_preset is not {VERSION}")
    for field, kind in (("family", str), ("measured_on", str), ("steps", int), ("points", list)):
        if type(data.get(field)) is not kind:
            raise ValueError(f"{name}: {field} is not a {kind.__name__}")
    if not data["points"]:
        raise ValueError(f"{name}: no points")
    points = tuple(_point(entry, data["steps"], f"{name}, point {number}") for number, entry in enumerate(data["points"]))
    if any(point.policy == "schedule" for point in points) and data["steps"] < 2:
        raise ValueError(f"{name}: schedules without the steps of their runs")
    return Preset(data["family"], data["measured_on"], data["steps"], points)


def _point(entry: Any, steps: int, where: str) -> Point:
    if not isinstance(entry, dict) or entry.get("policy") not in SETTINGS or entry.get("target") not in ("last_block", "output"):
        raise ValueError(f"{where}: policy is one of {', '.join(SETTINGS)}, target last_block or output")
    if not (_is_number(entry.get("ratio")) and 1.0 <= entry["ratio"] <= MOST_SPEED):
        raise ValueError(f"{where}: ratio is not from 1 to {MOST_SPEED:g}")
    for name in ("psnr", "psnr_worst"):
        if entry.get(name) is not None and not _is_number(entry[name]):
            raise ValueError(f"{where}: {name} is neither a number nor null")
    settings, allowed = entry.get("settings"), SETTINGS[entry["policy"]]
    if not isinstance(settings, dict) or settings.keys() != allowed.keys():
        raise ValueError(f"{where}: settings are {', '.join(allowed)}")
    for name, most in allowed.items():
        if type(settings[name]) is not int or not 0 <= settings[name] <= most:
            raise ValueError(f"{where}: {name} is not a whole number from 0 to {most}")
    shares = entry.get("shares", [])
    if entry["policy"] == "schedule":
        rising = isinstance(shares, list) and all(map(_is_number, shares)) and all(a < b for a, b in zip(shares, shares[1:]))
        if not rising or not shares or shares[0] != 0 or shares[-1] >= 1:
            raise ValueError(f"{where}: shares do not rise from 0 to below 1")
    reach = entry.get("reach", [])
    if not is_reach(reach, steps):
        raise ValueError(f"{where}: reach is neither absent nor {steps} numbers from 0 to 4")
    return Point(
        float(entry["ratio"]), entry.get("psnr"), entry.get("psnr_worst"), entry["policy"], entry["target"], dict(settings), tuple(shares),
        tuple(reach),
    )  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
