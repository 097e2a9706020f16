"""One owner of a model's attention override: nodes hang handlers on it, and each attention of each layer is offered to them in turn.

The host has one slot and tells it neither layer nor grid. Here OUTER_SAMPLE opens a run and drops it in `finally`; APPLY_MODEL, where some
handler is active at the call's sigma, puts into a copy of the call's options the override and a patch around every block, which tags a copy
of that block's options and calls the original. Else the call passes untouched, so that off is off to the last bit.

An override that was there before is kept: it gets what no handler takes, and what a handler asks of the default. One that changes tensors
and then calls on, such as RF-Edit's, says so by the attribute `rectiflow_passes_on` and stands before the handlers.

NextDiT has no block patches: its attentions are counted within a call, the refiners' first. HunyuanVideo has text behind the image, and
tokens of a reference picture in front. A call over part of the tokens (RAS between its dense steps) passes untouched,
and so do blocks whose tokens are merged (mixed grains).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ...errors import input_error
from ...families.blocks import BlockKey
from ...families.tokens import TokenSpec, attention_spec
from ..region.binding import RUN as REGION_RUN
from ..region.cells import BLOCK as GRAIN_BLOCK
from ..region.grid import TokenGrid
from ..runs import held_in_options
from .heads import apart, joined

__all__ = ["AttentionCall", "Handler", "Plan", "RunFacts", "attach", "detach"]

KEY = "rectiflow_attention"
RUN, TAG = "rectiflow_attention_run", "rectiflow_attention_layer"
OUTER, APPLY = "outer_sample", "apply_model"
PASSES_ON = "rectiflow_passes_on"
LAYER = "layer"  # of families without block patches: ("layer", i)


@dataclass(frozen=True)
class RunFacts:
    """sigmas: of the whole run; shape: of the noise; spec, transformer: the model's; device: where it runs."""

    sigmas: tuple[float, ...]
    shape: tuple[int, ...]
    spec: TokenSpec
    transformer: Any
    device: torch.device


@dataclass
class AttentionCall:
    """One attention over image tokens, with text before or behind them where the family joins the two.

    q, k, v: (b, h, n, d), n = text + image + extra tokens: text being those in front of the image, extra those behind it, of reference
    pictures; in HunyuanVideo the other way round. sides: the image's tokens along each axis. layer, place: the block, and which of its
    attentions this is. keys: (uuid, kind) of each part of the batch; window: frames of a context window, or None. rotations: the 2×2
    matrices that q and k were turned by, (b or 1, 1, n, d/2, 2, 2), where a family gives them to its blocks.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    text: int
    sides: tuple[int, ...]
    extra: int
    layer: BlockKey
    place: int
    sigma: float
    keys: tuple[tuple[Any, int], ...]
    default: Callable[..., torch.Tensor]  # default(q, k, v, mask) → (b, h, n, d), what would have run
    window: tuple[int, ...] | None = None
    rotations: torch.Tensor | None = None


class Handler(Protocol):
    """What a node does with attention during one run.

    One that answers every attention, so that none would be left to another, says who it is by an attribute `alone`; a run with it and
    another handler is refused.
    """

    def active(self, sigma: float) -> bool:
        """Whether it takes part in model calls at this sigma."""
        ...

    def attend(self, call: AttentionCall) -> torch.Tensor | None:
        """(b, h, n, d), or None to leave the call to the next handler."""
        ...

    def close(self) -> None:
        """The run is over, well or not: drop every tensor, finish the report."""
        ...


class Plan(Protocol):
    """Settings of a node: frozen, without tensors."""

    def open(self, facts: RunFacts) -> Handler: ...


@dataclass
class _Run:
    spec: TokenSpec
    refiners: int
    handlers: list[Handler] = field(default_factory=list)
    inside: bool = False


@dataclass
class _Layer:
    """A block while it runs. text: tokens in front of the image in its attention; None where they are counted from the length.

    rotations: its rotary table as the host gives it, None where it gives none.
    """

    key: BlockKey
    text: int | None
    rotations: Any = None
    calls: int = 0

    def rotations_of(self, q: torch.Tensor) -> torch.Tensor | None:
        """The table for q (b, h, n, d), heads in the second axis; None where there is none of this size."""
        table = self.rotations
        if not isinstance(table, torch.Tensor) or table.ndim != 6 or table.shape[-2:] != (2, 2):
            return None
        if table.shape[1] != 1:  # Wan's has the axis of heads behind the tokens
            table = table.transpose(1, 2)
        return table if table.shape[1:4] == (1, q.shape[2], q.shape[3] // 2) else None


def attach(model: Any, plan: Plan, where: str) -> Any:
    """A clone of MODEL `model` on which `plan` opens a handler for every run; plans that come first are asked first.

    Raises: NodeInputError for a family whose attention is not known here.
    """
    attention_spec(model.get_model_object("diffusion_model"), where)
    patched = model.clone()

    def around_run(executor, *args, **kwargs):
        return _sampling(plan, where, executor, args, kwargs)

    patched.add_wrapper_with_key(OUTER, KEY, around_run)
    if not model.wrappers.get(APPLY, {}).get(KEY):
        patched.add_wrapper_with_key(APPLY, KEY, _model_call)
    return patched


def detach(model: Any) -> Any:
    """A clone of MODEL `model` without any of our handlers."""
    bare = model.clone()
    for kind in (OUTER, APPLY):
        bare.remove_wrappers_with_key(kind, KEY)
    return bare


def _sampling(plan: Plan, where: str, executor: Any, args: tuple, kwargs: dict) -> Any:
    guider = executor.class_obj
    patcher = guider.model_patcher
    transformer = patcher.get_model_object("diffusion_model")
    spec = attention_spec(transformer, where)
    noise = kwargs["noise"] if "noise" in kwargs else args[0]
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    facts = RunFacts(tuple(sigmas.tolist()), tuple(noise.shape), spec, transformer, torch.device(patcher.load_device))
    before: _Run | None = guider.model_options.get("transformer_options", {}).get(RUN)
    refiners = sum(len(getattr(transformer, name, ())) for name in ("context_refiner", "noise_refiner"))
    run = before if before is not None else _Run(spec, refiners)
    handler = plan.open(facts)
    run.handlers.append(handler)
    try:
        _refuse_company(run.handlers, where)
        with held_in_options(guider, RUN, run):
            return executor(*args, **kwargs)
    finally:
        run.handlers.remove(handler)
        handler.close()


def _refuse_company(handlers: Sequence[Handler], where: str) -> None:
    alone = next((handler.alone for handler in handlers if getattr(handler, "alone", "")), "")
    if alone and len(handlers) > 1:
        got = f"another node that takes over its attention, beside {alone}"
        raise input_error(where, "model", got, "one of them", "Take one of the two out, or set apply_to to all.")


def _model_call(executor, *args, **kwargs):
    """x and t stand first; the options are a keyword, or the last dictionary among the arguments."""
    place = None
    options = kwargs.get("transformer_options")
    if options is None:
        place = next((i for i in range(len(args) - 1, -1, -1) if isinstance(args[i], dict)), None)
        options = {} if place is None else args[place]
    run: _Run | None = options.get(RUN)
    region = options.get(REGION_RUN)
    if run is None or run.inside or region is not None and region.phase == "active":
        return executor(*args, **kwargs)
    sigma = float(args[1].flatten()[0])
    handlers = [handler for handler in run.handlers if handler.active(sigma)]
    if not handlers or bool((args[1] != args[1].flatten()[0]).any()):
        return executor(*args, **kwargs)
    changed = _Call(run, handlers, TokenGrid.of(args[0].shape[2:], run.spec.patch, "attention"), sigma, options).options()
    run.inside = True  # a host that merges wrappers twice calls this function within itself
    try:
        if place is None:
            return executor(*args, **{**kwargs, "transformer_options": changed})
        return executor(*args[:place], changed, *args[place + 1 :], **kwargs)
    finally:
        run.inside = False


class _Call:
    """One model call: the hooks that are in its options, and what they learn while it runs."""

    def __init__(self, run: _Run, handlers: Sequence[Handler], grid: TokenGrid, sigma: float, options: dict[str, Any]):
        self.run, self.handlers, self.grid, self.sigma, self.given = run, handlers, grid, sigma, options
        self.image = math.prod(grid.sides)
        self.text = 0
        self.counted = 0

    def options(self) -> dict[str, Any]:
        """The call's options with our hooks in; the given ones and those in them stay as they are."""
        changed = dict(self.given)
        replace = dict(changed.get("patches_replace", {}))
        blocks = dict(replace.get("dit", {}))
        for key in self.run.spec.blocks:
            blocks[key] = self._tagging(key, blocks.get(key))
        if self.run.spec.blocks:
            replace["dit"] = blocks
            changed["patches_replace"] = replace
        changed["optimized_attention_override"] = self._override(changed.get("optimized_attention_override"))
        return changed

    def _tagging(self, key: BlockKey, earlier: Callable | None) -> Callable:
        def block(args: dict, extra: dict, **more) -> dict:
            if args.get("txt") is not None and self.run.spec.text_inside:
                last = self.run.spec.text_last
                self.text = args["img"].shape[1] - self.image if last else args["txt"].shape[1]
            tagged = {**(args.get("transformer_options") or {}), TAG: _Layer(key, self.text, args.get("pe"))}
            args = {**args, "transformer_options": tagged}
            return extra["original_block"](args) if earlier is None else earlier(args, extra, **more)

        return block

    def _override(self, earlier: Callable | None) -> Callable:
        passes_on = earlier is not None and getattr(earlier, PASSES_ON, False)

        def attention(func: Callable, *args, **kwargs):
            if passes_on:
                return earlier(lambda *a, **k: self._attend(func, a, k), *args, **kwargs)
            backend = func if earlier is None else lambda *a, **k: earlier(func, *a, **k)
            return self._attend(backend, args, kwargs)

        return attention

    def _layer(self, options: dict) -> _Layer | None:
        if self.run.spec.blocks:
            return None if GRAIN_BLOCK in options else options.get(TAG)  # merged tokens are no grid
        self.counted += 1
        number = self.counted - 1 - self.run.refiners
        return None if number < 0 else _Layer((LAYER, number), None)

    def _attend(self, backend: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        layer = self._layer(kwargs.get("transformer_options") or {})
        found = None if layer is None else apart(backend, args, kwargs)
        if found is None:
            return backend(*args, **kwargs)
        place, layer.calls = layer.calls, layer.calls + 1
        q, k, v, mask, default = found
        tokens = q.shape[2]
        text = 0 if place else tokens - self.image if layer.text is None else layer.text
        extra = tokens - text - self.image
        if not q.shape == k.shape == v.shape or text < 0 or extra < 0 or place and not self.run.spec.text_inside:
            return backend(*args, **kwargs)

        keys = tuple(zip(self.given.get("uuids") or (None,), self.given.get("cond_or_uncond") or (0,)))
        window = getattr(self.given.get("context_window"), "index_list", None)
        window = None if window is None else tuple(window)
        turned = layer.rotations_of(q)
        call = AttentionCall(q, k, v, mask, text, self.grid.sides, extra, layer.key, place, self.sigma, keys, default, window, turned)
        for handler in self.handlers:
            out = handler.attend(call)
            if out is not None:
                return joined(out, kwargs)
        return backend(*args, **kwargs)

