"""A schedule: which steps of a run are computed, with the sigmas it was made for, as a short JSON that travels in a workflow.

Runs of other lengths read it by nearest sigma, never by step number. A schedule made for another family of models, or for sigmas that do
not cover the run's, is refused: what it says about such a run is nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import input_error
from .forecast import BASES
from .policy import RunFacts

__all__ = ["CacheSchedule", "computed_steps", "is_reach", "manual_schedule", "nearest_reach", "read_schedule", "steps_of_text"]

VERSION = 1
MOST_STEPS, MOST_CHARACTERS = 2000, 200_000
MOST_ORDER = 4
# A run's own sigmas come from another float path than the recorded ones; a schedule's ends may differ by rounding, not by a step.
SAME_END = 1e-3


@dataclass(frozen=True)
class CacheSchedule:
    """sigmas: one more than steps. computed: rising step numbers from 0. order, basis, axis: of the forecast it was made for.

    target, blocks: what was recorded, "" for any. family: of the model, "" for any. metric: the error that was summed. cost: its sum;
    even_cost: of as many steps at even distances. reach: of every step, how far its forecast goes along the line of order 1, 1 for all of
    it; empty for 1 throughout.
    """

    sigmas: tuple[float, ...]
    computed: tuple[int, ...]
    order: int = 0
    basis: str = "newton"
    axis: str = "step"
    target: str = ""
    blocks: str = ""
    family: str = ""
    metric: str = ""
    cost: float = 0.0
    even_cost: float = 0.0
    reach: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def mask(self) -> str:
        """A character a step: 1 computed, 0 not."""
        return "".join("1" if step in self.computed else "0" for step in range(self.steps))

    def steps_for(self, facts: RunFacts) -> frozenset[int]:
        """The steps of a run that are computed.

        Raises: NodeInputError for a run of another family, or on sigmas that the schedule does not cover.
        """
        family = facts.arch.family if facts.arch is not None else ""
        if self.family and family and family != self.family:
            remedy = "Record and search a schedule with this model."
            raise input_error(facts.where, "schedule", f"a schedule for {self.family}", f"one for {family}", remedy)
        return computed_steps(self, facts.sigmas, facts.where)

    def note(self, facts: RunFacts) -> str:
        """How a run differs from the one it was made for, in words; empty where it does not."""
        if len(facts.sigmas) == len(self.sigmas) and all(abs(a - b) < SAME_END for a, b in zip(facts.sigmas, self.sigmas)):
            return ""
        return f"the schedule was made for {self.steps} steps on other sigmas; this run has {facts.steps}, matched by nearest sigma"

    def reach_for(self, facts: RunFacts) -> tuple[float, ...]:
        """Of every step of a run, the reach of the nearest step in sigma that has one; empty for 1 throughout."""
        own = [(self.sigmas[step], reach) for step, reach in enumerate(self.reach) if step not in self.computed]
        return nearest_reach(own, facts.sigmas[:-1])

    def json(self) -> str:
        data = {"rectiflow_schedule": VERSION, "mask": self.mask, **asdict(self)}
        del data["computed"]
        return json.dumps(data, ensure_ascii=False, allow_nan=False)

    def line(self) -> str:
        return f"{len(self.computed)} of {self.steps} steps" + (f", {self.family}" if self.family else "")


def computed_steps(schedule: CacheSchedule, sigmas: Sequence[float], where: str) -> frozenset[int]:
    """The steps of a run on `sigmas` that the schedule has computed: each of its sigmas takes the run's nearest step.

    A schedule's step that no step of the run is near to (as many steps of a longer schedule) shares one with its neighbour.

    Raises: NodeInputError where the schedule does not cover the run.
    """
    own, steps = schedule.sigmas[:-1], sigmas[:-1]
    if not steps:
        return frozenset()
    rising = [part[0] < part[-1] for part in (schedule.sigmas, sigmas)]
    low, high = min(schedule.sigmas), max(schedule.sigmas)
    slack = SAME_END * max(1.0, high)
    if rising[0] != rising[1] or min(sigmas) < low - slack or max(sigmas) > high + slack:
        got = f"sigmas {sigmas[0]:.4g} → {sigmas[-1]:.4g}"
        allowed = f"a run within the schedule's {schedule.sigmas[0]:.4g} → {schedule.sigmas[-1]:.4g}"
        raise input_error(where, "schedule", got, allowed, "Record and search a schedule on this range of steps.")
    found = set()
    for step in schedule.computed:
        near = min(range(len(steps)), key=lambda i: abs(steps[i] - own[step]))
        if min(sigmas) - slack <= own[step] <= max(sigmas) + slack:  # steps before a run that starts later are not its own
            found.add(near)
    return frozenset(found)


def read_schedule(text: str, where: str, input_name: str = "schedule") -> CacheSchedule:
    """A schedule from its JSON.

    Raises: NodeInputError for anything else, whatever it is; it says which part is wrong.
    """
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise _unreadable(where, input_name, f"{type(text).__name__} of {len(str(text))} characters", "a short text")
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _unreadable(where, input_name, text, "the JSON text of a schedule") from None
    if not isinstance(data, dict) or "rectiflow_schedule" not in data:
        raise _unreadable(where, input_name, text, "a JSON object with rectiflow_schedule")
    if data["rectiflow_schedule"] != VERSION or isinstance(data["rectiflow_schedule"], bool):
        raise _unreadable(where, input_name, data["rectiflow_schedule"], f"version {VERSION}")
    sigmas, mask = data.get("sigmas"), data.get("mask")
    if not (isinstance(sigmas, list) and 2 <= len(sigmas) <= MOST_STEPS + 1 and all(_is_number(value) for value in sigmas)):
        raise _unreadable(where, input_name, sigmas, f"sigmas: 2 to {MOST_STEPS + 1} finite numbers from 0 on")
    if not (_monotone(sigmas) and min(sigmas) >= 0):
        raise _unreadable(where, input_name, sigmas, "sigmas that only fall, or only rise, from 0 on")
    if not (isinstance(mask, str) and re.fullmatch("1[01]*", mask) and len(mask) == len(sigmas) - 1):
        raise _unreadable(where, input_name, mask, f"a mask of {len(sigmas) - 1} times 0 or 1 that starts with 1")
    return CacheSchedule(
        tuple(float(value) for value in sigmas), tuple(i for i, digit in enumerate(mask) if digit == "1"),
        **_settings(data, where, input_name),
    )  # fmt: skip


def _settings(data: dict, where: str, input_name: str) -> dict[str, Any]:
    """The fields beside sigmas and mask; those that are missing keep their defaults."""
    found = {"reach": _reach(data.get("reach", []), len(data["sigmas"]) - 1, where, input_name)}
    for declared in fields(CacheSchedule)[2:-1]:
        value = data.get(declared.name, declared.default)
        number = isinstance(declared.default, float)
        if not (_is_number(value) if number else type(value) is type(declared.default)) or (isinstance(value, str) and len(value) > 200):
            kind = "a number" if number else "a short text" if isinstance(declared.default, str) else "a whole number"
            raise _unreadable(where, input_name, value, f"{declared.name}: {kind}")
        found[declared.name] = float(value) if number else value
    for name, allowed in (("order", range(MOST_ORDER + 1)), ("basis", BASES), ("axis", ("step", "sigma"))):
        if found[name] not in allowed:
            raise _unreadable(where, input_name, found[name], f"{name}: {', '.join(map(str, allowed))}")
    return found


def is_reach(value: object, steps: int) -> bool:
    """Whether it is a list with nothing, or with a number from 0 to 4 for each of `steps`."""
    return isinstance(value, list) and len(value) in (0, steps) and all(_is_number(reach) and 0 <= reach <= 4 for reach in value)


def nearest_reach(own: Sequence[tuple[float, float]], places: Iterable[float]) -> tuple[float, ...]:
    """The reach of the nearest of `own`, pairs (place, reach), for each of `places`; empty without any."""
    return tuple(min(own, key=lambda one: abs(one[0] - place))[1] for place in places) if own else ()


def _reach(value: object, steps: int, where: str, input_name: str) -> tuple[float, ...]:
    if not is_reach(value, steps):
        raise _unreadable(where, input_name, value, f"reach: nothing, or {steps} numbers from 0 to 4")
    return tuple(float(reach) for reach in value)


def _unreadable(where: str, input_name: str, got: object, allowed: str):
    return input_error(where, input_name, got, allowed, "Link the schedule of Schedule Search or Manual Schedule.")


def _no_constant(name: str):
    raise ValueError(name)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _monotone(sigmas: Sequence[float]) -> bool:
    pairs = list(zip(sigmas, sigmas[1:]))
    return all(a >= b for a, b in pairs) or all(a <= b for a, b in pairs)


_EVERY = re.compile(r"every\s+(\d{1,4})(?:\s+after\s+(\d{1,4}))?")


def steps_of_text(text: str, steps: int, where: str) -> tuple[int, ...]:
    """"0, 3, 6" (step numbers), "1,1,0,1" (a 0 or 1 a step) or "every 4 after 3" → the computed steps, 0 always among them.

    Raises: NodeInputError for other texts and steps that the run does not have.
    """
    text = text.strip()
    allowed = f"step numbers from 0 to {steps - 1}, a 0 or 1 for each of {steps} steps, or 'every 4 after 3'"
    every = _EVERY.fullmatch(text)
    if every and int(every[1]):
        after = int(every[2] or 1)
        return tuple(step for step in range(steps) if step == 0 or step < after or (step - after + 1) % int(every[1]) == 0)
    parts = re.split(r"\s*,\s*", text) if re.fullmatch(r"\d{1,4}(\s*,\s*\d{1,4})*", text) else []
    numbers = [int(part) for part in parts]
    if len(numbers) == steps and set(numbers) <= {0, 1} and steps > 2:
        return tuple(sorted({0, *(step for step, digit in enumerate(numbers) if digit)}))
    if numbers and max(numbers) < steps and len(set(numbers)) == len(numbers):
        return tuple(sorted({0, *numbers}))
    raise input_error(where, "text", text, allowed, "List the steps that shall be computed.")


def manual_schedule(text: str, sigmas: Sequence[float], where: str) -> CacheSchedule:
    """A schedule by hand, for any family and target. sigmas: of the run, one more than steps.

    Raises: NodeInputError for sigmas that are no schedule; see steps_of_text.
    """
    if not 2 <= len(sigmas) <= MOST_STEPS + 1 or not _monotone(sigmas) or not all(map(math.isfinite, sigmas)):
        allowed = f"2 to {MOST_STEPS + 1} sigmas that only fall or only rise"
        raise input_error(where, "sigmas", f"{len(sigmas)} sigmas", allowed, "Link the SIGMAS that go to the sampler.")
    return CacheSchedule(tuple(float(value) for value in sigmas), steps_of_text(text, len(sigmas) - 1, where))
