"""Students that begin nearest: the last projection of each of their streams by least squares.

    S(h) = c(h) + Σ_l g_l(h) ⊙ (z_l(h)·W_lᵀ + b_l)
    min over W, b of  Σ_tokens ‖S(T_{u−1}) − T_v‖²/‖T_v‖²  +  λ·d·‖(W, b) − (W₀, b₀)‖²

l are the layers that end a block's streams (the MLP's second one; in single blocks of Flux the one for heads and MLP together), z_l what
enters them. Behind such a layer a block only multiplies by a gate and adds, so that c is what the block makes of zeros there and c + g
what it makes of ones: nothing of its code needs to be known, and where c + g ⊙ y is not what it makes of its own y (Lumina 2 norms it)
there is no such projection. PPCL (arXiv 2511.16156) begins with a copy, (W₀, b₀), and trains; this begins where training that layer alone
would end. Conjugate gradients on the normal equations, preconditioned by their diagonal, whose mean is d; λ and the number of iterations
are those that serve best the images that are held out, and the whole is then solved once more with these.

`student_tables` have for every run what the model's answer loses with such a student in its place, ‖v − v_t‖²/‖v_t‖² on what is held out:
what runs are chosen by (probes.best_runs) where the CKA of linear maps does not know what an error does behind the run. A second one adds
half of what the final latents lose, ‖x̂0 − x̂0_t‖²/‖x̂0_t‖² of whole runs: an error at high sigma leads them elsewhere, one at low sigma
hardly. Half, since these come out up to twice as large and from few samples: in full, some seeds lead to late blocks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, combinations, groupby, islice, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ...families.stack import Stack, StackBlock, State
from ...families.width import width_groups
from .gates import Handler, own
from .identity import original_part
from .plan import Run
from .probes import ProbeStats, few_tokens
from .scores import relative_error
from .students import in_fp32, new_student

__all__ = ["OUTCOME", "VELOCITY", "FittedLayer", "LastLayers", "StudentFit", "last_layers", "runs_to_judge", "student_tables"]

RIDGES = (0.01, 0.1, 1.0, 10.0)
TABLE_RIDGE = 1.0  # for the table, where trying more would cost as much again
LATENT_SHARE = 0.5  # of the final latents' error in OUTCOME
ITERATIONS = 20
AFFINE = 1e-2  # of the layer's own share in the block's output: what c + g ⊙ y may miss
TINY = 1e-12
VELOCITY, OUTCOME = "velocity", "outcome"  # names of the tables


def last_layers(model: Any, stack: Stack) -> dict[str, tuple[str, ...]]:
    """Path of a block → names below it of the layers that end its streams; a block whose MLP is not known has none."""
    found: dict[str, tuple[str, ...]] = {block.path: () for block in stack.blocks}
    for group in width_groups(stack, lambda path: original_part(model, path)):
        if not group.is_heads:
            found[group.path] += (group.columns[0].layer[len(group.path) + 1 :],)
    return found


@dataclass(frozen=True)
class FittedLayer:
    """before, after: mean over held-out tokens of ‖s − t‖²/‖t‖², as copied and as fitted. ridge, iterations: what served them best."""

    before: float
    after: float
    ridge: float
    iterations: int


@dataclass
class _Rows:
    """Tokens of one layer: z (n, k), gate over ‖t‖ and what is missing over ‖t‖, both (n, d); held: of images that only judge."""

    z: list[Tensor] = field(default_factory=list)
    gate: list[Tensor] = field(default_factory=list)
    missing: list[Tensor] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)

    def of(self, held: bool | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Joined; None for all of them. z has a column of ones."""
        chosen = [i for i, each in enumerate(self.held) if held is None or each == held]
        z, gate, missing = (torch.cat([parts[i] for i in chosen]).to(device) for parts in (self.z, self.gate, self.missing))
        return torch.cat((z, z.new_ones(len(z), 1)), dim=1), gate, missing


class LastLayers:
    """Collects, call by call of the whole model, what the last layers of one student would have to say, and solves for them.

    per_image: tokens kept of each image and stream in a call. unfit: why a layer was left as it is.
    """

    def __init__(self, student: nn.Module, layers: Sequence[str], per_image: int):
        self.student = student
        self.layers = {name: student.get_submodule(name) for name in layers}
        self.per_image = per_image
        self.rows: dict[str, _Rows] = {name: _Rows() for name in layers}
        self.unfit: dict[str, str] = {} if layers else {"last layer": "not known in this family"}
        self._behind: dict[str, tuple[int, Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def take(self, state: State, run: Callable[[State], State]) -> None:
        """`state` enters the run; run(state) is what the student makes of it."""
        state = tuple(tokens.float() for tokens in state)
        entering: dict[str, Tensor] = {}
        said: dict[str, Tensor] = {}

        def note(name: str, given: Tensor, out: Tensor) -> Tensor:
            entering[name], said[name] = given, out
            return out

        exact = self._with_outputs(state, run, note)
        nothing = self._with_outputs(state, run, lambda name, given, out: torch.zeros_like(out))
        self._behind = {}
        for name in self.layers:
            ones = self._with_outputs(state, run, lambda other, given, out, name=name: torch.full_like(out, float(other == name)))
            gates = [a - b for a, b in zip(ones, nothing)]
            stream = max(range(len(gates)), key=lambda place: float(gates[place].abs().sum()))
            gate, share = gates[stream], exact[stream] - nothing[stream]
            if said[name].shape != gate.shape or float((gate * said[name] - share).norm()) > AFFINE * float(share.norm()):
                self.unfit[name] = "the block does more behind it than multiply and add"
            else:
                self._behind[name] = (stream, entering[name], gate, nothing[stream])

    def _with_outputs(self, state: State, run: Callable[[State], State], replace: Callable[[str, Tensor, Tensor], Tensor]) -> State:
        """run(state) where replace(name, what enters, what comes out) comes out of each last layer."""
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hooks.enter_context(layer.register_forward_hook(lambda _, given, out, name=name: replace(name, given[0], out)))
            return run(own(state))

    @torch.no_grad()
    def wanted(self, state: State, held: bool) -> None:
        """`state` is what the whole model has behind the run. held: this call only judges."""
        for name, (stream, z, gate, nothing) in self._behind.items():
            target = state[stream].float()
            weigh = 1.0 / target.norm(dim=-1, keepdim=True).clamp(min=TINY)
            rows, seed = self.rows[name], len(self.rows[name].z)
            for kept, tokens in ((rows.z, z), (rows.gate, gate * weigh), (rows.missing, (target - nothing) * weigh)):
                kept.append(few_tokens(tokens, self.per_image, seed))
            rows.held.append(held)

    @torch.no_grad()
    def solve(self, ridges: Sequence[float] = RIDGES) -> dict[str, FittedLayer]:
        """Put the solutions on the student; layer → how near it came. Layers of `unfit` keep their weights."""
        found = {}
        for name, layer in self.layers.items():
            rows = self.rows[name]
            if name in self.unfit or not rows.z:
                continue
            bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(len(layer.weight))
            start = torch.cat((layer.weight, bias[:, None]), dim=1).float()
            judged = rows.of(True if any(rows.held) else None, start.device)
            shown = rows.of(False if not all(rows.held) else None, start.device)
            tried = [(_error(*judged, start), ridges[-1], 0)]
            for ridge in ridges:
                tried += [(_error(*judged, solution), ridge, count) for count, solution in enumerate(_descent(*shown, start, ridge), 1)]
            after, ridge, count = min(tried)
            solutions = chain([start], _descent(*rows.of(None, start.device), start, ridge))
            solution = next(islice(solutions, count, None))
            layer.weight.copy_(solution[:, :-1])
            if layer.bias is not None:
                layer.bias.copy_(solution[:, -1])
            found[name] = FittedLayer(tried[0][0], after, ridge, count)
        return found


class StudentFit:
    """Around every block while the whole model runs: what the students of any runs would have to say. Runs may overlap.

    students: run → its student, in fp32. layers: of last_layers. held: whether the calls from now on only judge.
    """

    def __init__(self, students: Mapping[Run, nn.Module], layers: Mapping[str, Sequence[str]], per_image: int):
        self.last = {run: LastLayers(student, layers[run.path], per_image) for run, student in students.items()}
        self.held = False

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        for of, layers in self.last.items():
            if block.path == of.path:
                layers.take(state, lambda given, student=layers.student: run(given, student))
        after = run()
        for of, layers in self.last.items():
            if block.holder == of.holder and block.index == of.last:
                layers.wanted(after, self.held)
        return after

    def solve(self, ridges: Sequence[float] = RIDGES) -> dict[Run, dict[str, FittedLayer]]:
        return {run: layers.solve(ridges) for run, layers in self.last.items()}

    @property
    def unfit(self) -> dict[str, str]:
        """Path of a layer → why it was left as it is."""
        return {f"{run.path}.{name}": why for run, layers in self.last.items() for name, why in layers.unfit.items()}


def runs_to_judge(stack: Stack, longest: int) -> list[Run]:
    """Every run of 2 to `longest` blocks that a student can stand for, by its first block."""
    fixed, found = {block.path for block in stack.fixed}, []
    for group in stack.groups():
        free = list(takewhile(lambda block: block.path not in fixed, group))  # only SD3 has one that is not, and it is the last
        for first, last in combinations(free, 2):
            if last.index - first.index < longest:
                found.append(Run(first.holder, first.index, last.index))
    return found


def student_tables(
    model: Any, stack: Stack, gate: Any, ask: Any, longest: int, per_image: int, step: Callable[[], None], whole_runs: bool = False
) -> dict[str, ProbeStats]:  # fmt: skip
    """VELOCITY: 1 − what the model's answer loses, for every run of `runs_to_judge`; OUTCOME, with whole_runs: less LATENT_SHARE of
    what final latents lose as well.

    ask(held=…): the model's velocities at points that are held out, or at the others; ask.samples(): its samples. gate: its `current` is
    around every block. step: called for every run.
    """
    names = (VELOCITY, OUTCOME) if whole_runs else (VELOCITY,)
    tables = {
        name: {holder: torch.full((count, count), float("nan"), dtype=torch.float64) for holder, count in stack.counts.items()}
        for name in names
    }  # fmt: skip
    exact, layers = ask(held=True), last_layers(model, stack)
    drawn = ask.samples() if whole_runs else None
    for _, group in groupby(runs_to_judge(stack, longest), key=lambda run: run.path):
        students = {run: new_student(model, run) for run in group}
        for student in students.values():
            in_fp32(student, model.load_device)
        gate.current = fit = StudentFit(students, layers, per_image)
        ask(held=False)
        fit.solve((TABLE_RIDGE,))
        for run, student in students.items():
            step()
            gate.current = _in_place(run, student)
            left = 1.0 - relative_error(ask(held=True), exact)
            tables[VELOCITY][run.holder][run.first, run.last] = left
            if whole_runs:
                tables[OUTCOME][run.holder][run.first, run.last] = left - LATENT_SHARE * relative_error(ask.samples(), drawn)
        gate.current = None
    return {name: ProbeStats(table) for name, table in tables.items()}


def _in_place(of: Run, student: nn.Module) -> Handler:
    def handler(block: StackBlock, state: State, run: Callable[..., State]) -> State:
        if block not in of:
            return run()
        return run(state, student) if block.index == of.first else state

    return handler


def _error(z: Tensor, gate: Tensor, missing: Tensor, weight: Tensor) -> float:
    return float((missing - gate * (z @ weight.T)).square().sum() / len(z))


def _descent(z: Tensor, gate: Tensor, missing: Tensor, start: Tensor, ridge: float) -> Iterator[Tensor]:
    """Weights (d, k + 1) after each of ITERATIONS steps of conjugate gradients from `start`."""
    diagonal = gate.square().T @ z.square()
    shrink = ridge * diagonal.mean().clamp(min=TINY)
    diagonal = diagonal + shrink
    weight, left = start, missing - gate * (z @ start.T)
    down = (gate * left).T @ z
    direction = down / diagonal
    slope = (down * direction).sum()
    for _ in range(ITERATIONS):
        moved = gate * (z @ direction.T)
        length = slope / (moved.square().sum() + shrink * direction.square().sum()).clamp(min=TINY)
        weight, left = weight + length * direction, left - length * moved
        yield weight
        down = (gate * left).T @ z - shrink * (weight - start)
        steepest = down / diagonal
        following = (down * steepest).sum()
        direction, slope = steepest + following / slope.clamp(min=TINY) * direction, following
