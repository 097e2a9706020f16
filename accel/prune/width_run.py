"""A table of widths by timestep on a MODEL: APPLY_MODEL says which bucket a call is in, a function around every block makes it so narrow.

    mask    the layers that read heads and channels get zeros in place of those that are off: full cost, whatever the layers are
    slice   a copy of the block with narrower layers, made from the weights that lie on it when a bucket begins, and dropped with it: one
            bucket's copies are held at a time

A block that keeps everything runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import input_error
from ...families.cost import forward_cost
from ...families.stack import StackBlock, State
from ...families.tokens import token_spec
from ...families.width import WidthGroup
from ..attention.dispatch import RUN as ATTENTION_RUN
from ..attention.rettention import RettentionHandler
from ..region.binding import RUN as REGION_RUN
from ..region.grid import TokenGrid
from .apply import stack_under
from .compact import is_plain, layer_cuts, narrow_fields, narrow_layer
from .gates import gate_blocks
from .identity import model_hash
from .timestep_width import Contributions, Key, WidthTable, bucket_of, slice_bytes, solved, time_groups, unit_flops, whole_flops

__all__ = ["EXECS", "apply_width_table", "made_table", "with_units"]

EXECS = ("slice", "mask")
APPLY, OUTER = "apply_model", "outer_sample"
WRAPPER = "rectiflow_timestep_width"


def made_table(
    model: Any, sample: Callable[[Any, Tensor], Any], shape: tuple, text: int, buckets: int, target: float, where: str
) -> WidthTable:  # fmt: skip
    """The table of MODEL for a mean of `target` FLOPs.

    sample(model, sigmas): a run on these sigmas; shape: of its latents; text: tokens of its conditions in the mean.

    Raises: NodeInputError for a family whose units are not known, or a target out of reach.
    """
    groups = time_groups(model, where)
    network = model.get_model_object("diffusion_model")
    spec = token_spec(network, where)
    image = TokenGrid.of(shape[2:], spec.patch, where).count
    cost = {group.key: unit_flops(group, network, spec.family, image, text) for group in groups}
    whole = whole_flops(forward_cost(network, spec), image, text)
    counts = {group.key: group.count for group in groups}
    facts = (spec.family, model_hash(model))
    if target >= 1.0:
        return WidthTable(*facts, ({},) * buckets, (1.0,) * buckets, counts)
    seen = Contributions(groups, buckets)
    watched = gate_blocks(model, stack_under(model, where).blocks, seen)

    def watch(executor, x, t, *args, **kwargs):
        seen.sigma = float(t.flatten()[0])
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            seen.sigma = None

    watched.add_wrapper_with_key(APPLY, WRAPPER, watch)
    middles = (torch.arange(buckets, 0, -1) - 0.5) / buckets
    with seen.on(network):
        sample(watched, torch.cat((torch.ones(1), middles, torch.zeros(1))))
    unseen = {group.name for group in groups} - {f"{path}.{kind}" for _, (path, kind), _ in seen.energies}
    if unseen:
        got = f"{sorted(unseen)[0]}, whose layers another node has exchanged"
        raise input_error(where, "model", got, "layers as they were loaded", "Make the table of the model before that node.")
    kept, flops = solved([seen.scores(place) for place in range(buckets)], groups, cost, whole, target, where)
    return WidthTable(*facts, kept, flops, counts, max(slice_bytes(left, groups, network) for left in kept))


def apply_width_table(model: Any, table: WidthTable, how: str, where: str) -> Any:
    """A clone of MODEL `model` that is as narrow at each sigma as `table` says.

    Raises: NodeInputError for another way, another model's table, or a second one.
    """
    if how not in EXECS:
        raise input_error(where, "exec", how, ", ".join(EXECS), "Choose one of these.")
    if table.model != model_hash(model):
        raise input_error(where, "table", "a table of another model", "one of this model", "Make it again with Timestep Width Table.")
    if model.wrappers.get(APPLY, {}).get(WRAPPER):
        raise input_error(where, "model", "a model with a table of widths", "a model without one", "Keep one of these nodes.")
    if not any(table.kept):
        return model.clone()
    return with_units(model, time_groups(model, where), lambda sigma: (bucket_of(sigma, table.buckets), table.at(sigma)), how, where)


def with_units(model: Any, groups: tuple[WidthGroup, ...], kept_at: Callable, how: str, where: str) -> Any:
    """A clone whose blocks keep `kept_at(sigma)` → (name of the state, (block path, kind) → units) of `groups`."""
    width = _Width(groups, model.get_model_object("diffusion_model"), how, where)
    paths = {group.path for group in groups}
    patched = gate_blocks(model, [block for block in stack_under(model, where).blocks if block.path in paths], width)

    def call(executor, x, t, *args, **kwargs):
        options = kwargs.get("transformer_options") or next((part for part in reversed(args) if isinstance(part, dict)), {})
        sigmas = t.flatten()
        if bool((sigmas != sigmas[0]).any()):
            raise input_error(where, "model", "calls at several sigmas in one batch", "one sigma a call", "Use another sampler.")
        width.refuse(options)
        before = width.begin(*kept_at(float(sigmas[0])))
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            width.kept = before

    def run(executor, *args, **kwargs):
        try:
            return executor(*args, **kwargs)
        finally:
            width.drop()

    patched.add_wrapper_with_key(APPLY, WRAPPER, call)
    patched.add_wrapper_with_key(OUTER, WRAPPER, run)
    return patched


class _Width:
    """Computes blocks as narrow as the running call's bucket says; outside of a call they run as they are."""

    def __init__(self, groups: tuple[WidthGroup, ...], network: nn.Module, how: str, where: str):
        self.network, self.how, self.where = network, how, where
        self.groups: dict[str, list[WidthGroup]] = {}
        for group in groups:
            self.groups.setdefault(group.path, []).append(group)
        self.kept: Mapping[Key, tuple[int, ...]] = {}
        self.name: Any = None
        self.blocks: dict[str, nn.Module] = {}
        self.masks: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __deepcopy__(self, memo) -> _Width:
        return self

    def begin(self, name: Any, kept: Mapping[Key, tuple[int, ...]]) -> Mapping[Key, tuple[int, ...]]:
        """Enter a call of the state `name`; what an earlier one made is dropped. Returns what was kept before."""
        if name != self.name:
            self.drop()
            self.name = name
        before, self.kept = self.kept, kept
        return before

    def drop(self) -> None:
        self.blocks.clear()
        self.masks.clear()
        self.name = None

    def refuse(self, options: dict) -> None:
        """Raises: NodeInputError where keys or residuals of all heads are kept from step to step beside slices."""
        region, handlers = options.get(REGION_RUN), getattr(options.get(ATTENTION_RUN), "handlers", ())
        keeps = region is not None and region.store is not None or any(isinstance(handler, RettentionHandler) for handler in handlers)
        if self.how == "slice" and keeps:
            got = "slice, with a node that keeps keys or residuals of every head"
            raise input_error(self.where, "exec", got, "mask beside Region-Adaptive Sampling and Re-ttention", "Choose mask.")

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        mine = {group.key: self.kept[group.key] for group in self.groups[block.path] if group.key in self.kept}
        if not mine:
            return run()
        if self.how == "mask":
            with self._masked(block.path, mine):
                return run()
        if block.path not in self.blocks:
            self.blocks[block.path] = self._narrow(block.path, mine)
        return run(state, self.blocks[block.path])

    @contextmanager
    def _masked(self, path: str, kept: Mapping[Key, tuple[int, ...]]) -> Iterator[None]:
        layers: dict[str, list] = {}
        for group in self.groups[path]:
            for span in group.columns if group.key in kept else ():
                layers.setdefault(span.layer, []).append((group, span))
        with ExitStack() as hooks:
            for name, parts in layers.items():
                hooks.enter_context(self.network.get_submodule(name).register_forward_pre_hook(self._mask(name, parts, kept)))
            yield

    def _mask(self, name: str, parts: list, kept: Mapping[Key, tuple[int, ...]]) -> Callable:
        def zero(layer: nn.Module, args: tuple) -> tuple:
            x = args[0]
            mask = self.masks.get((name, x.device, x.dtype))
            if mask is None:
                mask = x.new_ones(x.shape[-1])
                for group, span in parts:
                    on = x.new_zeros(group.count)
                    on[list(kept[group.key])] = 1.0
                    mask[span.start : span.start + group.count * span.size] = on.repeat_interleave(span.size)
                self.masks[name, x.device, x.dtype] = mask
            return (x * mask, *args[1:])

        return zero

    def _narrow(self, path: str, kept: Mapping[Key, tuple[int, ...]]) -> nn.Module:
        """A copy of the block with narrower layers in the places of those that lose units; all else is the block's own."""
        block = self.network.get_submodule(path)
        made = _copy(block)
        made.__dict__.pop("forward", None)  # the function around the block, which called us
        copies: dict[str, nn.Module] = {"": made}

        def holder(name: str) -> nn.Module:
            """The copy of the module at `name` below the block, made with those above it."""
            if name not in copies:
                above, _, last = name.rpartition(".")
                copies[name] = holder(above)._modules[last] = _copy(holder(above)._modules[last])
            return copies[name]

        for name, cut in layer_cuts(kept, self.groups[path], self.network.get_submodule).items():
            layer = self.network.get_submodule(name)
            if not is_plain(layer) or getattr(layer, "weight_function", None) or getattr(layer, "bias_function", None):
                got = f"slice, with {name}, a {type(layer).__name__} that is packed or has functions on its weight"
                raise input_error(self.where, "exec", got, "slice with plain layers, mask with any", "Choose mask.")
            above, _, last = name.removeprefix(f"{path}.").rpartition(".")
            holder(above)._modules[last] = narrow_layer(layer, layer.weight, layer.bias, cut)
        for name, value in narrow_fields({key: len(units) for key, units in kept.items()}, self.groups[path]).items():
            above, _, last = name.removeprefix(f"{path}.").rpartition(".")
            holder(above).__dict__[last] = value
        return made


def _copy(module: nn.Module) -> nn.Module:
    """Another module of the same class with the same members, whose children can be exchanged."""
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__["_modules"] = dict(module._modules)
    return made
