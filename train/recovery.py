"""Recovery of a pruned MODEL: the trainer with the whole model as a teacher and its own samples as data.

    L = ‖v_s − ((1 − a)·v_t + a·(ε − x̂0))‖² + β(k)·mean_i D(h_s,i ; h_t,i) [+ the same first term where the student itself goes]
    x̂0 from the teacher's ODE, x_σ = (1 − σ)·x̂0 + σ·ε; β falls from its first value to 0 in a line; D: features.masked_distance

The matched places i are derived from the plan: the end of every stretch of blocks that were left out, where the student hands on what
stood for the whole stretch (TinyFusion, arXiv 2412.01199: the output of each local block). a = 0.1 and β = 2e-4 are its figures for flow
models; our D is relative to the size of the teacher's features, theirs is not. What learns is put on with weight wrappers (params.py), so a
teacher that is the same loaded model is the student with its additions and its plan switched off: no second copy of the weights. A model
that lacks heads and neurons learns as masks show it, at full width; what it learnt is cut to it where it is put on.

on_policy: from x_σ the student takes one Euler step of its own to a lower σ' and is compared with the teacher where it arrives, so that
it learns from states it makes itself; these count as much as the pool's, in every third step (mixed) or in each (on_policy).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..accel.modules import seen_modules
from ..accel.prune.apply import SkipBlock, plan_of, stack_under, without_plan
from ..accel.prune.compact import full_width
from ..accel.prune.gates import gate_blocks, own
from ..accel.prune.identity import NETWORK, model_hash
from ..accel.prune.linear_mlps import LinearMlp
from ..accel.prune.low_rank import LowRankLinear
from ..accel.prune.plan import PrunePlan
from ..accel.prune.scores import relative_error
from ..accel.prune.students import SCHEDULED, STUDENTS_FILE, StudentBlock, copy_of, student_file, weights_of, with_students
from ..accel.prune.width import MaskValue, masked_by
from ..accel.quant.linear import QuantLinear
from ..errors import input_error
from ..families.stack import Stack, StackBlock, State
from .checkpoints import RunFolder, write_whole
from .config import TrainConfig
from .curve import curve_picture
from .densities import Density
from .draws import Draws
from .features import masked_distance
from .history import History
from .host_model import checkpoint_blocks
from .loop import Callbacks, StepContext, Trainer
from .optim import Optim
from .params import Additions, ParamSubset, attach, attach_to, merge_into
from .pool import Calibration, PoolData, Switched, checked_pool, inside, points, sample_pool, velocities
from .targets import Target

__all__ = ["DATA", "LEARNS", "RecoverSettings", "Recovered", "recover"]

WHERE = "Recover Pruned"
DATA = ("teacher_x0", "mixed", "on_policy")
LEARNS = ("lora", "changed_blocks", "all", "biases")
LEAST_SIGMA = 1e-3
MEASURED_AT = 16


@dataclass(frozen=True)
class RecoverSettings:
    """learns: one of LEARNS; changed_blocks: narrow blocks, and the kept ones next to what was left out. flow_share, feature_weight,
    mask_sigma: a, β and the width of D above. data: one of DATA. The others as in TrainConfig."""

    steps: int = 200
    batch: int = 4
    seed: int = 0
    learns: str = "lora"
    rank: int = 16
    lr: float = 5e-4
    flow_share: float = 0.1
    feature_weight: float = 2e-4
    mask_sigma: float = 2.0
    data: str = "teacher_x0"
    ema: float = 0.99
    save_every: int = 250
    validate_every: int = 0
    resume: str = "auto"
    checkpointing: bool = False

    def config(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps, batch=self.batch, seed=self.seed, density=Density("uniform", low=LEAST_SIGMA),
            target=Target("teacher_velocity", flow_share=self.flow_share), dropout=0.0, ema=self.ema, resume=self.resume,
            optim=Optim(lr=self.lr, warmup=min(10, self.steps), weight_decay=0.0, floor=0.1),
            save_every=self.save_every, validate_every=self.validate_every, checkpointing=self.checkpointing,
        )  # fmt: skip


@dataclass(frozen=True)
class Recovered:
    """model: the pruned model with what was learnt; lora: the same as a LoRA file's tensors; figures before and after."""

    model: Any
    lora: dict[str, Tensor]
    losses: list[float]
    picture: Tensor
    report: dict[str, Any]


class PrunedGate:
    """Around every block: leaves out what the plan leaves out while `active`, and keeps the tokens at the matched places."""

    def __init__(self, gone: frozenset[str], matched: frozenset[str], students: dict[str, nn.Module]):
        self.gone, self.matched, self.students = gone, matched, students
        self.active = True
        self.features: dict[bool, dict[str, State]] = {True: {}, False: {}}

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        if self.active and block.path in self.gone:
            after = state
        elif self.active and block.path in self.students:
            after = run(state, self.students[block.path])
        else:
            after = run()
        if block.path in self.matched:
            self.features[self.active][block.path] = own(after)
        return after


@dataclass
class Teacher(Switched):
    """The whole model; `off` is empty where its network always is whole."""

    gate: PrunedGate

    @property
    def features(self) -> dict[str, State]:
        return self.gate.features[False]


@dataclass(frozen=True)
class MaskedFeatures:
    """The trainer's additional loss β(k)·mean D over matched places and streams. The teacher has just been asked at the same point."""

    gate: PrunedGate
    teacher: Teacher
    weight: float
    steps: int
    width: float
    name: str = "features"
    start: int = 0
    every: int = 1

    @property
    def stop(self) -> int:
        return self.steps

    def loss(self, context: StepContext) -> Tensor:
        given, wanted = self.gate.features[True], self.teacher.features
        distances = [
            masked_distance(mine, theirs.detach(), self.width)
            for path in sorted(self.gate.matched) for mine, theirs in zip(given[path], wanted[path])
        ]  # fmt: skip
        return (1.0 - context.step / self.steps) * sum(distances) / len(distances)


@dataclass(frozen=True)
class OnPolicy:
    """The trainer's additional loss where one step of the student's own leads."""

    teacher: Teacher
    seed: int
    every: int
    name: str = "on_policy"
    weight: float = 1.0
    start: int = 0
    stop: int = 1 << 60

    def loss(self, context: StepContext) -> Tensor:
        point = context.point
        lower = point.sigma * Draws(self.seed, context.step).uniform("on_policy", tuple(point.sigma.shape))
        step = (lower - point.sigma).view(-1, *[1] * (point.x.ndim - 1))
        x = point.x + step * context.prediction.detach().to(point.x)
        lower = lower.clamp(min=LEAST_SIGMA)
        wanted = self.teacher.velocity(x, lower, context.cond)
        return (context.trainee.velocity(x, lower, context.cond) - wanted).square().mean()


def matched_places(plan: PrunePlan, stack: Stack) -> tuple[str, ...]:
    """The last block of every stretch that was left out, and every narrow block: there student and teacher should agree."""
    gone = set(plan.removed(stack))
    ends = []
    for group in stack.groups():
        ends += [block.path for block, after in zip(group, (*group[1:], None)) if block in gone and after not in gone]
    return (*ends, *(path for path in plan.width if stack.at(path) not in gone))


def changed_blocks(plan: PrunePlan, stack: Stack) -> tuple[str, ...]:
    """Kept blocks that are narrow, or have a neighbour that was left out."""
    gone = set(plan.removed(stack))
    near = zip(stack.blocks, (None, *stack.blocks[:-1]), (*stack.blocks[1:], None))
    return tuple(
        block.path for block, before, after in near
        if block not in gone and (block.path in plan.width or before in gone or after in gone)
    )  # fmt: skip


def subset_for(settings: RecoverSettings, plan: PrunePlan, stack: Stack) -> ParamSubset:
    """What learns on the network: nothing of blocks that are left out, or that a student stands for."""
    absent = [block.path for block in plan.removed(stack)] + list(plan.students)
    exclude = "|".join(f"^{path}[.]" for path in absent).replace("blocks.", "blocks[.]")
    if settings.learns == "changed_blocks":
        near = [path for path in changed_blocks(plan, stack) if path not in absent]
        if not near:
            raise input_error(WHERE, "learns", "changed_blocks", "blocks that were not left out beside others", "Choose lora or all.")
        return ParamSubset("all", include="|".join(f"^{path}[.]" for path in near), exclude=exclude)
    return ParamSubset(settings.learns, settings.rank, exclude=exclude)


@dataclass
class Recovery:
    """One run of recovery and everything it has to let go of at its end."""

    student: Any
    teacher: Any
    settings: RecoverSettings
    calibration: Calibration
    folder: Path | None
    services: Any
    notes: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    on_network: Additions | None = None
    masks: tuple[MaskValue, ...] = ()

    def run(self) -> Recovered:
        plan, started = plan_of(self.student), time.perf_counter()
        if plan is None:
            allowed = "a model behind Apply Prune Plan, or a loaded pruned model"
            raise input_error(WHERE, "student", "a model without a plan", allowed, "Apply a plan first; Train takes whole models.")
        if self.student.get_attachment(SCHEDULED) is not None:
            allowed = "a model whose runs are replaced at every sigma"
            raise input_error(WHERE, "student", "runs with a range", allowed, "Set start_percent 0 and end_percent 1 in Apply Runs.")
        shared = self.student.model is self.teacher.model
        if shared and (others := self._exchanged()):  # on one network the teacher's answers would be made with them
            got = f"{len(others)} layers that the teacher has otherwise: {others[0]}, …"
            remedy = "Link Quantize, Width to Linear, Text to Linear and Low-Rank Modulation behind this node."
            raise input_error(WHERE, "student", got, "the teacher with a plan on it", remedy)
        stack = stack_under(self.student, WHERE)
        plan.check(stack_under(self.teacher, WHERE), model_hash(self.teacher), WHERE)
        gone = frozenset(block.path for block in plan.removed(stack))
        with torch.inference_mode(False), torch.enable_grad():
            gate = PrunedGate(gone, frozenset(matched_places(plan, stack)), self._own_students())
            patcher = full_width(self.student, plan, WHERE) if plan.width else self.student.clone()
            patcher = without_plan(patcher, plan, WHERE) if shared else patcher
            for path in () if shared else gate.students:
                patcher.add_object_patch(NETWORK + path, SkipBlock(stack.at(path)))  # ours answers, from the gate
            patcher = gate_blocks(patcher, stack.blocks, gate)
            self.on_network = attach(patcher, subset_for(self.settings, plan, stack), self.settings.seed, WHERE)
            if plan.width:
                patcher, self.masks = masked_by(patcher, plan, self.services.before_run, WHERE)
            additions = Additions({**self.on_network.modules, **self._on_students(gate.students)})
            if self.settings.checkpointing and not checkpoint_blocks(patcher):
                self.notes.append("blocks of this model cannot be recomputed one by one; checkpointing is off")
            about = {"base": plan.model, "plan": plan.to_json(), "learns": self.settings.learns, "rank": self.settings.rank}
            if shared:
                self._inside(patcher, additions, about, gate, None)
            else:
                self._with_teacher(patcher, additions, about, gate, stack)
        return self._results(time.perf_counter() - started)

    def _exchanged(self) -> list[str]:
        """Names of the student's maps, factored and quantised layers that are not the teacher's."""
        theirs = dict(seen_modules(self.teacher))
        return [
            name for name, module in seen_modules(self.student)
            if isinstance(module, (LinearMlp, LowRankLinear, QuantLinear)) and theirs.get(name) is not module
        ]  # fmt: skip

    def _own_students(self) -> dict[str, StudentBlock]:
        """Copies of the student's trained blocks: the MODEL that was given keeps its own."""
        found = {path: self.student.object_patches.get(NETWORK + path) for path in plan_of(self.student).students}
        return {path: copy_of(student) for path, student in found.items() if isinstance(student, StudentBlock)}

    def _on_students(self, students: dict[str, StudentBlock]) -> dict:
        kind = "all" if self.settings.learns == "changed_blocks" else self.settings.learns
        found = {}
        for path, student in students.items():
            found |= attach_to(student, path, ParamSubset(kind, self.settings.rank), self.settings.seed)
        return found

    def _with_teacher(self, patcher: Any, additions: Additions, about: dict, gate: PrunedGate, stack: Stack) -> None:
        """A teacher with weights of its own: its run is opened around the student's."""
        watch = PrunedGate(frozenset(), gate.matched, {})
        watch.active = False

        def body(trainee: Any) -> None:
            self._inside(patcher, additions, about, gate, Teacher(trainee, nullcontext, watch))

        inside(self.services.guider, gate_blocks(self.teacher, stack.blocks, watch), self.calibration, body)

    def _inside(self, patcher: Any, additions: Additions, about: dict, gate: PrunedGate, teacher: Teacher | None) -> None:
        self.services.load([patcher])
        for student in gate.students.values():  # where the network is whole, no host knows of them
            student.to(patcher.load_device)

        @contextmanager
        def off():
            self._pruned(gate, False)
            try:
                with additions.switched_off():
                    yield
            finally:
                self._pruned(gate, True)

        def body(trainee: Any) -> None:
            self._train(trainee, teacher or Teacher(trainee, off, gate), gate, additions)

        inside(self.services.guider, patcher, self.calibration, body, additions, about)

    def _pruned(self, gate: PrunedGate, active: bool) -> None:
        """Whether the network answers as the plan leaves it, or whole."""
        gate.active = active
        for mask in self.masks:
            mask.active = active

    def _train(self, trainee: Any, teacher: Teacher, gate: PrunedGate, additions: Additions) -> None:
        settings, prompts = self.settings, len(trainee.positive)
        with teacher.off():
            pool = checked_pool(teacher.trainee, self.calibration, WHERE)
        data = PoolData(pool, prompts)
        fixed = points(data, MEASURED_AT, self.calibration.seed)
        with torch.no_grad():
            wanted = torch.cat([teacher.velocity(*point).cpu() for point in fixed])
        before = self._measured(trainee, fixed, wanted, pool)
        auxiliaries = []
        if settings.feature_weight and gate.matched:
            auxiliaries.append(MaskedFeatures(gate, teacher, settings.feature_weight, settings.steps, settings.mask_sigma))
        if settings.data != "teacher_x0":
            auxiliaries.append(OnPolicy(teacher, settings.seed, 3 if settings.data == "mixed" else 1))
        bar = self.services.progress(settings.steps)

        def progress(done: int, steps: int, history: History) -> None:
            bar.update_absolute(done, steps)

        callbacks = Callbacks(progress, self.services.interrupt, log=self.notes.append)
        folder = RunFolder(self.folder, WHERE) if self.folder else None
        trainer = Trainer(trainee, data, settings.config(), folder, teacher, tuple(auxiliaries), callbacks=callbacks)
        started = time.perf_counter()
        trainer.run()
        seconds = time.perf_counter() - started
        exported = self.on_network.export(trainer.ema.weights())
        with trainer.averaged():
            after = self._measured(trainee, fixed, wanted, pool)
            for student in gate.students.values():
                merge_into(student)
        self.found = {"trainer": trainer, "lora": exported, "before": before, "after": after, "training_seconds": seconds}
        self.found["students"] = gate.students
        if folder:
            self._keep(exported, gate.students)

    def _measured(self, trainee: Any, fixed: list, wanted: Tensor, pool: Tensor) -> dict[str, float]:
        """Velocity error at fixed points, and the distance of final latents from the teacher's of the same noise, both relative."""
        own_pool = sample_pool(trainee, self.calibration)
        final = relative_error(own_pool, pool[: len(own_pool)])
        return {"velocity_error": relative_error(velocities(trainee, fixed), wanted), "final_latent_error": final}

    def _keep(self, lora: dict[str, Tensor], students: dict[str, StudentBlock]) -> None:
        from safetensors.torch import save

        metadata = {"format": "pt", "rectiflow": json.dumps(asdict(self.settings))}
        write_whole(self.folder / "lora.safetensors", save(lora, metadata))
        if students:
            plan = plan_of(self.student)
            write_whole(self.folder / STUDENTS_FILE, student_file(plan, plan.facts.get("init", "middle"), weights_of(students)))

    def _results(self, seconds: float) -> Recovered:
        trainer: Trainer = self.found["trainer"]
        report = {
            "steps": trainer.done, "seconds": round(seconds, 3),
            "steps_per_second": round(len(trainer.history.steps) / max(self.found["training_seconds"], 1e-9), 3),
            "parameters": sum(value.numel() for value in trainer.params.values()),
            "before": self.found["before"], "after": self.found["after"], "settings": asdict(self.settings),
            "folder": self.folder.name if self.folder else None, "notes": self.notes,
        }  # fmt: skip
        if torch.cuda.is_available():
            report["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        if self.found["students"]:
            report["students"] = f"{self.folder.name}/{STUDENTS_FILE}" if self.folder else None
        model = self.services.with_lora(with_students(self.student, self.found["students"]), self.found["lora"])
        losses = [step.loss for step in trainer.history.steps]
        return Recovered(model, self.found["lora"], losses, curve_picture(trainer.history), report)


def recover(
    student: Any, teacher: Any, settings: RecoverSettings, calibration: Calibration, folder: Path | None, services: Any
) -> Recovered:
    """Train what `settings.learns` of the pruned `student` towards `teacher`. services: of session.Services.

    Raises: NodeInputError for a student without a plan, or a teacher that is another model. What interrupts is raised after saving.
    """
    return Recovery(student, teacher, settings, calibration, folder, services).run()
