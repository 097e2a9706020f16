"""A training run on a host's MODEL, from what a node was given to what it hands out."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accel.prune.identity import model_hash
from ..accel.prune.linear_mlps import with_learnt
from ..errors import input_error
from ..families.blocks import block_layout, parse_blocks
from .checkpoints import RunFolder, write_whole
from .config import TrainConfig
from .curve import curve_picture
from .dataset import Dataset, LatentData
from .densities import Density
from .draws import seeded
from .features import FeatureLoss
from .history import History
from .host_model import HostTrainee, checkpoint_blocks, ordinary, own_modules, taken_off, train_inside, trainable_weights, watch_blocks
from .loop import Callbacks, Trainer
from .losses import Loss
from .optim import Optim
from .params import Additions, ParamSubset, attach
from .targets import Target

__all__ = ["Services", "TrainRequest", "run_training"]

WHERE = "Train"
LEAST_SIGMA = 1e-3
PREVIEWS, PREVIEW_STEPS = 4, 20
SECONDS_BETWEEN_PICTURES = 0.5


@dataclass(frozen=True)
class Services:
    """What is asked of a host: guider(model) → CFGGuider; progress(total) → ProgressBar; interrupt() raises to stop; load([models]);
    with_lora(model, tensors) → a MODEL with a LoRA file on it; before_run: its name for callbacks "before a run"."""

    guider: Callable[[Any], Any]
    progress: Callable[[int], Any]
    interrupt: Callable[[], None]
    load: Callable[[list], None]
    with_lora: Callable[[Any, dict], Any]
    before_run: str


@dataclass(frozen=True)
class TrainRequest:
    """A node's inputs. folder: of the run. settings: every other input by name, defaults filled in."""

    model: Any
    data: Dataset
    folder: Path
    settings: dict[str, Any]

    def config(self) -> TrainConfig:
        given = self.settings
        names = ("steps", "steps_this_run", "batch", "accumulate", "seed", "ema", "save_every", "keep", "validate_every", "preview_every",
                 "resume", "checkpointing")  # fmt: skip
        target = given.get("target", (Target(), None))[0]
        return TrainConfig(
            **{name: given[name] for name in names},
            density=given.get("density", Density(low=LEAST_SIGMA)),
            target=target,
            loss=given.get("loss", Loss()),
            optim=given.get("optim", Optim(lr=1e-3, warmup=10)),
            dropout=given["cond_dropout"] if given.get("negative") is not None else 0.0,
        )


class Session:
    """Everything of one run that has to be let go at its end."""

    def __init__(self, request: TrainRequest, services: Services):
        self.request, self.services = request, services
        self.settings, self.config = request.settings, request.config()
        self.subset: ParamSubset = self.settings.get("params", ParamSubset())
        self.folder = RunFolder(request.folder, WHERE)
        self.notes: list[str] = []
        self.curve: Tensor | None = None
        self.previews, self.previewed = torch.zeros(1, 64, 64, 3), False
        self.trainer: Trainer | None = None
        self.exported: dict[str, Tensor] = {}
        self.student_features: dict[tuple[str, int], Tensor] = {}
        self.bar = services.progress(self.config.steps)
        self._shown = 0.0

    def run(self) -> tuple:
        started = time.perf_counter()
        self.request.data.check(WHERE)
        with torch.inference_mode(False), torch.enable_grad():
            patcher = self.request.model.clone()
            patcher.set_model_compute_dtype(torch.bfloat16 if self.settings["dtype"] == "bf16" else torch.float32)
            base = model_hash(patcher)
            trainable_weights(patcher)
            additions = attach(patcher, self.subset, self.config.seed, WHERE)
            if self.config.checkpointing and not checkpoint_blocks(patcher):
                self.notes.append("blocks of this model cannot be recomputed one by one; checkpointing is off")
            data = self._latents(patcher)
            about = {"base": base, "params": dataclasses.asdict(self.subset)}
            try:
                self._nested(patcher, additions, data, about)
            except torch.OutOfMemoryError as error:
                raise RuntimeError(self._memory_message(error)) from error
            finally:
                patcher.detach()  # no wrapper of ours stays on the shared network
        return self._results(time.perf_counter() - started)

    def _latents(self, patcher: Any) -> LatentData:
        """The examples in the model's space. Pairs are there already."""
        data = self.request.data
        to_model = patcher.get_model_object("process_latent_in")
        latents = [ordinary(latent).float().cpu() for latent in data.latents]
        if not data.noise:
            latents = [to_model(latent[None])[0].float().cpu() for latent in latents]
        from_data = LatentData(latents, len(data.conditioning), list(data.noise) or None, data.weights, data.facts, data.flip)
        channels = getattr(patcher.get_model_object("latent_format"), "latent_channels", latents[0].shape[0])
        if latents[0].shape[0] != channels:
            allowed = f"latents of {channels} channels, as this model has"
            raise input_error(WHERE, "data", f"{latents[0].shape[0]} channels", allowed, "Encode the pictures with this model's VAE.")
        return from_data

    def _guider(self, model: Any) -> Any:
        positive = ordinary(list(self.request.data.conditioning))
        negative = ordinary(list(self.settings.get("negative") or positive[:1]))
        guider = self.services.guider(model)
        guider.set_conds(positive, negative)
        return guider

    def _nested(self, patcher: Any, additions: Additions, data: LatentData, about: dict) -> None:
        """Open the runs of teachers around the student's, then train."""
        like = data.latents[0][None]
        teacher_model = self.settings.get("target", (None, None))[1]
        features = self.settings.get("features")
        pairs = self._feature_pairs(patcher, features) if features else ()

        def train(trainee: HostTrainee, teacher: HostTrainee | None = None, guide: HostTrainee | None = None) -> None:
            auxiliaries = []
            if guide is not None:
                trainee.features = self.student_features
                auxiliaries.append(FeatureLoss(guide, pairs, *(features[name] for name in ("weight", "start", "stop", "every"))))
            callbacks = Callbacks(self._progress, self.services.interrupt, lambda done: self._preview(trainee, done), self.notes.append)
            self.trainer = Trainer(trainee, data, self.config, self.folder, teacher, tuple(auxiliaries), callbacks=callbacks)
            self.trainer.run()
            self.exported = additions.export(self.trainer.ema.weights())
            self._keep_lora()
            with self.trainer.averaged():
                self._preview(trainee, self.trainer.done)

        def followed(teacher: HostTrainee, model: Any, held: dict) -> HostTrainee:
            teacher.features = held
            if model.model is patcher.model:
                own = own_modules(self.request.model, model)
                teacher.alone = lambda: taken_off(patcher, additions, own)
            return teacher

        def student(teacher=None, guide=None) -> None:
            self.services.load([patcher])
            train_inside(self._guider(patcher), like, additions, about, lambda trainee: train(trainee, teacher, guide))

        def with_guide(teacher=None) -> None:
            if not pairs:
                student(teacher)
                return
            model = self._teacher(features["teacher"], "Feature Loss")
            held: dict = {}
            watch_blocks(model, tuple(dict.fromkeys(other for _, other in pairs)), lambda: held)
            train_inside(self._guider(model), like, None, {}, lambda guide: student(teacher, followed(guide, model, held)))

        if pairs:
            watch_blocks(patcher, tuple(dict.fromkeys(own for own, _ in pairs)), lambda: self.student_features)
        if teacher_model is None:
            with_guide()
        else:
            model = self._teacher(teacher_model, "Train Target")
            train_inside(self._guider(model), like, None, {}, lambda teacher: with_guide(followed(teacher, model, {})))

    def _teacher(self, model: Any, where: str) -> Any:
        """A frozen clone of a teacher. Raises NodeInputError for one that shares the student's network but not its weights."""
        student = self.request.model
        if model.model is student.model and own_modules(student, model) is None:
            allowed = "the model itself, the model before Quantize, or one that was loaded by itself"
            remedy = "Put LoRAs on both or none, or load the teacher from another file: equal loaders hand out one model."
            raise input_error(where, "teacher", "the same loaded model with other weight patches", allowed, remedy)
        return ordinary_clone(model, self.settings["dtype"])

    def _feature_pairs(self, patcher: Any, features: dict) -> tuple:
        where = "Feature Loss"
        if not features["weight"]:
            return ()
        own_layout = block_layout(patcher.get_model_object("diffusion_model"), where)
        other_layout = block_layout(features["teacher"].get_model_object("diffusion_model"), where)
        own = parse_blocks(features["blocks"], own_layout, where)
        other = parse_blocks(features["teacher_blocks"], other_layout, where, "teacher_blocks")
        if len(own) != len(other):
            allowed = f"{len(own)} blocks, as many as blocks names"
            raise input_error(where, "teacher_blocks", features["teacher_blocks"], allowed, "Name one for each.")
        return tuple(zip(own, other))

    # What is told ------------------------------------------------------------------------------------------------------

    def _progress(self, done: int, steps: int, history: History) -> None:
        now = time.monotonic()
        if now - self._shown < SECONDS_BETWEEN_PICTURES and done < steps:
            return
        self._shown = now
        self.bar.update_absolute(done, steps, ("JPEG", self._shown_picture(history), 512))

    def _shown_picture(self, history: History) -> Any:
        """The loss curve, and under it the newest previews in a row."""
        from PIL import Image

        curve = _as_picture(curve_picture(history)[0])
        if not self.previewed:
            return curve
        side = curve.width // PREVIEWS
        whole = Image.new("RGB", (curve.width, curve.height + side), "white")
        whole.paste(curve)
        for place, preview in enumerate(self.previews):
            whole.paste(_as_picture(preview).resize((side - 4, side - 4)), (place * side, curve.height))
        return whole

    @torch.no_grad()
    def _preview(self, trainee: HostTrainee, done: int) -> None:
        """Pictures of the first prompts by 20 Euler steps, from noises that no step draws; also as PNG in the run's folder."""
        vae = self.settings.get("vae")
        if vae is None:
            return
        shape = self.trainer.data.latents[0].shape
        count = min(PREVIEWS, len(trainee.positive))
        x = torch.randn((count, *shape), generator=seeded(self.config.seed, "preview"))
        sigmas = torch.linspace(1.0, 0.0, PREVIEW_STEPS + 1)
        for sigma, following in zip(sigmas, sigmas[1:]):
            x = x + (following - sigma) * trainee.velocity(x, sigma.expand(count), list(range(count))).cpu()
        self.previews, self.previewed = vae.decode(trainee.model.process_latent_out(x)).detach().float().cpu().clone(), True
        for number, preview in enumerate(self.previews):
            content = BytesIO()
            _as_picture(preview).save(content, "PNG")
            write_whole(self.folder.path / f"preview-{done:06d}-{number}.png", content.getvalue())

    def _keep_lora(self) -> None:
        from safetensors.torch import save

        metadata = {"format": "pt", "steps": str(self.trainer.done), "rectiflow": json.dumps(self.config.as_dict())}
        write_whole(self.folder.path / "lora.safetensors", save(self.exported, metadata))

    def _memory_message(self, error: Exception) -> str:
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        measured = f" (peak {peak:.1f} GiB)" if peak else ""
        return (
            f"{WHERE}: out of memory{measured}. What was done is kept and a new run goes on from there. "
            "Lower batch and raise accumulate, switch checkpointing on, or choose a smaller rank or fewer layers in Train Parameters. "
            f"({error})"
        )

    def _results(self, seconds: float) -> tuple:
        trainer, history = self.trainer, self.trainer.history
        best = history.best()
        report = {
            "steps": trainer.done, "steps_in_all": self.config.steps, "seconds": round(seconds, 3),
            "mean_loss": _number(history.mean_loss()),
            "validation": best and {"step": best.step, "mean": best.mean, "bins": best.bins},
            "straightness": [dataclasses.asdict(record) for record in history.straightness],
            "parameters": sum(value.numel() for value in trainer.params.values()), "skipped": sum(step.skipped for step in history.steps),
            "dropout": self.config.dropout, "density": self.config.density.describe(), "folder": self.folder.path.name, "notes": self.notes,
        }  # fmt: skip
        model, tensors = with_learnt(self.request.model, self.exported)
        model = self.services.with_lora(model, tensors)
        losses = {"loss": [step.loss for step in history.steps]}
        return (model, self.exported, losses, curve_picture(history), self.previews, json.dumps(report, indent=1), trainer.done)


def ordinary_clone(model: Any, dtype: str) -> Any:
    """A frozen clone whose weights autograd can meet."""
    clone = model.clone()
    clone.set_model_compute_dtype(torch.bfloat16 if dtype == "bf16" else torch.float32)
    trainable_weights(clone)
    return clone


def _as_picture(pixels: Tensor) -> Any:
    """(h, w, 3) in 0…1 as a PIL picture."""
    from PIL import Image

    return Image.fromarray((pixels.clamp(0.0, 1.0) * 255.0).round().byte().numpy())


def _number(value: float) -> float | None:
    return value if value == value else None


def run_training(request: TrainRequest, services: Services) -> tuple:
    """MODEL, LoRA tensors, losses, curve IMAGE, preview IMAGE, report, steps done. What interrupts or fails is raised after saving."""
    return Session(request, services).run()
