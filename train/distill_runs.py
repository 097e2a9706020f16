"""PPCL's students of runs of blocks, as a preset of the trainer (arXiv 2511.16156; students: accel/prune/students.py).

    alternating   s_r = S_r(T_{u−1}) for every run r = [u, v], all in one forward of the teacher; nothing flows from student to student
    last stage    the model with all students, at the same points: ‖v_s − v_t‖² and the same distance of each S_r's own output
    distance      dir_mse: mean over tokens of Σ_c (ŝ_c − t̂_c)², ŝ = s/‖s‖, t = T_v in every stream; dir_l1: |·|; mse: relative squares
                  + mean (log ‖s‖ − log ‖t‖)² where the mean of ‖s‖/‖t‖ leaves [0.9, 1.1], for directions alone leave the size free
    fitted        the middle block of the run, its last projections by least squares (accel/prune/fitted_students.py), then the same

Theirs ends with the alternating stage and trains the whole model for a thousand steps more; `own_share` of our steps are the last stage,
for students that only ever saw the teacher's states do not know each other's errors. Students learn in fp32 and are kept in the model's
dtype.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..accel.prune.apply import stack_under
from ..accel.prune.fitted_students import FittedLayer, StudentFit, last_layers
from ..accel.prune.gates import gate_blocks, own
from ..accel.prune.identity import model_hash, original_module
from ..accel.prune.plan import PrunePlan, Run
from ..accel.prune.scores import relative_error
from ..accel.prune.students import INITS, STUDENTS_FILE, StudentBlock, in_fp32, new_student, source_of, student_file, weights_of
from ..errors import input_error
from ..families.stack import StackBlock, State
from .checkpoints import RunFolder, write_whole
from .config import TrainConfig
from .curve import curve_picture
from .densities import Density
from .history import History
from .loop import Callbacks, StepContext, Trainer
from .optim import Optim
from .pool import Calibration, PoolData, checked_pool, inside, parted, points, velocities
from .prune_scores import whole_model
from .targets import Target

__all__ = ["DISTANCES", "STUDENTS_FILE", "Distilled", "RunSettings", "distill_runs", "run_distance"]

WHERE = "Distill Runs"
DISTANCES = ("dir_mse", "dir_l1", "mse")
LEAST_SIGMA = 1e-3
MEASURED_AT = 16
FITTED_AT, FITTED_TOKENS = 32, 64  # points of the flow, tokens of each image and stream there
NORMS = (0.9, 1.1)  # ‖s‖/‖t‖ may be between these


@dataclass(frozen=True)
class RunSettings:
    """init: of students.INITS. distance: of DISTANCES. own_share: of the steps, for the last stage. shift: of the sigmas that are drawn."""

    steps: int = 500
    batch: int = 4
    lr: float = 1e-4
    init: str = "fitted"
    distance: str = "dir_mse"
    own_share: float = 0.2
    shift: float = 1.0
    ema: float = 0.99
    seed: int = 0
    save_every: int = 250
    resume: str = "auto"

    def config(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps, batch=self.batch, seed=self.seed, density=Density("uniform", shift=self.shift, low=LEAST_SIGMA),
            target=Target("teacher_velocity"), dropout=0.0, ema=self.ema, resume=self.resume, save_every=self.save_every, validate_every=0,
            optim=Optim(lr=self.lr, warmup=min(16, self.steps), betas=(0.9, 0.95), weight_decay=0.02, floor=0.1),
        )  # fmt: skip

    def alternating(self, step: int) -> bool:
        return step < self.steps - round(self.own_share * self.steps)


@dataclass(frozen=True)
class Distilled:
    """plan: with the students' file, where there is a folder. students: path → module. losses, curve, report."""

    plan: PrunePlan
    students: dict[str, StudentBlock]
    losses: list[float]
    curve: Tensor
    report: dict[str, Any]


def norm_ratio(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ‖s‖/‖t‖."""
    return (given.float().norm(dim=-1) / wanted.float().norm(dim=-1).clamp(min=1e-6)).mean()


def run_distance(given: Tensor, wanted: Tensor, kind: str) -> Tensor:
    """The distance at the head of this file, of tokens (b, n, d)."""
    given, wanted = given.float(), wanted.float()
    if kind == "mse":
        return (given - wanted).square().mean() / wanted.square().mean().clamp(min=1e-8)
    directions = (nn.functional.normalize(tokens, dim=-1, eps=1e-6) for tokens in (given, wanted))
    difference = torch.sub(*directions)
    distance = (difference.square() if kind == "dir_mse" else difference.abs()).sum(-1).mean()
    if NORMS[0] <= float(norm_ratio(given.detach(), wanted)) <= NORMS[1]:
        return distance
    sizes = [tokens.norm(dim=-1).clamp(min=1e-6).log() for tokens in (given, wanted)]
    return distance + (sizes[0] - sizes[1]).square().mean()


class RunGate:
    """Around every block of every run. mode: "off" the teacher, "watch" the same with each student on the teacher's states, "own" the
    model with the students of `active`. fitting: in front of all of that, while it is there.

    given, wanted: path of a run → tokens its student made, tokens the teacher has behind the run.
    """

    def __init__(self, runs: tuple[Run, ...], students: Mapping[str, nn.Module]):
        self.runs, self.students = runs, dict(students)
        self.active = frozenset(self.students)
        self.mode = "off"
        self.given: dict[str, State] = {}
        self.wanted: dict[str, State] = {}
        self.fitting: StudentFit | None = None

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        if self.fitting is not None:
            return self.fitting(block, state, run)
        of = next(each for each in self.runs if block in each)
        first, student = block.index == of.first, self.students[of.path]
        if self.mode == "own" and of.path in self.active:
            if not first:
                return state
            after = run(state, student)
            self.given[of.path] = own(after)
            return after
        if self.mode == "watch" and first:
            with torch.enable_grad():
                self.given[of.path] = own(run(own(state), student))
        after = run()
        if self.mode != "own" and block.index == of.last:
            self.wanted[of.path] = tuple(tokens.detach() for tokens in own(after))
        return after


@dataclass
class RunTeacher:
    """The whole model. In the alternating stage the students are asked on the way."""

    trainee: Any
    gate: RunGate
    alternating: Callable[[], bool]
    answer: Tensor | None = None

    def velocity(self, x: Tensor, sigma: Tensor, cond: list) -> Tensor:
        self.gate.mode = "watch" if self.alternating() else "off"
        try:
            with torch.no_grad():
                self.answer = self.trainee.velocity(x, sigma, cond)
        finally:
            self.gate.mode = "off"
        return self.answer


@dataclass
class RunTrainee:
    """The model with its students. In the alternating stage there is no such model: its answer is the teacher's, and runs alone differ."""

    teacher: RunTeacher
    about: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        return self.about

    def params(self) -> dict[str, nn.Parameter]:
        students = self.teacher.gate.students.items()
        return {f"{path}.{name}": value for path, student in students for name, value in student.named_parameters()}

    def velocity(self, x: Tensor, sigma: Tensor, cond: list) -> Tensor:
        if self.teacher.alternating():
            return self.teacher.answer
        return self.with_students(x, sigma, cond)

    def with_students(self, x: Tensor, sigma: Tensor, cond: list) -> Tensor:
        gate = self.teacher.gate
        gate.mode = "own"
        try:
            return self.teacher.trainee.velocity(x, sigma, cond)
        finally:
            gate.mode = "off"


@dataclass(frozen=True)
class RunLoss:
    """The trainer's additional loss: Σ over runs of the mean over streams of their distance."""

    gate: RunGate
    kind: str
    name: str = "runs"
    weight: float = 1.0
    start: int = 0
    stop: int = 1 << 60
    every: int = 1

    def loss(self, context: StepContext) -> Tensor:
        total = 0.0
        for run in self.gate.runs:
            pairs = zip(self.gate.given[run.path], self.gate.wanted[run.path])
            each = [run_distance(given, wanted, self.kind) for given, wanted in pairs]
            total = total + sum(each) / len(each)
        return total


@dataclass
class Distillation:
    """One run of the preset."""

    model: Any
    plan: PrunePlan
    settings: RunSettings
    calibration: Calibration
    folder: Path | None
    services: Any
    notes: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    fitted: dict[str, dict[str, FittedLayer]] = field(default_factory=dict)
    casting: list[tuple[nn.Module, bool]] = field(default_factory=list)

    def run(self) -> Distilled:
        started, stack = time.perf_counter(), stack_under(whole_model(self.model, WHERE), WHERE)
        if not self.plan.runs:
            raise input_error(WHERE, "plan", "a plan without runs", "a plan with runs", "Make it with Find Redundant Runs.")
        self.plan.check(stack, model_hash(self.model), WHERE)
        for name, value, allowed in (("init", self.settings.init, INITS), ("loss", self.settings.distance, DISTANCES)):
            if value not in allowed:
                raise input_error(WHERE, name, value, ", ".join(allowed), "Choose one of these.")
        with torch.inference_mode(False), torch.enable_grad():
            students = {run.path: new_student(self.model, run, self.settings.init) for run in self.plan.runs}
            for student in students.values():
                self.casting += in_fp32(student, self.model.load_device)
                student.requires_grad_(True)
            gate = RunGate(self.plan.runs, students)
            patcher = gate_blocks(self.model, [block for block in stack.blocks if any(block in run for run in self.plan.runs)], gate)
            self.services.load([patcher])
            inside(self.services.guider, patcher, self.calibration, lambda trainee: self._train(trainee, gate))
        return self._results(gate, time.perf_counter() - started)

    def _train(self, trainee: Any, gate: RunGate) -> None:
        settings = self.settings
        teacher = RunTeacher(trainee, gate, lambda: settings.alternating(trainer.done))
        about = {"base": self.plan.model, "runs": [asdict(run) for run in gate.runs], "init": settings.init}
        student = RunTrainee(teacher, about)
        data = PoolData(checked_pool(trainee, self.calibration, WHERE), len(trainee.positive))
        if settings.init == "fitted":
            self._fit(trainee, gate, data)
        bar = self.services.progress(settings.steps)

        def progress(done: int, steps: int, history: History) -> None:
            bar.update_absolute(done, steps)

        callbacks = Callbacks(progress, self.services.interrupt, log=self.notes.append)
        folder = RunFolder(self.folder, WHERE) if self.folder else None
        auxiliaries = (RunLoss(gate, settings.distance),)
        trainer = Trainer(student, data, settings.config(), folder, teacher, auxiliaries, callbacks=callbacks)
        started = time.perf_counter()
        trainer.run()
        self.found = {"trainer": trainer, "training_seconds": time.perf_counter() - started}
        with torch.no_grad():
            for name, value in trainer.params.items():
                value.copy_(trainer.ema.weights()[name])
            self.found |= self._measured(trainee, student, gate, data)

    def _fit(self, trainee: Any, gate: RunGate, data: PoolData) -> None:
        """The students' last layers by least squares, judged on prompts, or samples, that they are not fitted to."""
        fixed, layers = points(data, FITTED_AT, self.calibration.seed), last_layers(self.model, stack_under(self.model, WHERE))
        gate.fitting = StudentFit({run: gate.students[run.path] for run in gate.runs}, layers, FITTED_TOKENS)
        try:
            for gate.fitting.held, part in zip((False, True), parted(fixed)):
                for point in part:
                    self.services.interrupt()
                    velocities(trainee, [point])
            self.fitted = {run.path: layers for run, layers in gate.fitting.solve().items()}
            self.notes += [f"{layer} begins as copied: {why}" for layer, why in gate.fitting.unfit.items()]
        finally:
            gate.fitting = None

    def _measured(self, trainee: Any, student: RunTrainee, gate: RunGate, data: PoolData) -> dict[str, Any]:
        """Errors with one run at a time and with all, and the sizes of what students make."""
        fixed = points(data, MEASURED_AT, self.calibration.seed)
        wanted = velocities(trainee, fixed)
        watched = RunTeacher(trainee, gate, lambda: True)
        ratios: dict[str, list[float]] = {run.path: [] for run in gate.runs}
        for point in fixed:
            watched.velocity(*point)
            for path in ratios:
                ratios[path] += [float(norm_ratio(*pair)) for pair in zip(gate.given[path], gate.wanted[path])]
        errors = {}
        for name, active in (*((run.path, {run.path}) for run in gate.runs), ("all", set(gate.students))):
            gate.active = frozenset(active)
            errors[name] = relative_error(torch.cat([student.with_students(*point).cpu() for point in fixed]), wanted)
        return {"errors": errors, "ratios": {path: sum(values) / len(values) for path, values in ratios.items()}}

    def _results(self, gate: RunGate, seconds: float) -> Distilled:
        trainer, errors = self.found["trainer"], self.found["errors"]
        finished = {}
        for module, casts in self.casting:
            module.comfy_cast_weights = casts
        for run in gate.runs:
            dtype = next(original_module(self.model, f"{run.holder}.{source_of(run, self.settings.init)}").parameters()).dtype
            module = gate.students[run.path].to(dtype).requires_grad_(False)
            finished[run.path] = StudentBlock(module)
        facts = {**self.plan.facts, "shift": self.settings.shift, "steps": trainer.done, "init": self.settings.init}
        plan = dataclasses.replace(self.plan, facts=facts)
        if self.folder:
            write_whole(self.folder / STUDENTS_FILE, student_file(plan, self.settings.init, weights_of(finished)))
            plan = dataclasses.replace(plan, students={path: f"{self.folder.name}/{STUDENTS_FILE}" for path in finished})
        apart = sum(errors[run.path] for run in gate.runs) ** 0.5
        report = {
            "runs": [f"{run.holder}.{run.first}-{run.last}" for run in gate.runs], "steps": trainer.done, "seconds": round(seconds, 3),
            "steps_per_second": round(len(trainer.history.steps) / max(self.found["training_seconds"], 1e-9), 3),
            "velocity_error": errors, "norm_ratio": {path: round(ratio, 4) for path, ratio in self.found["ratios"].items()},
            "error_of_all": errors["all"] ** 0.5, "root_of_squares_of_single": apart,
            "accumulates": errors["all"] ** 0.5 > 1.5 * apart, "parameters": sum(value.numel() for value in trainer.params.values()),
            "fitted": {path: {name: asdict(layer) for name, layer in layers.items()} for path, layers in self.fitted.items()},
            "settings": asdict(self.settings), "folder": self.folder.name if self.folder else None, "notes": self.notes,
        }  # fmt: skip
        losses = [step.loss for step in trainer.history.steps]
        return Distilled(plan, finished, losses, curve_picture(trainer.history), report)


def distill_runs(
    model: Any, plan: PrunePlan, settings: RunSettings, calibration: Calibration, folder: Path | None, services: Any
) -> Distilled:
    """Train one student for every run of `plan`. services: of session.Services.

    Raises: NodeInputError for a plan without runs or of another model. What interrupts is raised after saving.
    """
    return Distillation(model, plan, settings, calibration, folder, services).run()
