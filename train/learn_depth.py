"""TinyFusion's search for the blocks to leave out, as a preset of the trainer (arXiv 2412.01199; masks: accel/prune/depth_masks.py).

    min over g, ΔΦ of E_m~p(g) ‖v(x_σ; Φ + ΔΦ, m) − u‖²      u the whole model's velocity there, or ε − x̂0 (objective flow)

Δ Φ is a LoRA on the layers of the blocks: what training could put right after the cut. It is thrown away; its job is that blocks are judged
by what cannot be put right. τ falls from tau_start to tau_end in a line. Every example of a step draws a mask and a sigma of its own, the
sigmas one from each of equal parts of [0, 1]. x̂0 are the model's own samples unless latents are given; their paper has a data set.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..accel.prune.apply import stack_under
from ..accel.prune.depth_masks import DepthMasks, MaskGate, local_groups
from ..accel.prune.gates import gate_blocks
from ..accel.prune.identity import model_hash
from ..accel.prune.plan import PrunePlan
from ..accel.prune.scores import relative_error
from ..accel.prune.select import plan_without, protected
from ..families.stack import Stack
from .checkpoints import RunFolder, write_whole
from .config import TrainConfig
from .curve import curve_picture
from .densities import Density
from .draws import Draws
from .history import History
from .loop import Callbacks, Trainer
from .optim import Optim
from .params import Additions, ParamSubset, attach
from .pool import Calibration, PoolData, Switched, checked_pool, inside, points, velocities
from .prune_scores import whole_model
from .targets import Target

__all__ = ["OBJECTIVES", "DepthSettings", "LearnedDepth", "learn_depth"]

WHERE = "Learn Depth"
OBJECTIVES = ("teacher", "flow")
LEAST_SIGMA = 1e-3
MEASURED_AT = 16
SHOWN = 48  # columns of the picture


@dataclass(frozen=True)
class DepthSettings:
    """double_pattern, single_pattern, protect: of depth_masks.local_groups and select.protected. The others as at the head of this file
    and in TrainConfig."""

    double_pattern: str = "1:2"
    single_pattern: str = "1:2"
    protect: str = "0, -1"
    steps: int = 500
    batch: int = 4
    lr_logits: float = 1e-3
    lr_lora: float = 1e-4
    rank: int = 8
    tau_start: float = 4.0
    tau_end: float = 0.1
    logit_scale: float = 100.0
    objective: str = "teacher"
    ema: float = 0.999
    seed: int = 0
    save_every: int = 250
    resume: str = "auto"

    def config(self) -> TrainConfig:
        target = Target("teacher_velocity" if self.objective == "teacher" else "velocity")
        lr = max(self.lr_lora, self.lr_logits) or 1.0
        optim = Optim(
            lr=lr, weight_decay=0.0, warmup=0, schedule="constant", betas=(0.9, 0.999),
            factors=(("^mask[.]", self.lr_logits / lr), ("", self.lr_lora / lr)),
        )  # fmt: skip
        return TrainConfig(
            steps=self.steps, batch=self.batch, seed=self.seed, density=Density("uniform", low=LEAST_SIGMA), target=target, optim=optim,
            dropout=0.0, ema=self.ema, save_every=self.save_every, validate_every=0, resume=self.resume,
        )  # fmt: skip

    def temperature(self, step: int) -> float:
        """τ of a step, counted from 0."""
        return self.tau_start + (self.tau_end - self.tau_start) * min(1.0, step / max(1, self.steps - 1))


@dataclass(frozen=True)
class LearnedDepth:
    """plan; probabilities (blocks, columns) at `steps`; the loss curve; what happened."""

    plan: PrunePlan
    names: list[str]
    steps: list[int]
    probabilities: Tensor
    losses: list[float]
    curve: Tensor
    report: dict[str, Any]


@dataclass
class MaskedTrainee:
    """The model with blocks left out by chance, another draw for each example: what is trained are the chances and the LoRA."""

    trainee: Any
    masks: DepthMasks
    gate: MaskGate
    settings: DepthSettings
    step: Callable[[], int]

    def describe(self) -> dict[str, Any]:
        return self.trainee.describe()

    def params(self) -> dict[str, nn.Parameter]:
        return {**self.masks.logits, **self.trainee.params()}

    def velocity(self, x: Tensor, sigma: Tensor, cond: list) -> Tensor:
        draws, step = Draws(self.settings.seed, self.step()), self.step()
        uniform = [draws.uniform(f"gumbel {name}", (len(x), len(logits))) for name, logits in self.masks.logits.items()]
        self.gate.masks = self.masks.draw(uniform, self.settings.temperature(step)).to(self.trainee.device)
        try:
            return self.trainee.velocity(x, sigma, cond)
        finally:
            self.gate.masks = None


@dataclass
class Trace:
    """The probabilities as they were at some steps, kept beside the checkpoints so that a resumed run has all of them."""

    masks: DepthMasks
    every: int
    file: Path | None
    rows: list[tuple[int, list[float]]] = field(default_factory=list)
    began: bool = False

    def note(self, done: int, steps: int) -> None:
        if not self.began:
            self.began, self.rows = True, [row for row in self._kept() if row[0] < done] or [(0, self._start())]
        if done % self.every == 0 or done == steps:
            self.rows.append((done, list(self.masks.probabilities().values())))
            if self.file:
                write_whole(self.file, json.dumps(self.rows).encode())

    def _start(self) -> list[float]:
        return [group.keep / len(group.blocks) for group in self.masks.groups for _ in group.blocks]

    def _kept(self) -> list[tuple[int, list[float]]]:
        count = len(self.masks.blocks)
        try:
            found = json.loads(self.file.read_bytes()) if self.file else []
            return [(int(step), [float(value) for value in values]) for step, values in found if len(values) == count]
        except (OSError, ValueError, TypeError):
            return []


@dataclass
class Learning:
    """One run of the search."""

    model: Any
    settings: DepthSettings
    calibration: Calibration
    folder: Path | None
    services: Any
    latents: Tensor | None
    notes: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def run(self) -> LearnedDepth:
        settings, started = self.settings, time.perf_counter()
        stack = stack_under(whole_model(self.model, WHERE), WHERE)
        patterns = {"double": settings.double_pattern, "single": settings.single_pattern}
        groups = local_groups(patterns, stack, protected(settings.protect, stack, WHERE), WHERE)
        base = model_hash(self.model)
        with torch.inference_mode(False), torch.enable_grad():
            masks = DepthMasks(groups, settings.logit_scale)
            gate = MaskGate(masks.blocks, lambda: self.found["trainee"].rows)
            patcher = gate_blocks(self.model, masks.blocks, gate)
            inner = "|".join(f"^{holder}[.]" for holder in stack.counts)
            additions = attach(patcher, ParamSubset("lora", settings.rank, 2.0 * settings.rank, include=inner), settings.seed, WHERE)
            about = {"base": base, "groups": [group.name for group in groups], "rank": settings.rank, "scale": settings.logit_scale}
            self.services.load([patcher])

            def body(trainee: Any) -> None:
                self._learn(trainee, masks, gate, additions)

            inside(self.services.guider, patcher, self.calibration, body, additions, about)
        return self._results(stack, base, masks, time.perf_counter() - started)

    def _learn(self, trainee: Any, masks: DepthMasks, gate: MaskGate, additions: Additions) -> None:
        self.found["trainee"] = trainee

        @contextmanager
        def off():
            """The whole model: masks are on only while the masked trainee is asked."""
            with additions.switched_off():
                yield

        teacher = Switched(trainee, off)
        if self.latents is None:
            with off():
                pool = checked_pool(trainee, self.calibration, WHERE)
        else:
            pool = trainee.model.process_latent_in(self.latents).float().cpu()
        data = PoolData(pool, len(trainee.positive))
        folder = RunFolder(self.folder, WHERE) if self.folder else None
        trace = Trace(masks, max(1, -(-self.settings.steps // SHOWN)), self.folder / "probabilities.json" if self.folder else None)
        bar = self.services.progress(self.settings.steps)

        def progress(done: int, steps: int, history: History) -> None:
            trace.note(done, steps)
            bar.update_absolute(done, steps)

        drawn = MaskedTrainee(trainee, masks, gate, self.settings, lambda: trainer.done)
        callbacks = Callbacks(progress, self.services.interrupt, log=self.notes.append)
        trainer = Trainer(drawn, data, self.settings.config(), folder, teacher, callbacks=callbacks)
        trainer.run()
        values = {name: value.clone() for name, value in trainer.ema.weights().items() if name.startswith("mask.")}
        if not trace.began:  # nothing was left to train
            trace.note(trainer.done, trainer.done)
        fixed = points(data, MEASURED_AT, self.calibration.seed)
        wanted = torch.cat([teacher.velocity(*point).cpu() for point in fixed])
        gone = {block.path for block in masks.gone(values)}
        stays = torch.tensor([float(block.path not in gone) for block in masks.blocks], device=trainee.device)
        gate.masks = stays.expand(8, -1)
        try:
            with_lora = relative_error(velocities(trainee, fixed), wanted)
            with off():
                without = relative_error(velocities(trainee, fixed), wanted)
        finally:
            gate.masks = None
        self.found.update(trainer=trainer, values=values, trace=trace, errors=(without, with_lora))

    def _results(self, stack: Stack, base: str, masks: DepthMasks, seconds: float) -> LearnedDepth:
        trainer, values, trace = (self.found[name] for name in ("trainer", "values", "trace"))
        probabilities = masks.probabilities(values)
        facts = {"groups": [group.name for group in masks.groups], "steps": trainer.done, "objective": self.settings.objective}
        plan = plan_without(masks.gone(values), stack, base, "learned", probabilities, **facts)
        report = {
            "plan": plan.describe(stack), "steps": trainer.done, "seconds": round(seconds, 3),
            "stays": {stack.at(path).name: round(share, 4) for path, share in probabilities.items()},
            "velocity_error": self.found["errors"][0], "velocity_error_with_lora": self.found["errors"][1],
            "settings": asdict(self.settings), "folder": self.folder.name if self.folder else None, "notes": self.notes,
        }  # fmt: skip
        losses = [step.loss for step in trainer.history.steps]
        names = [block.name for block in masks.blocks]
        table = torch.tensor([row for _, row in trace.rows], dtype=torch.float64).T
        return LearnedDepth(plan, names, [step for step, _ in trace.rows], table, losses, curve_picture(trainer.history), report)


def learn_depth(
    model: Any, settings: DepthSettings, calibration: Calibration, folder: Path | None, services: Any, latents: Tensor | None = None
) -> LearnedDepth:
    """Learn which blocks to leave out of MODEL `model`. services: of session.Services; latents: examples (n, c, h, w) as a VAE gives them.

    Raises: NodeInputError for patterns that do not fit, or a model with a plan. What interrupts is raised after saving.
    """
    return Learning(model, settings, calibration, folder, services, latents).run()
