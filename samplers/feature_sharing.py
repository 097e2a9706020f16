"""RF-Edit: attention values of an inversion, kept and put back while the edit is drawn, so that the new picture keeps the old one's layout.

"Taming Rectified Flow for Inversion and Editing", arXiv 2411.04746. Over the last intervals of the inversion (those nearest noise) V of
chosen blocks is kept; over the first `inject_steps` intervals of the edit it takes the place of the fresh V, while Q and K stay those of
the new prompt:

    A = softmax(Q·Kᵀ/√d)·V'      V' = V + strength·(V_source − V)

What we do differently: an evaluation is named by its interval and its place in it (first, mid, last), never by a sigma in print; values
that do not fit under the cap, or that an earlier edit has used up, are made again from the state of the inversion, which is small, at one
model call an evaluation. So a bank can be dropped after every run, and a graph whose inversion comes from the cache still edits.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ..errors import input_error
from ..families.blocks import BlockKey, BlockLayout, block_layout, parse_blocks
from .attention_values import ValueHook, ValueVisit
from .inversion import INVERTERS, sampling_sigmas
from .walk import check_sigmas

__all__ = ["EDIT_SOLVERS", "FeatureBank", "RecordPlan", "ReplayPlan", "sample_rf_edit"]

RECORDER, REPLAYER = "Flow Invert", "RF-Edit Sampler"
Place = tuple[int, str]  # interval of the rising schedule, and "first", "mid" or "last" seen from its lower end

# The solver that draws the edit after each inversion; uni_inv and fixed_point undo Euler's steps.
EDIT_SOLVERS = MappingProxyType({name: "euler" if name in ("uni_inv", "fixed_point") else name for name in INVERTERS})


@dataclass(frozen=True)
class RecordPlan:
    """save_steps: last intervals of the inversion that are kept; blocks: see parse_blocks; store: "cpu" or "device"; cap: bytes."""

    save_steps: int = 0
    blocks: str = "single:20-37"
    store: str = "cpu"
    cap: int = 8 << 30


@dataclass(frozen=True)
class ReplayPlan:
    """match: "interval" puts values back in the interval they were kept in, as released, "exact_sigma" at the sigma they were kept at;
    tokens: "all" or "image_only"; rows: "cond" or "cond_and_uncond"; strength: 0 keeps the fresh values, 1 replaces them."""

    inject_steps: int = 3
    match: str = "interval"
    tokens: str = "all"
    rows: str = "cond_and_uncond"
    strength: float = 1.0


class FeatureBank:
    """What an inversion leaves for an edit: values while they are held, and what it takes to make them again.

    Attributes:
        sigmas: the rising schedule, `(n + 1,)`.
        states: place → (state `(b, …)` on the CPU, sigma there).
        values: place → block → V of the positive condition, `(b, heads, n, d)` or `(b, n, …)`.
    """

    def __init__(self, plan: RecordPlan, solver: str, options: dict[str, Any] | None = None):
        self.plan = plan
        self.solver = solver
        self.options = dict(options or {})
        self.sigmas = torch.zeros(0)
        self.blocks: tuple[BlockKey, ...] = ()
        self.layout: BlockLayout | None = None
        self.text: int | None = None
        self.axis = 2
        self.states: dict[Place, tuple[torch.Tensor, float]] = {}
        self.values: dict[Place, dict[BlockKey, torch.Tensor]] = {}
        self.source: list[dict] = []
        self.remade = 0
        self._expected = 0
        self._transformer: Callable[[], Any] = lambda: None

    @property
    def nbytes(self) -> int:
        """Bytes of the values held now."""
        return sum(v.nbytes for values in self.values.values() for v in values.values())

    def release(self) -> None:
        """Drop the values; the states stay, a few latents."""
        self.values.clear()

    def watch(self, model, sigmas: torch.Tensor) -> Recording:
        """The model that stands between an inversion's solver and its guider while this bank records."""
        guider = model.inner_model
        transformer = guider.inner_model.diffusion_model
        if self.plan.save_steps > len(sigmas) - 1:
            got, remedy = self.plan.save_steps, "Lower save_steps or invert in more steps."
            raise input_error(RECORDER, "save_steps", got, f"0 to {len(sigmas) - 1}, the steps of this inversion", remedy)
        self.layout = block_layout(transformer, RECORDER)
        self.blocks = parse_blocks(self.plan.blocks, self.layout, RECORDER)
        self.sigmas = sigmas.detach().cpu().clone()
        self.source = guider.conds["positive"]
        self._transformer = weakref.ref(transformer)
        return Recording(model, self)

    def keep(self, place: Place, visit: ValueVisit) -> None:
        """Store the positive condition's rows of one block, unless the cap is reached."""
        mine = [rows for kind, rows in visit.parts() if kind == 0]
        if not mine:
            return
        if len(mine) > 1 or visit.key in self.values.get(place, {}):
            remedy = "Connect one prompt without combined or regional parts."
            raise input_error(RECORDER, "source", "more than one condition at a sigma", "one condition", remedy)
        v = visit.v[mine[0]]
        self.text, self.axis = visit.text, visit.axis
        if not self._expected:
            self._expected = self._announce_memory(v)
        if self.nbytes + v.nbytes <= self.plan.cap:
            device = torch.device("cpu") if self.plan.store == "cpu" else v.device
            self.values.setdefault(place, {})[visit.key] = v.detach().to(device, copy=True)

    def _announce_memory(self, v: torch.Tensor) -> int:
        """Say before the first tensor is kept what all of them take."""
        per_step = 2 if self.solver in ("rf_solver", "heun") else 1
        expected = v.nbytes * len(self.blocks) * self.plan.save_steps * per_step
        rest = "" if expected <= self.plan.cap else "; what is above the cap is made again while editing, one model call an evaluation"
        logging.info(
            "Rectiflow: features of %d blocks over %d steps take %.1f MiB on %s, cap %.1f MiB%s",
            len(self.blocks), self.plan.save_steps, expected / 2**20, self.plan.store, self.plan.cap / 2**20, rest,
        )  # fmt: skip
        return expected

    def report(self) -> str:
        """One line: what is held."""
        steps = f"{self.plan.save_steps} of {max(len(self.sigmas) - 1, 0)} steps"
        return f"{self.solver}: {steps}, {len(self.blocks)} blocks, {len(self.values)} evaluations held, {self.nbytes / 2**20:.1f} MiB"

    def find(self, step: int, stage: str, match: str) -> Place | None:
        """Where values for the edit's evaluation were kept: `step` counts the falling schedule, `stage` its place in that step.

        interval: the same place of the same interval, as the released code, else the same sigma; exact_sigma: the same sigma only.
        """
        interval = len(self.sigmas) - 2 - step
        turned = {"first": "last", "last": "first", "mid": "mid"}[stage]
        neighbour = interval + 1 if stage == "first" else interval - 1
        same_sigma = [(interval, turned), *([] if stage == "mid" else [(neighbour, stage)])]
        wanted = same_sigma if match == "exact_sigma" else [(interval, stage), *same_sigma]
        return next((place for place in wanted if place in self.states), None)

    def check_run(self, sigmas: torch.Tensor, transformer: Any, batch: int, shape: torch.Size, plan: ReplayPlan) -> None:
        """Raises NodeInputError where an edit does not fit to what was recorded."""
        if plan.inject_steps > self.plan.save_steps:
            remedy = "Raise save_steps of Flow Invert, or lower inject_steps."
            raise input_error(REPLAYER, "inject_steps", plan.inject_steps, f"0 to {self.plan.save_steps}, what was saved", remedy)
        expected, given = sampling_sigmas(self.sigmas), check_sigmas(sigmas, REPLAYER)
        fits = given.shape == expected.shape and torch.equal(given[:-1], expected[:-1]) and given[-1] <= self.sigmas[0]
        if not fits:
            got = f"{len(given) - 1} steps from {float(given[0]) if len(given) else 0:g}"
            allowed = f"the inversion's own schedule: {len(expected) - 1} steps from {float(expected[0]):g}"
            raise input_error(REPLAYER, "sigmas", got, allowed, "Connect the SIGMAS that went into Flow Invert.")
        if self._transformer() is not transformer:
            remedy = "Link the same loaded model to Flow Invert and to the guider."
            raise input_error(REPLAYER, "features", "features of another model", "features of the model that runs", remedy)
        kept = next(iter(self.states.values()))[0].shape
        if kept[1:] != shape[1:] or kept[0] not in (1, batch):
            allowed = f"{tuple(kept)}, or any batch of it where one picture was inverted"
            raise input_error(REPLAYER, "latent", tuple(shape), allowed, "Edit at the size and batch that were inverted.")


class _Passing:
    """A model that stands before another one: what it does not know itself is asked there."""

    def __init__(self, model):
        self.model = model
        self.step, self.stage = 0, "first"

    def __getattr__(self, name: str):
        return getattr(self.__dict__["model"], name)

    def before_evaluation(self, step: int, stage: str) -> None:
        self.step, self.stage = step, stage


class Recording(_Passing):
    """Calls the model as ever, and in the last save_steps intervals lets the bank keep what its blocks see."""

    def __init__(self, model, bank: FeatureBank):
        super().__init__(model)
        self.bank = bank

    def __call__(self, x, sigma, model_options=None, **extra):
        bank, place = self.bank, (self.step, self.stage)
        if self.step < len(bank.sigmas) - 1 - bank.plan.save_steps:
            return self.model(x, sigma, model_options=model_options, **extra)
        bank.values.pop(place, None)  # a later iterate of a fixed point replaces the former
        bank.states[place] = (x.detach().cpu().clone(), float(sigma[0]))
        hook = ValueHook(bank.blocks, lambda visit: bank.keep(place, visit))
        denoised = self.model(x, sigma, model_options=hook.options(model_options), **extra)
        hook.check(RECORDER)
        return denoised


class Replaying(_Passing):
    """Calls the model with the bank's values in the first inject_steps intervals."""

    def __init__(self, model, bank: FeatureBank, plan: ReplayPlan, calc_cond_batch: Callable):
        super().__init__(model)
        self.bank, self.plan, self.calc_cond_batch = bank, plan, calc_cond_batch

    def __call__(self, x, sigma, model_options=None, **extra):
        place = self.bank.find(self.step, self.stage, self.plan.match) if self.step < self.plan.inject_steps else None
        if place is None:
            return self.model(x, sigma, model_options=model_options, **extra)
        values = self._values(place, x, model_options)
        hook = ValueHook(self.bank.blocks, lambda visit: self._replaced(visit, values[visit.key]))
        denoised = self.model(x, sigma, model_options=hook.options(model_options), **extra)
        hook.check(REPLAYER)
        return denoised

    def _values(self, place: Place, x: torch.Tensor, model_options: dict | None) -> dict[BlockKey, torch.Tensor]:
        """The values of `place`, made again from its state where the bank does not hold all of them."""
        held = self.bank.values.get(place, {})
        if len(held) == len(self.bank.blocks):
            return held
        made: dict[BlockKey, torch.Tensor] = {}

        def catch(visit: ValueVisit) -> None:
            made[visit.key] = visit.v.detach().clone()
            self.bank.text, self.bank.axis = visit.text, visit.axis

        hook = ValueHook(self.bank.blocks, catch)
        state, sigma = self.bank.states[place]
        state = state.to(x)
        options = hook.options(model_options)
        self.calc_cond_batch(self.model.inner_model.inner_model, [self.bank.source], state, state.new_full([len(state)], sigma), options)
        hook.check(REPLAYER)
        self.bank.remade += 1
        return made

    def _replaced(self, visit: ValueVisit, source: torch.Tensor) -> torch.Tensor:
        """V with the source's values in it; a new tensor."""
        source = source.to(visit.v)
        new_tokens, old_tokens = self._tokens(visit, source)
        out = visit.v.clone()
        for kind, rows in visit.parts():
            if kind != 0 and self.plan.rows == "cond":
                continue
            part = out[rows].narrow(visit.axis, *new_tokens)
            kept = source.narrow(visit.axis, *old_tokens).expand_as(part)
            part.copy_(kept if self.plan.strength == 1 else torch.lerp(part, kept, self.plan.strength))
        return out

    def _tokens(self, visit: ValueVisit, source: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """(start, length) of the tokens that are replaced, in the fresh and in the kept values."""
        new, old = visit.v.shape[visit.axis], source.shape[visit.axis]
        text = self.bank.layout.text
        if text == "apart" or self.plan.tokens == "all":
            if new != old:
                remedy = "Set tokens to image_only, or pad both prompts to the same length."
                raise input_error(REPLAYER, "tokens", f"{old} tokens kept, {new} in this run", "equal numbers of tokens", remedy)
            return (0, new), (0, old)
        if visit.text is None or self.bank.text is None:
            raise input_error(REPLAYER, "tokens", "image_only", "all: this model does not tell its text tokens", "Set tokens to all.")
        new_image, old_image = new - visit.text, old - self.bank.text
        if new_image != old_image:
            got, allowed = f"{new_image} image tokens", f"{old_image}, as kept"
            raise input_error(REPLAYER, "tokens", got, allowed, "Leave out nodes that drop or add tokens.")
        first = text == "first"
        return (visit.text if first else 0, new_image), (self.bank.text if first else 0, old_image)


@torch.no_grad()
def sample_rf_edit(model, x, sigmas, extra_args=None, callback=None, disable=None, *, bank: FeatureBank, plan: ReplayPlan, calc_cond_batch):
    """The inversion's own solver along its own schedule, falling, with the bank's values in the first `plan.inject_steps` steps.

    The bank's values are dropped when the run ends, however it ends. inject_steps 0 is the solver alone, bit for bit.

    Args:
        model: what a host's KSAMPLER or our GuiderModel hands to solvers; `model.inner_model` is the guider.
        calc_cond_batch: the host's function (model, conds, x, sigma, model_options) → denoised of each.
    """
    from .registry import SOLVERS

    solver = SOLVERS[EDIT_SOLVERS[bank.solver]].function
    options = bank.options if bank.solver == "rf_solver" else {}
    try:
        if plan.inject_steps > 0:
            bank.check_run(sigmas, model.inner_model.inner_model.diffusion_model, len(x), x.shape, plan)
            model = Replaying(model, bank, plan, calc_cond_batch)
        return solver(model, x, sigmas, extra_args, callback, disable, **options)
    finally:
        bank.release()
