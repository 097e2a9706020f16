"""What a schedule search learns from: a cache target's features at every step of whole runs, a fixed sample of their tokens.

A recording is filled by the engine's own capture while a model samples uncached, so what is searched over is what a cache would keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import input_error
from ...families.arch import arch_spec
from ...families.decoupled import decoupled_spec
from .amplification import Sampling, Watched, amplification
from .policy import Action, Choice, Observation, Policy, RunFacts, RunState, Visit
from .store import Key

__all__ = ["RecordOptions", "RecordedRun", "Recorder", "Recording", "recorder"]

ON_A_STEP = 1e-6


@dataclass(frozen=True)
class RecordOptions:
    """tokens: at most so many of a feature are kept, the same of each step. runs: only the latest so many. half: keep float16.

    probes: runs that are made after a recorded one to see how far an error at a step moves its result (amplification.py); 0 for none.
    """

    tokens: int = 128
    runs: int = 8
    seed: int = 0
    half: bool = False
    probes: int = 0


@dataclass
class RecordedRun:
    """One sampling run. traces: per condition, step → (rows, tokens, channels) on the CPU; guided: the same of the guided velocity, where
    the sampler reports its steps; amplification: measured A of some steps.
    """

    sigmas: tuple[float, ...]
    traces: dict[Key, dict[int, Tensor]] = field(default_factory=dict)
    guided: dict[int, Tensor] = field(default_factory=dict)
    amplification: dict[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def complete(self) -> dict[Key, Tensor]:
        """The conditions that were seen at every step: (T, rows, tokens, channels) each."""
        whole = {}
        for key, trace in self.traces.items():
            if len(trace) == self.steps and len({tuple(part.shape) for part in trace.values()}) == 1:
                whole[key] = torch.stack([trace[step] for step in range(self.steps)])
        return whole

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for trace in (*self.traces.values(), self.guided) for part in trace.values())


class Recording:
    """The handle between the node that records and the search.

    target, blocks: what is recorded; family: of the model.
    """

    def __init__(self, target: str, blocks: str, family: str, options: RecordOptions):
        self.target, self.blocks, self.family, self.options = target, blocks, family, options
        self.runs: list[RecordedRun] = []

    def open(self, sigmas: Sequence[float]) -> RecordedRun:
        """A new run; the oldest one goes when there are more than wanted."""
        self.runs.append(RecordedRun(tuple(sigmas)))
        del self.runs[: -self.options.runs]
        return self.runs[-1]

    def whole_runs(self, where: str) -> list[RecordedRun]:
        """The runs that were sampled to their end, all on the sigmas of the latest of them.

        Raises: NodeInputError where there is none.
        """
        whole = [run for run in self.runs if run.complete()]
        if not whole:
            got = f"{len(self.runs)} runs, none of them whole" if self.runs else "a recording without runs"
            remedy = "Link Schedule Record's own model to a sampler that starts above sigma 0, and the sampler's output to 'after'."
            raise input_error(where, "recording", got, "at least one whole run", remedy)
        return [run for run in whole if run.sigmas == whole[-1].sigmas]

    @property
    def nbytes(self) -> int:
        return sum(run.nbytes for run in self.runs)

    def sample(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts of any shape → (rows, tokens, channels): tokens (b, n, d) as they are, latents (b, c, h, w) a token a place."""
        share = max(1, self.options.tokens // len(parts))
        found = []
        for number, part in enumerate(parts):
            tokens = part if part.ndim == 3 else part.flatten(2).transpose(1, 2) if part.ndim > 3 else part[:, None]
            count = tokens.shape[1]
            if count > share:
                draw = torch.Generator().manual_seed(self.options.seed + number)
                tokens = tokens[:, torch.randperm(count, generator=draw)[:share].sort().values.to(tokens.device)]
            found.append(tokens.detach().to("cpu", torch.float16 if self.options.half else torch.float32, copy=True))
        if len({tokens.shape[2] for tokens in found}) > 1:
            found = [tokens.reshape(tokens.shape[0], -1, 1) for tokens in found]
        return torch.cat(found, dim=1)


class _Recording(RunState):
    """Solvers that evaluate a step more than once are recorded at its first evaluation, and between steps not at all."""

    observes = True

    def __init__(self, policy: Recorder, run: RecordedRun):
        super().__init__(policy)
        self.run = run

    def sample(self, sampling: Sampling) -> Tensor:
        recording = self.policy.recording
        watched = Watched(sampling, recording.options.probes)
        result = watched.run()
        self.run.guided = {step: recording.sample([velocity]) for step, velocity in watched.velocities.items()}
        self.run.amplification = amplification(watched, result)
        return result

    def observe(self, seen: Observation) -> None:
        step = round(seen.visit.u)
        trace = self.run.traces.setdefault(seen.key, {})
        if abs(seen.visit.u - step) < ON_A_STEP and 0 <= step < self.run.steps and step not in trace:
            trace[step] = self.policy.recording.sample([part for parts in seen.features.values() for part in parts])


@dataclass(frozen=True)
class Recorder(Policy):
    """Computes every visit, keeps nothing for forecasts, and records."""

    recording: Recording | None = None

    @property
    def keeps(self) -> bool:
        return False

    def start(self, facts: RunFacts) -> RunState:
        return _Recording(self, self.recording.open(facts.sigmas))

    def decide(self, visit: Visit) -> Choice:
        return Choice(Action.FULL, "recording")

    def line(self) -> str:
        return "recording for a schedule search"


def recorder(model: Any, target: str, blocks: str, options: RecordOptions) -> Recorder:
    """A recorder for MODEL `model`, whose family the schedule will name."""
    network = model.get_model_object("diffusion_model")
    arch = decoupled_spec(network) or arch_spec(network)
    return Recorder(recording=Recording(target, blocks, arch.family if arch is not None else "", options))
