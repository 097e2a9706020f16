"""What a caching policy is: when part of the network is left out, and how its value is forecast.

A policy is a frozen dataclass of settings. Some need no more than the Visit to decide: those write `decide`. Others follow the run: `start`
makes their RunState, which the engine asks, feeds and drops with the run. The order in which a visit goes:

    Limits and schedule → state.decide → FULL, SKIP or PROBE
    PROBE: the engine reads one tensor (Probe), state.measure gives a number an image, state.gate decides on them
    state.settle hears how it ended, forced or free; state.observe sees what a full visit computed

One decision holds for all conditions of a visit. It is made on the rows of the first condition that the host hands over, which is the same
one whether conditions come joined or split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import input_error

if TYPE_CHECKING:
    import torch

    from ...families.arch import ArchSpec
    from ...families.blocks import BlockKey
    from .amplification import Sampling
    from .store import Key

__all__ = ["Action", "Choice", "Limits", "Observation", "Policy", "Probe", "RunFacts", "RunState", "SOLVER_RULES", "Visit"]

SOLVER_RULES = ("all", "first_only")


class Action(Enum):
    FULL = "full"
    SKIP = "forecast"
    PROBE = "probe"


class Choice(NamedTuple):
    """What happens in a visit. reason: one or two words for the report; part: the range of blocks that a skip leaves out, where the policy
    has several; statistic: the number that decided, if one did."""

    action: Action
    reason: str
    part: str = ""
    statistic: float | None = None

    @property
    def skip(self) -> bool:
        return self.action is Action.SKIP


@dataclass(frozen=True)
class Visit:
    """One evaluation of the guided model, whatever number of model calls its conditions take.

    index: visits before it in this run. u: fractional step of its sigma. steps: of the run. skipped: visits left out in a row before it.
    second: not the first evaluation of its step, as far as sigmas tell (see Run).
    """

    index: int
    sigma: float
    u: float
    steps: int
    skipped: int
    foreign: bool = False
    second: bool = False


@dataclass(frozen=True)
class Probe:
    """What a gate looks at. The engine keeps it per condition, as a ladder of its own, and forecasts it to the visit at hand.

    at: "latent" (x as the model gets it, before the call), "entry" (the modulated input of the first block), "first_block" (image tokens
    after the first block) or "first_residual" (what the first block adds to them). order: of its ladder. every: renewed in skipped visits
    too, else in full ones. stride: every so many tokens.
    """

    at: str
    order: int = 0
    every: bool = False
    stride: int = 1


@dataclass(frozen=True)
class RunFacts:
    """What is known when a run opens. arch: None for an architecture without block patches; target: its name; where: the node's name."""

    sigmas: tuple[float, ...]
    target: str
    arch: ArchSpec | None
    where: str

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 0)


@dataclass(frozen=True)
class Observation:
    """One condition of a full visit. Tensors are the network's own: read, never kept or written.

    lead: the condition on whose rows gates decide. features: by part, each a tuple of (b, …). probe: what Probe names, or None. last and
    forecast give a part ("probe" is one) as the latest anchor and as its ladder would have forecast it: float32 copies, None without
    history.
    """

    visit: Visit
    key: Key
    lead: bool
    features: Mapping[str, tuple[torch.Tensor, ...]]
    probe: torch.Tensor | None
    last: Callable[[str], list[torch.Tensor] | None]
    forecast: Callable[[str], list[torch.Tensor] | None]


class RunState:
    """What a policy knows of one run. This one knows nothing, and asks the policy's own `decide`."""

    observes = False  # True: `observe` is called

    def __init__(self, policy: Policy):
        self.policy = policy

    def decide(self, visit: Visit) -> Choice:
        """Without side effects: the answer may be overruled."""
        return self.policy.decide(visit)

    def measure(self, fresh: torch.Tensor, forecast: torch.Tensor) -> torch.Tensor:
        """One number an image from the probe, as read and as forecast, both (b, …). → (b,)"""
        raise NotImplementedError(f"{type(self).__name__} measures nothing")

    def gate(self, visit: Visit, values: Sequence[float]) -> Choice:
        """FULL or SKIP from one number an image."""
        raise NotImplementedError(f"{type(self).__name__} has no gate")

    def settle(self, visit: Visit, choice: Choice) -> None:
        """The visit's outcome; called once, before anything is computed."""

    def observe(self, seen: Observation) -> None:
        """A computed condition, before it is kept."""

    def sample(self, sampling: Sampling) -> torch.Tensor:
        """Makes the run; a policy that measures a model may watch it, or make others after it."""
        return sampling.run()

    def findings(self) -> dict[str, Any]:
        """Numbers for the report, read when the run ends; plain values that JSON knows."""
        return {}


@dataclass(frozen=True)
class Policy:
    """Base of the policies; a subclass says when to skip.

    order: of the forecast, 0 to 4. basis: see forecast.py. axis: what the forecast is a polynomial in, "step" or "sigma".
    """

    order: int = 0
    basis: str = "newton"
    axis: str = "step"

    @property
    def can_skip(self) -> bool:
        """False where the settings leave nothing out: then nothing is kept and the calls stay untouched."""
        return True

    @property
    def probe(self) -> Probe | None:
        """What PROBE reads; None for a policy without a gate."""
        return None

    @property
    def keeps(self) -> bool:
        """False for a policy that only observes: every visit is full and nothing is stored."""
        return True

    @property
    def forecasts(self) -> bool:
        """False for a policy that measures and skips nothing."""
        return self.keeps

    def check(self, where: str) -> None:
        """Raises NodeInputError for settings out of range."""

    def ranges(self, arch: ArchSpec) -> Mapping[str, tuple[BlockKey, ...]] | None:
        """Ranges of blocks by part, each without gaps, where the policy itself says them; None: the plan's own, under the part ""."""
        return None

    def parts(self, visit: Visit) -> Sequence[str] | None:
        """Which ranges a full visit keeps; None: all. A range that is not kept loses its history."""
        return None

    def start(self, facts: RunFacts) -> RunState:
        """The state of one run.

        Raises: NodeInputError where the policy does not fit the run.
        """
        return RunState(self)

    def decide(self, visit: Visit) -> Choice:
        raise NotImplementedError(f"{type(self).__name__} decides nothing")

    def line(self) -> str:
        """The settings in one line, for the report."""
        raise NotImplementedError(f"{type(self).__name__} has no name")


@dataclass(frozen=True)
class Limits:
    """Where no policy may skip: the first and last steps, and outside a range given in shares of this run's steps.

    warmup_steps, tail_steps: 0 or more. start, end: 0 to 1; the range is [start, end). max_consecutive: visits skipped in a row at most, −1
    without bound. solver_rule: "first_only" computes every second evaluation of a step.
    """

    warmup_steps: int = 0
    tail_steps: int = 0
    start: float = 0.0
    end: float = 1.0
    max_consecutive: int = -1
    solver_rule: str = "all"

    def check(self, where: str) -> None:
        """Raises NodeInputError for a range that is empty or outside 0 to 1, and for negative steps."""
        for name, steps in (("warmup_steps", self.warmup_steps), ("tail_steps", self.tail_steps)):
            if steps < 0:
                raise input_error(where, name, steps, "0 or more steps", "Enter a count of steps.")
        if not 0.0 <= self.start <= self.end <= 1.0:
            got = f"{self.start:g} to {self.end:g}"
            remedy = "Set start_percent below end_percent."
            raise input_error(where, "start_percent", got, "0 ≤ start_percent ≤ end_percent ≤ 1", remedy)
        if self.max_consecutive < -1:
            raise input_error(where, "max_consecutive", self.max_consecutive, "−1 or more", "Enter −1 for no bound.")
        if self.solver_rule not in SOLVER_RULES:
            raise input_error(where, "solver_rule", self.solver_rule, ", ".join(SOLVER_RULES), "Choose one of these.")

    def forbids(self, visit: Visit) -> str:
        """Why this visit must be full, or an empty string."""
        if visit.foreign:
            return "sigma outside the schedule"
        if visit.sigma == 0.0:
            return "sigma 0"
        if visit.u < self.warmup_steps:
            return "warm-up"
        if visit.u > visit.steps - self.tail_steps - 1e-6:
            return "tail"
        share = visit.u / max(visit.steps, 1)
        if not self.start <= share < self.end:
            return "outside the range"
        if visit.second and self.solver_rule == "first_only":
            return "second evaluation"
        return "most in a row" if 0 <= self.max_consecutive <= visit.skipped else ""
