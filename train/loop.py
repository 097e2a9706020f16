"""The loop: draw, predict, compare, step, average, keep.

One step: rows of the data set in a seeded order → sigma ~ density → a point of the flow and the velocity asked for there →
L = mean_b w(σ_b)·ρ(v − u) + Σ_k a_k·L_k, divided over the micro-batches → clip → step → average. Nothing here knows a host: the
model, the data and what is told to a user come in as objects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import input_error
from .checkpoints import Checkpoint, RunFolder
from .config import TrainConfig
from .draws import Draws, Order
from .ema import Ema
from .history import History, StepRecord, StraightnessRecord, ValidationRecord
from .optim import Optimizers, lr_factor
from .targets import AT_NOISE, NEEDS_PAIRS, NEEDS_TEACHER, Point, point_at, teacher_velocity
from .two_step import TwoStep
from .validation import Validation

__all__ = ["Auxiliary", "Batch", "Callbacks", "Data", "NotFiniteError", "StepContext", "Trainee", "Trainer"]

# A step whose loss or gradient is not finite is left out; the rate halves after 3 of them in a row, the run ends after 10.
HALVE_AFTER, STOP_AFTER = 3, 10


@dataclass(frozen=True)
class Batch:
    """Examples of one step: clean latents (b, …) fp32, a condition each (None is the empty one), weights of elements and paired noises
    where the data has them."""

    clean: Tensor
    cond: list[Any]
    weight: Tensor | None = None
    noise: Tensor | None = None


class Data(Protocol):
    """Where examples come from. fingerprint: a hash of all of them."""

    fingerprint: str

    def buckets(self) -> list[list[int]]:
        """Rows of equal latent size, one list a size."""

    def batch(self, rows: Tensor, draws: Draws) -> Batch:
        """The examples of `rows`; what varies (crops, backgrounds) comes from `draws`."""


class Trainee(Protocol):
    """What is trained, behind its host."""

    def describe(self) -> dict[str, Any]:
        """What must be the same when a run is resumed: base model, chosen parameters, rank."""

    def params(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, fp32."""

    def velocity(self, x: Tensor, sigma: Tensor, cond: list[Any]) -> Tensor:
        """Velocity (b, …) fp32 at x (b, …) and sigma (b,); None among `cond` is the empty condition."""


@dataclass(frozen=True)
class StepContext:
    """What an auxiliary loss may look at: the micro-batch, its point, the prediction, and the step counted from 0.

    draws, start, examples: what the step draws from, the micro-batch's first example, and how many examples the step has.
    """

    trainee: Trainee
    point: Point
    prediction: Tensor
    cond: list[Any]
    step: int
    draws: Draws
    start: int
    examples: int

    def normal(self, stream: str) -> Tensor:
        """Normal numbers of the micro-batch's shape (b, …): its rows of what is drawn for the whole step."""
        count = len(self.cond)
        return self.draws.normal(stream, (self.examples, *self.point.x.shape[1:]))[self.start : self.start + count]

    def uniform(self, stream: str) -> Tensor:
        """Uniform numbers (b,), likewise."""
        return self.draws.uniform(stream, (self.examples,))[self.start : self.start + len(self.cond)]


class Auxiliary(Protocol):
    """An additional loss. `weight` 0 takes it out of the graph, so that the run is bit-identical to one without it."""

    name: str
    weight: float
    start: int
    stop: int
    every: int

    def loss(self, context: StepContext) -> Tensor:
        """A scalar."""


class NotFiniteError(RuntimeError):
    """Too many steps in a row whose loss was not finite. The last checkpoint is whole."""


@dataclass
class Callbacks:
    """How a run talks to its host.

    progress: called after each step with (steps done, steps in all, history). interrupt: called before each micro-batch; raises to
    stop. preview: called with the steps done while the trainee holds its averaged weights. log: lines for people.
    """

    progress: Callable[[int, int, History], None] = lambda done, steps, history: None
    interrupt: Callable[[], None] = lambda: None
    preview: Callable[[int], None] = lambda done: None
    log: Callable[[str], None] = lambda line: None


@dataclass
class Trainer:
    """One run of `trainee` on `data`.

    folder: where checkpoints go; None keeps nothing. teacher: of the target teacher_velocity. auxiliaries: additional losses.
    held_out: validation data, `data` itself where None.
    """

    trainee: Trainee
    data: Data
    config: TrainConfig
    folder: RunFolder | None = None
    teacher: Trainee | None = None
    auxiliaries: Sequence[Auxiliary] = ()
    held_out: Data | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)

    def __post_init__(self):
        self.params = self.trainee.params()
        self.optimizers = Optimizers(self.config.optim, self.params)
        self.ema = Ema(self.params, self.config.ema)
        self.order = Order(self.data.buckets(), self.config.seed, self.config.examples)
        target = self.config.target
        self.validation = Validation(self.held_out or self.data, self.config.seed, target, self.teacher, self.config.batch)
        if target.kind in NEEDS_TEACHER and self.teacher is None:
            raise input_error("Train Target", "teacher", None, "a model to follow", "Link one, or choose another kind.")
        if target.kind == "flow_guided_distill":
            self.auxiliaries = (*self.auxiliaries, TwoStep(self.teacher, target, self.config.loss))
        self.history = History(self.folder.path if self.folder else None)
        self.done = 0  # steps finished
        self.bad_in_a_row = 0
        self.halvings = 0
        self._saved_at = time.monotonic()
        self._last_saved = -1

    # A run -------------------------------------------------------------------------------------------------------------

    def run(self) -> History:
        """Resume or begin, train what is left, keep the end. An interrupt or a failure keeps what is done and goes on upwards."""
        self._open()
        last = self.config.steps
        if self.config.steps_this_run:
            last = min(last, self.done + self.config.steps_this_run)
        try:
            if self.done == 0 and self.config.validate_every:
                self._straightness()
            while self.done < last:
                self._one_step()
                self._after_step()
            if self.done == self.config.steps and self.config.validate_every and not self._validated():
                self.validate()
        finally:
            if self.folder is not None and self.done > 0:
                self.save()
        return self.history

    def _open(self) -> None:
        if self.folder is None:
            return
        if self.config.resume == "new" and (aside := self.folder.set_aside()):
            self.callbacks.log(f"earlier files of this run are now in {aside.name}")
        size = sum(value.numel() * 4 for value in self.params.values())
        self.folder.check_space(4 * size)
        checkpoint, complaints = self.folder.newest()
        for complaint in complaints:
            self.callbacks.log(complaint)
        if checkpoint is None:
            if complaints:
                self.callbacks.log("no checkpoint of this run is whole; beginning at step 0")
            self.history.rewrite()
            return
        if self.config.resume == "error_if_exists":
            allowed = "a name without checkpoints, since resume is error_if_exists"
            raise input_error("Train", "name", self.folder.path.name, allowed, "Choose another name, or set resume to auto.")
        self.restore(checkpoint)

    def _one_step(self) -> None:
        factor = lr_factor(self.config.optim, self.done, self.config.steps) * 0.5**self.halvings
        loss, norm = self._gradients()
        finite = bool(torch.isfinite(torch.tensor([loss, norm])).all())
        if finite:
            self.optimizers.step(factor)
            self.ema.update(self.done)
            self.bad_in_a_row = 0
        else:
            self.optimizers.zero_grad()
            self._count_bad()
        self.done += 1
        self.history.add(StepRecord(self.done, loss, norm, factor, skipped=not finite))

    def _count_bad(self) -> None:
        self.bad_in_a_row += 1
        if self.bad_in_a_row % HALVE_AFTER == 0:
            self.halvings += 1
            self.callbacks.log(f"step {self.done + 1}: {self.bad_in_a_row} steps in a row were not finite; the learning rate is halved")
        if self.bad_in_a_row >= STOP_AFTER:
            raise NotFiniteError(
                f"Train: the loss was not finite in {STOP_AFTER} steps in a row (step {self.done + 1}). The weights are those from before. "
                "Lower lr, raise warm-up, or look for broken examples in the data."
            )

    def _gradients(self) -> tuple[float, float]:
        """Accumulate the gradient of one step; returns its loss and the gradient's norm before clipping."""
        config, draws = self.config, Draws(self.config.seed, self.done)
        batch = self.data.batch(self.order.rows(self.done), draws)
        sigma = config.density.sample(config.examples, draws.generator("sigma"))
        point = point_at(config.target, batch.clean, batch.noise, sigma, draws, self.done)
        dropped = (draws.uniform("dropout", (config.examples,)) < config.dropout).tolist()
        cond = [None if drop else given for drop, given in zip(dropped, batch.cond)]
        total = 0.0
        for micro in range(config.accumulate):
            self.callbacks.interrupt()
            start = micro * config.batch
            weight = None if batch.weight is None else batch.weight[start : start + config.batch]
            loss = self._loss(point.slice(start, config.batch), cond[start : start + config.batch], weight, draws, start)
            loss = loss / config.accumulate
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.get_total_norm([value.grad for value in self.params.values() if value.grad is not None])
        if config.optim.clip and torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(self.params.values(), config.optim.clip, norm)
        return total, float(norm)

    def _loss(self, point: Point, cond: list[Any], weight: Tensor | None, draws: Draws, start: int) -> Tensor:
        """The loss of a micro-batch whose first example is number `start` of the step."""
        config = self.config
        wanted = point.velocity
        if config.target.kind == "teacher_velocity":
            wanted = teacher_velocity(self.teacher, config.target, point.x, point.sigma, cond)
            if share := config.target.flow_share:
                wanted = torch.lerp(wanted, point.velocity.to(wanted), share)
        prediction = self.trainee.velocity(point.x, point.sigma, cond)
        place = prediction.device
        weight = None if weight is None else weight.to(place)
        each = config.loss.each(prediction - wanted.to(place), point.sigma, weight)
        loss = (config.loss.over_sigma(point.sigma).to(place) * each).mean()
        if config.target.kind == "flow_guided_distill":
            loss = config.target.pair_weight * loss
        for auxiliary in sorted(self.auxiliaries, key=lambda each: each.name):  # one order, so that the order of linking changes no bit
            active = auxiliary.start <= self.done < auxiliary.stop and self.done % auxiliary.every == 0
            if auxiliary.weight and active:
                context = StepContext(self.trainee, point, prediction, cond, self.done, draws, start, config.examples)
                loss = loss + auxiliary.weight * auxiliary.loss(context)
        return loss

    def _after_step(self) -> None:
        config = self.config
        if config.validate_every and self.done % config.validate_every == 0:
            self.validate()
        if config.preview_every and self.done % config.preview_every == 0:
            with self.averaged():
                self.callbacks.preview(self.done)
        due = config.save_every and self.done % config.save_every == 0
        late = config.save_minutes and time.monotonic() - self._saved_at >= 60.0 * config.save_minutes
        if self.folder is not None and (due or late):
            self.save()
        self.callbacks.progress(self.done, config.steps, self.history)

    # Weights and files -------------------------------------------------------------------------------------------------

    def averaged(self):
        """A context in which the trainee holds its averaged weights."""
        return _Swapped(self.params, self.ema.weights())

    def validate(self) -> None:
        """Measure the velocity error of the weights and of their average; draws nothing that a step draws."""
        for name in ("weights", "ema") if self.config.ema else ("weights",):
            with self.averaged() if name == "ema" else _Swapped({}, {}):
                bins = self.validation.bins(self.trainee)
            self.history.validated(ValidationRecord(self.done, name, sum(bins) / len(bins), bins, self.validation.sigmas))
        self._straightness()

    def _validated(self) -> bool:
        return any(record.step == self.done for record in self.history.validations)

    def _straightness(self) -> None:
        """Measure S of the average's own paths, where pairs are there to straighten them."""
        target = self.config.target
        if target.kind not in NEEDS_PAIRS or target.kind in AT_NOISE:
            return
        with self.averaged():
            found = self.validation.straightness(self.trainee)
        beta = target.beta(self.done) if target.kind == "annealing_reflow" else 0.0
        self.history.straightened(StraightnessRecord(self.done, beta, *found))

    def save(self) -> None:
        """Keep this step, unless it is kept already, and remove what is too old."""
        if self._last_saved == self.done:
            return
        tensors = {f"params.{name}": value for name, value in self.params.items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.average.items()}
        tensors |= {f"opt.{name}": value for name, value in self.optimizers.state().items()}
        self.history.flush()
        loss = self.history.mean_loss()
        meta = {
            "config": self.config.as_dict(), "config_hash": self.config.digest(), "model": self.trainee.describe(),
            "data": self.data.fingerprint, "torch": torch.__version__, "bad_in_a_row": self.bad_in_a_row, "halvings": self.halvings,
            "mean_loss": loss if loss == loss else None,
        }  # fmt: skip
        self.folder.save(self.done, tensors, meta)
        best = self.history.best()
        self.folder.thin(self.config.keep, best.step if best else None)
        self._saved_at, self._last_saved = time.monotonic(), self.done

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises: NodeInputError for a field that cannot change, ValueError for tensors that are not this run's.
        """
        meta = checkpoint.meta
        changes = self.config.check_resume(meta.get("config", {}), self.trainee.describe(), meta.get("model", {}))
        if meta.get("data") != self.data.fingerprint:
            changes.append("data: the examples are not those of the checkpoint")
        for change in changes:
            self.callbacks.log(f"resumed at step {checkpoint.step} with another {change}")
        saved = checkpoint.part("params")
        if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in self.params.items()}:
            raise ValueError(f"Train: step {checkpoint.step} holds other parameters than this run trains; choose another name.")
        for name, value in self.params.items():
            value.copy_(saved[name])
        average = checkpoint.part("ema")
        self.ema.load(average if average else saved)
        self.optimizers.load(checkpoint.part("opt"))
        self.done = self._last_saved = checkpoint.step
        self.bad_in_a_row, self.halvings = int(meta.get("bad_in_a_row", 0)), int(meta.get("halvings", 0))
        self.history = History.load(self.folder.path, checkpoint.step)
        self.callbacks.log(f"resumed at step {checkpoint.step}")


class _Swapped:
    """Put other values into parameters for a while. The trained values come back whatever happens inside."""

    def __init__(self, params: dict[str, nn.Parameter], values: dict[str, Tensor]):
        self.params, self.values = params, values
        self.trained: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        self.trained = {name: value.detach().clone() for name, value in self.params.items()}
        for name, value in self.params.items():
            value.copy_(self.values[name])

    @torch.no_grad()
    def __exit__(self, *exception) -> None:
        for name, value in self.params.items():
            value.copy_(self.trained[name])
        self.trained = {}
