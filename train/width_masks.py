"""Importance of heads and neurons of a host's MODEL: learned masks (accel/prune/ecodiff.py) and what they are compared with.

    end_to_end   min_λ E ‖z_0 − ẑ_0‖² + β·R(λ): the whole sampling run with one mask against the run without, from the same noise
    per_step     the same with the mean over steps of ‖v − v̂‖², each step from the latent that the whole model had come to
    taylor       mean |∂L/∂m| at m = 1, L = ‖v − (ε − x̂0)‖² at points around the model's own samples
    activation   (Σ over columns j that read the unit of E[x_j²]·‖W_j‖²)^½
    magnitude    root mean square of the unit's weights
    random       drawn from the seed

Masks are drawn once for a micro-batch and hold for its whole run, forward and backward.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..accel.prune.apply import plan_of, stack_under
from ..accel.prune.ecodiff import LearnedMasks
from ..accel.prune.identity import model_hash, original_part, original_weight
from ..accel.prune.scores import relative_error
from ..accel.prune.width import MaskValue, WidthCut, WidthScores, groups_of, kept_units, magnitude, put_masks_on
from ..accel.quant.calibration import watching
from ..errors import input_error
from ..families.width import WidthGroup
from .checkpoints import RunFolder
from .config import TrainConfig
from .draws import Draws, seeded
from .history import History
from .host_model import checkpoint_blocks
from .loop import Batch, Callbacks, Trainer
from .optim import Optim
from .pool import CALL, Calibration, PoolData, guided, inside, points, sample_pool, velocities
from .rollout import rollout_gradient, single_step_gradient

__all__ = ["LEARNED", "MEASURED", "TARGETS", "LearnedWidth", "MaskSettings", "learn_masks", "score_width"]

LEARNED = ("end_to_end", "per_step")
MEASURED = ("magnitude", "taylor", "activation", "random")
TARGETS = ("both", "heads", "ffn")
EPS = 1e-12  # of AdamW: a mean over neurons and layers makes gradients of 1e-8
SHOWN = (0.1, 0.2, 0.3)  # shares that a report tries, on at most CALL rows of the pool


@dataclass(frozen=True)
class MaskSettings:
    """objective: one of LEARNED. targets: one of TARGETS. stop_at: share of units with λ < 0 at which learning ends, 0 for never.
    include, exclude: regular expressions over names such as "double_blocks.0.heads". The others as in ecodiff.py and TrainConfig."""

    objective: str = "end_to_end"
    iterations: int = 100
    batch: int = 1
    accumulate: int = 4
    lr_heads: float = 0.5
    lr_ffn: float = 0.1
    beta: float = 0.01
    penalty: str = "l1_sigmoid"
    targets: str = "both"
    delta: float = 0.1
    stop_at: float = 0.0
    include: str = ""
    exclude: str = ""
    seed: int = 0
    checkpointing: bool = False
    save_every: int = 25
    resume: str = "auto"

    def config(self) -> TrainConfig:
        factors = (("/heads2?$", self.lr_heads), ("", self.lr_ffn))
        optim = Optim(lr=1.0, eps=EPS, weight_decay=0.0, warmup=10, schedule="constant", clip=0.0, factors=factors)
        return TrainConfig(
            steps=self.iterations, batch=self.batch, accumulate=self.accumulate, seed=self.seed, optim=optim, ema=0.0, dropout=0.0,
            save_every=self.save_every, validate_every=0, resume=self.resume, checkpointing=self.checkpointing,
        )  # fmt: skip


@dataclass(frozen=True)
class LearnedWidth:
    """scores: λ of every unit; losses: of each step; report: figures; history: to draw."""

    scores: WidthScores
    losses: list[float]
    report: dict[str, Any]
    history: History


class _Paths:
    """The trainer's data: latents of the whole model's runs, (n, 2 or T + 1, c, h, w); row i has prompt i modulo their number."""

    def __init__(self, paths: Tensor, prompts: int):
        self.pool = PoolData(paths, prompts)
        self.fingerprint = self.pool.fingerprint
        self.buckets = self.pool.buckets

    def batch(self, rows: Tensor, draws: Draws) -> Batch:
        return self.pool.batch(rows, draws)


class _Learner:
    """λ behind the face that the trainer knows, and the masks that they fill."""

    def __init__(self, learned: LearnedMasks, masks: dict[tuple[str, str], MaskValue]):
        self.learned, self.masks = learned, masks

    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.learned.named_parameters())

    def to(self, device: torch.device) -> None:
        self.learned.to(device)

    @contextmanager
    def holding(self, values: dict[tuple[str, str], Tensor]):
        """Inside, the network is masked by `values`; after it, whole."""
        for key, value in values.items():
            self.masks[key].value = value
        try:
            yield
        finally:
            for mask in self.masks.values():
                mask.value = None


class _Flow:
    """Euler steps of a trainee along `sigmas`, guided: x ← x + (σ' − σ)·v."""

    def __init__(self, trainee: Any, sigmas: Tensor, cfg: float):
        self.trainee, self.sigmas, self.cfg = trainee, sigmas.float().cpu(), cfg
        self.widths = (self.sigmas[1:] - self.sigmas[:-1]).tolist()

    def step(self, cond: list) -> Callable[[Tensor, int], Tensor]:
        def step(x: Tensor, index: int) -> Tensor:
            return x + self.widths[index] * guided(self.trainee, x, self.sigmas[index].expand(len(x)), cond, self.cfg)

        return step

    @torch.no_grad()
    def path(self, start: Tensor, cond: list) -> list[Tensor]:
        latents, step = [start.to(self.trainee.device)], self.step(cond)
        for index in range(len(self.widths)):
            latents.append(step(latents[-1], index))
        return latents


@dataclass
class MaskTrainer(Trainer):
    """The trainer with a run of many steps where it has one point of the flow."""

    settings: MaskSettings | None = None
    learner: _Learner | None = None
    flow: _Flow | None = None

    def run(self) -> History:
        try:
            return super().run()
        except _EnoughError:
            return self.history

    def _gradients(self) -> tuple[float, float]:
        config, draws, device = self.config, Draws(self.config.seed, self.done), self.flow.trainee.device
        batch = self.data.batch(self.order.rows(self.done), draws)
        total = 0.0
        for micro in range(config.accumulate):
            self.callbacks.interrupt()
            part = slice(micro * config.batch, (micro + 1) * config.batch)
            total += self._one_run(batch.clean[part].to(device), batch.cond[part], draws, micro) / config.accumulate
        penalty = self.settings.beta * self.learner.learned.penalty(self.settings.penalty)
        penalty.backward()
        norm = torch.nn.utils.get_total_norm([value.grad for value in self.params.values() if value.grad is not None])
        return total + float(penalty.detach()), float(norm)

    def _one_run(self, paths: Tensor, cond: list, draws: Draws, micro: int) -> float:
        """Gradient of λ from one mask and one micro-batch; returns its loss."""
        groups = self.learner.learned.groups
        u = {group.key: draws.uniform(f"mask {micro} {group.name}", (group.count,)) for group in groups}
        values = self.learner.learned.drawn(u, self.settings.delta)
        leaves = {key: value.detach().requires_grad_() for key, value in values.items()}
        step, scale = self.flow.step(cond), 1.0 / self.config.accumulate
        with self.learner.holding(leaves):
            if self.settings.objective == "end_to_end":
                loss = rollout_gradient(step, paths[:, 0], len(self.flow.widths), paths[:, -1], list(leaves.values()), scale)
            else:
                loss = single_step_gradient(step, paths.unbind(1), self.flow.widths, list(leaves.values()), scale)
        attached = [(values[key], leaf.grad) for key, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([value for value, _ in attached], [gradient for _, gradient in attached])
        return loss

    def _after_step(self) -> None:
        super()._after_step()
        if self.settings.stop_at and share_below(self.learner.learned) >= self.settings.stop_at:
            self.callbacks.log(f"stopped after step {self.done}: {self.settings.stop_at:.0%} of the units have λ below 0")
            raise _EnoughError


class _EnoughError(Exception):
    """The wanted share has been reached; the trainer saves on its way out."""


def share_below(learned: LearnedMasks) -> float:
    values = torch.cat([value.flatten() for value in learned.values().values()])
    return float((values < 0).float().mean())


def chosen_groups(model: Any, settings: MaskSettings, where: str) -> tuple[WidthGroup, ...]:
    """Groups of MODEL that the settings name. Raises: NodeInputError where there are none, or an expression cannot be read."""
    if (plan := plan_of(model)) is not None and plan.width:
        raise input_error(where, "model", "a model whose width is cut already", "a model of full width", "Link the model before that.")
    patterns = []
    for name in ("include", "exclude"):
        try:
            patterns.append(re.compile(getattr(settings, name)))
        except re.error as error:
            allowed = f"a regular expression ({error})"
            raise input_error(where, name, getattr(settings, name), allowed, "Escape signs such as brackets.") from None
    wanted, unwanted = patterns
    found = tuple(
        group for group in groups_of(model, where)
        if settings.targets in ("both", "heads" if group.is_heads else "ffn") and wanted.search(group.name)
        and not (settings.exclude and unwanted.search(group.name))
    )  # fmt: skip
    if not found:
        allowed = "a choice that names heads or neurons; Wan and LTX-Video have neurons alone that can go"
        raise input_error(where, "targets", f"{settings.targets}, include {settings.include!r}", allowed, "Choose ffn, or empty include.")
    return found


def check_sigmas(sigmas: Tensor, where: str) -> Tensor:
    sigmas = sigmas.detach().clone().float().cpu()
    falls = len(sigmas) >= 2 and bool(torch.isfinite(sigmas).all()) and bool((sigmas[1:] < sigmas[:-1]).all())
    if not falls or sigmas[0] > 1.0 or sigmas[-1] < 0.0:
        got = f"{len(sigmas)} values{f' from {sigmas[0]:g} to {sigmas[-1]:g}' if len(sigmas) else ''}"
        allowed = "at least two, falling, within 1 and 0"
        raise input_error(where, "sigmas", got, allowed, "Link a schedule of 4 to 12 steps from 1 to 0.")
    return sigmas


def learn_masks(
    model: Any, settings: MaskSettings, shown: Calibration, sigmas: Tensor, folder: Path | None, services: Any, where: str
) -> LearnedWidth:
    """Learn λ of the chosen heads and neurons of MODEL.

    Args:
        shown: prompts, size, number of noises, guidance; its steps are not read. sigmas: of the runs, falling.
        folder: of checkpoints, None for none. services: of session.Services.

    Raises: NodeInputError for what cannot be masked, and samples that are not finite. What interrupts is raised after saving.
    """
    groups, sigmas = chosen_groups(model, settings, where), check_sigmas(sigmas, where)
    learned = LearnedMasks(groups)
    patcher, masks = put_masks_on(model, groups, services.before_run)
    learner, notes, found = _Learner(learned, masks), [], {}
    if settings.checkpointing and not checkpoint_blocks(patcher):
        notes.append("blocks of this model cannot be recomputed one by one; checkpointing is off")

    def body(trainee: Any) -> None:
        flow = _Flow(trainee, sigmas, shown.cfg)
        paths = _whole_paths(flow, shown, settings.objective == "end_to_end", where)
        bar = services.progress(settings.iterations)
        callbacks = Callbacks(lambda done, steps, history: bar.update_absolute(done, steps), services.interrupt, log=notes.append)
        data = _Paths(paths, len(trainee.positive))
        run_folder = RunFolder(folder, where) if folder else None
        trainer = MaskTrainer(
            trainee, data, settings.config(), run_folder, callbacks=callbacks, settings=settings, learner=learner, flow=flow
        )
        trainer.run()
        found["trainer"] = trainer
        found["errors"] = _tried(flow, data, learner, _scores(model, settings.objective, learned.values(), where), groups, model)

    started = time.perf_counter()
    about = {"base": model_hash(model), "masks": {key: value for key, value in dataclasses.asdict(settings).items() if key in FROZEN}}
    about["masks"] |= {"sigmas": sigmas.tolist(), "cfg": shown.cfg}
    inside(services.guider, patcher, shown, body, learner, about)
    history = found["trainer"].history
    report = {
        "method": settings.objective, "steps": found["trainer"].done, "seconds": round(time.perf_counter() - started, 1),
        "units": sum(group.count for group in groups), "share_below_0": round(share_below(learned), 4),
        "final_latent_error_at": found["errors"], "settings": dataclasses.asdict(settings), "notes": notes,
    }  # fmt: skip
    scores = _scores(model, settings.objective, learned.values(), where, report)
    return LearnedWidth(scores, [step.loss for step in history.steps], report, history)


FROZEN = ("objective", "targets", "include", "exclude", "delta", "penalty", "beta")  # a resumed run must have the same


def _scores(model: Any, method: str, values: dict, where: str, facts: dict | None = None) -> WidthScores:
    return WidthScores(stack_under(model, where).family, model_hash(model), method, values, facts or {})


def _whole_paths(flow: _Flow, shown: Calibration, ends_only: bool, where: str) -> Tensor:
    """Latents of the whole model from the pool's noises, (n, 2 or T + 1, c, h, w) fp32 on the CPU."""
    prompts = len(flow.trainee.positive)
    noise = torch.randn((shown.count, *shown.size), generator=seeded(shown.seed, "pool")) * flow.sigmas[0]
    parts = []
    for start in range(0, shown.count, CALL):
        path = flow.path(noise[start : start + CALL], [row % prompts for row in range(start, min(start + CALL, shown.count))])
        parts.append(torch.stack([path[0], path[-1]] if ends_only else path, dim=1).float().cpu())
    paths = torch.cat(parts)
    if not bool(torch.isfinite(paths).all()):
        got = "samples with NaN or infinity"
        raise input_error(where, "model", got, "a model whose samples are finite", "Try fp32, or another seed.")
    return paths


def _tried(flow: _Flow, data: _Paths, learner: _Learner, scores: WidthScores, groups: tuple, model: Any) -> dict[str, float]:
    """Share of weights removed → ‖ẑ_0 − z_0‖²/‖z_0‖² over some rows of the pool."""
    rows = data.batch(torch.arange(min(CALL, len(data.pool.latents))), None)
    errors = {}
    for share in SHOWN:
        kept = kept_units(groups, scores, WidthCut(share, align=1), model)
        hard = {group.key: torch.zeros(group.count).index_fill(0, torch.tensor(kept[group.key]), 1.0) for group in groups}
        with learner.holding({key: value.to(flow.trainee.device) for key, value in hard.items()}):
            final = flow.path(rows.clean[:, 0], rows.cond)[-1]
        errors[f"{share:g}"] = relative_error(final.cpu(), rows.clean[:, -1])
    return errors


def score_width(model: Any, method: str, shown: Calibration, at: int, services: Any, where: str) -> WidthScores:
    """Numbers of all heads and neurons of MODEL by one of MEASURED. at: points of the flow where the model is asked."""
    groups = chosen_groups(model, MaskSettings(), where)
    if method == "magnitude":
        return _scores(model, method, magnitude(model, groups), where)
    if method == "random":
        values = {group.key: torch.rand(group.count, generator=seeded(shown.seed, group.name)) for group in groups}
        return _scores(model, method, values, where)
    found: dict[tuple[str, str], Tensor] = {}
    patcher, masks = put_masks_on(model, groups, services.before_run)

    def body(trainee: Any) -> None:
        pool = sample_pool(trainee, shown)
        if not bool(torch.isfinite(pool).all()):
            raise input_error(where, "model", "samples with NaN or infinity", "a model whose samples are finite", "Try fp32.")
        data = PoolData(pool, len(trainee.positive))
        measure = _taylor if method == "taylor" else _activation
        found.update(measure(trainee, data, at, shown.seed, groups, masks, model))

    inside(services.guider, patcher, shown, body)
    return _scores(model, method, found, where, {"points": at})


def _taylor(trainee: Any, data: PoolData, at: int, seed: int, groups: tuple, masks: dict, model: Any) -> dict[tuple[str, str], Tensor]:
    draws, device = Draws(seed, -3), trainee.device  # no step is numbered so
    noise = draws.normal("noise", (at, *data.latents.shape[1:]))
    order = (torch.randperm(at, generator=draws.generator("order")) + 0.5) / at
    totals = {group.key: torch.zeros(group.count) for group in groups}
    for point in range(at):
        batch = data.batch(torch.tensor([point % len(data.latents)]), draws)
        sigma, eps = order[point : point + 1], noise[point : point + 1]
        leaves = {group.key: torch.ones(group.count, device=device, requires_grad=True) for group in groups}
        for key, leaf in leaves.items():
            masks[key].value = leaf
        try:
            velocity = trainee.velocity((1.0 - sigma) * batch.clean + sigma * eps, sigma, batch.cond)
            loss = (velocity - (eps - batch.clean).to(device)).square().mean()
            for key, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)):
                totals[key] += 0.0 if gradient is None else gradient.abs().float().cpu() / at
        finally:
            for mask in masks.values():
                mask.value = None
    return totals


def _activation(trainee: Any, data: PoolData, at: int, seed: int, groups: tuple, masks: dict, model: Any) -> dict[tuple[str, str], Tensor]:
    layers = {span.layer: original_part(model, span.layer) for group in groups for span in group.columns}
    with watching(layers) as stats:
        velocities(trainee, points(data, at, seed))
    found = {}
    for group in groups:
        total = torch.zeros(group.count, dtype=torch.float64)
        for span in group.columns:
            columns = slice(span.start, span.start + span.size * group.count)
            seen = stats.layers[span.layer]
            power = seen.squares[columns] / max(1, seen.count)
            weight = original_weight(model, span.layer)[:, columns].double().square().sum(0).cpu()
            total += (power * weight).view(group.count, -1).sum(1)
        found[group.key] = total.sqrt().float()
    return found
