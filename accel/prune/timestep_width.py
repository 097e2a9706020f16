"""Width by timestep without training: which heads and which groups of hidden channels each block keeps at which sigma.

DyDiT ("Dynamic Diffusion Transformer", arXiv 2410.03456) learns two linear maps from the time embedding to a logit a head and a channel
group; as the masks depend on time alone they are a table, and every step is a network of fixed shape. Here no router is trained: a unit u
of a block is ranked in each bucket of sigma by what it adds,

    s_u = r · ‖W_u x_u‖ / ‖(W_1 x_1, …, W_U x_U)‖        x_u: what the reading layer gets of the unit, W_u: its columns
    r   = ‖block(h) − h‖ / ‖h‖                           what the block adds to its tokens, gates included

over the tokens of a calibration run with one evaluation a bucket and one more at sigma 1. Over all buckets together the units with the
least s_u² per FLOP go until the mean FLOPs of the buckets are the target. As in DyDiT the hidden channels form as many groups as there are
heads (a divisor of their number), and no layer loses all; DyDiT fixes its first unit, here the strongest one stays. Experimental: models
that were not fine-tuned for it degrade.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import input_error
from ...families.cost import ForwardCost, forward_cost, token_kind
from ...families.stack import StackBlock, State
from ...families.tokens import token_spec
from ...families.width import Span, WidthGroup
from .compact import NarrowWeights, layer_cuts
from .width import groups_of

__all__ = ["Contributions", "WidthTable", "bucket_of", "slice_bytes", "solved", "time_groups", "unit_flops", "whole_flops"]

Key = tuple[str, str]  # block path, kind of units


def bucket_of(sigma: float, buckets: int) -> int:
    """0 … buckets − 1, even shares of sigma from 0 to 1."""
    return min(max(int(sigma * buckets), 0), buckets - 1)


@dataclass(frozen=True)
class WidthTable:
    """kept: for each bucket of sigma from 0 up, (block path, kind) → units that stay, of those that do not stay whole.

    model: hash of the model it was made on. flops: of each bucket's network, 1 being the whole one. slice_bytes: what the narrower layers
    of one bucket take, of the one where they take most.
    """

    family: str
    model: str
    kept: tuple[Mapping[Key, tuple[int, ...]], ...]
    flops: tuple[float, ...]
    counts: Mapping[Key, int] = field(default_factory=dict)
    slice_bytes: int = 0

    @property
    def buckets(self) -> int:
        return len(self.kept)

    def at(self, sigma: float) -> Mapping[Key, tuple[int, ...]]:
        return self.kept[bucket_of(sigma, self.buckets)]

    def text(self) -> str:
        head = f"{self.family}, {self.buckets} buckets of sigma: {sum(self.flops) / self.buckets:.1%} of the FLOPs in the mean"
        rows = []
        for place in reversed(range(self.buckets)):
            shares = {}
            for heads, name in ((True, "heads"), (False, "channel groups")):
                mine = {key: count for key, count in self.counts.items() if key[1].startswith("heads") == heads}
                left = sum(len(self.kept[place].get(key, range(count))) for key, count in mine.items())
                shares[name] = f"{left} of {sum(mine.values())} {name}"
            low, high = place / self.buckets, (place + 1) / self.buckets
            rows.append(f"sigma {low:.2f} to {high:.2f}: {', '.join(shares.values())}; {self.flops[place]:.1%} of the FLOPs")
        return "\n".join([head, *rows, f"as slices: {self.slice_bytes / 2**20:.1f} MiB beside the model at most"])


def time_groups(model: Any, where: str) -> tuple[WidthGroup, ...]:
    """Heads, and hidden channels in groups, of every block of MODEL.

    Raises: NodeInputError for a family whose tokens or units are not known, or a model that is narrow already.
    """
    if any(isinstance(patch, NarrowWeights) for patch in model.object_patches.values()):
        remedy = "Link the model before Compact Width; its mask and a table can be on one model."
        raise input_error(where, "model", "a model with narrower layers", "a model of full width", remedy)
    network = model.get_model_object("diffusion_model")
    heads = forward_cost(network, token_spec(network, where)).attentions[0].heads
    return tuple(group if group.is_heads else _coarser(group, heads) for group in groups_of(model, where))


def _coarser(group: WidthGroup, heads: int) -> WidthGroup:
    count = next(count for count in range(min(heads, group.count), 0, -1) if group.count % count == 0)
    each = group.count // count

    def spans(fine: tuple[Span, ...]) -> tuple[Span, ...]:
        return tuple(replace(span, size=span.size * each) for span in fine)

    fields = tuple((name, size * each) for name, size in group.fields)
    return replace(group, count=count, rows=spans(group.rows), columns=spans(group.columns), fields=fields)


def unit_flops(group: WidthGroup, network: nn.Module, family: str, image: int, text: int) -> float:
    """What one unit of the group costs in one sample's call."""
    seen = {"image": image, "text": text, "joint": image + text, "vector": 1}
    tokens = {span.layer: seen[token_kind(family, span.layer)] for span in (*group.rows, *group.columns)}
    rows = sum(2.0 * span.size * network.get_submodule(span.layer).in_features * tokens[span.layer] for span in group.rows)
    columns = sum(2.0 * span.size * network.get_submodule(span.layer).out_features * tokens[span.layer] for span in group.columns)
    length = image if group.kind == "heads2" else image + text
    return rows + columns + (4.0 * length * length * group.columns[0].size if group.is_heads else 0.0)


@dataclass
class Contributions:
    """What units add in each bucket, gathered while the model runs: hooks on the layers that read them, and a handler of gate_blocks.

    sigma: of the running call, set from outside; None lets everything pass.
    """

    groups: tuple[WidthGroup, ...]
    buckets: int
    sigma: float | None = None
    energies: dict[tuple[int, Key, str], Tensor] = field(default_factory=dict)
    changes: dict[tuple[int, str], list[float]] = field(default_factory=dict)

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        with ExitStack() as hooks:
            for group in self.groups:
                for span in group.columns:
                    hooks.enter_context(network.get_submodule(span.layer).register_forward_pre_hook(self._reader(group, span)))
            yield

    def _reader(self, group: WidthGroup, span: Span) -> Callable:
        def read(layer: nn.Module, args: tuple) -> None:
            if self.sigma is None:
                return
            end = span.start + group.count * span.size
            x = args[0].detach()[..., span.start : end].unflatten(-1, (group.count, span.size)).float()
            weight = layer.weight.detach()[:, span.start : end].to(x).unflatten(-1, (group.count, span.size))
            energy = torch.stack([F.linear(x[..., u, :], weight[:, u]).square().sum() for u in range(group.count)]).double().cpu()
            key = (bucket_of(self.sigma, self.buckets), group.key, span.layer)
            self.energies[key] = self.energies.get(key, 0.0) + energy

        return read

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        before = [tokens.detach().clone() for tokens in state]
        out = run()
        if self.sigma is not None:
            pairs = [(old, new) for old, new in zip(before, out) if new is not None]
            moved = math.sqrt(sum(float((new - old).float().square().sum()) for old, new in pairs))
            size = math.sqrt(sum(float(old.float().square().sum()) for old, _ in pairs))
            self.changes.setdefault((bucket_of(self.sigma, self.buckets), block.path), []).append(moved / max(size, 1e-12))
        return out

    def scores(self, bucket: int) -> dict[Key, Tensor]:
        """s_u of every group that ran in this bucket, (count,)."""
        found: dict[Key, list[Tensor]] = {}
        for (place, key, _), energy in self.energies.items():
            if place == bucket:
                found.setdefault(key, []).append((energy / energy.sum().clamp_min(1e-30)).sqrt())
        means = {place: sum(values) / len(values) for place, values in self.changes.items()}
        return {key: torch.stack(shares).mean(dim=0) * means[bucket, key[0]] for key, shares in found.items()}


def solved(
    scores: list[Mapping[Key, Tensor]], groups: tuple[WidthGroup, ...], cost: Mapping[Key, float], whole: float, target: float, where: str
) -> tuple[tuple[dict[Key, tuple[int, ...]], ...], tuple[float, ...]]:
    """(kept units, FLOPs share) of every bucket for a mean share of `target`; see the head of this file.

    scores: of each bucket. cost: FLOPs of one unit; whole: of the whole network.

    Raises: NodeInputError for a target that the units cannot reach.
    """
    order = []
    for place, found in enumerate(scores):
        for number, group in enumerate(groups):
            if group.key not in found:
                continue
            strongest = int(found[group.key].argmax())
            values = (found[group.key].square() / cost[group.key]).tolist()
            order += [(value, place, number, unit) for unit, value in enumerate(values) if unit != strongest]
    budget = (1.0 - target) * whole * len(scores)
    gone: list[dict[Key, set[int]]] = [{} for _ in scores]
    saved = [0.0] * len(scores)
    for _, place, number, unit in sorted(order):
        key = groups[number].key
        if cost[key] > budget - sum(saved) + 1e-6 * whole:
            continue
        gone[place].setdefault(key, set()).add(unit)
        saved[place] += cost[key]
    if budget - sum(saved) > 0.02 * whole * len(scores):
        least = 1.0 - sum(saved) / (whole * len(scores))
        allowed = f"{least:.2f} or more: the rest of this model's FLOPs is not in heads and hidden channels"
        raise input_error(where, "target_flops", target, allowed, "Raise it.")
    counts = {group.key: group.count for group in groups}
    kept = tuple(
        {key: tuple(unit for unit in range(counts[key]) if unit not in units) for key, units in found.items()} for found in gone
    )  # fmt: skip
    return kept, tuple(1.0 - part / whole for part in saved)


def slice_bytes(kept: Mapping[Key, tuple[int, ...]], groups: tuple[WidthGroup, ...], network: nn.Module) -> int:
    """Of the narrower layers of one bucket."""
    total = 0
    for name, cut in layer_cuts(kept, groups, network.get_submodule).items():
        layer = network.get_submodule(name)
        rows, columns = cut.shape(layer)
        total += (rows * columns + (0 if layer.bias is None else rows)) * layer.weight.element_size()
    return total


def whole_flops(cost: ForwardCost, image: int, text: int) -> float:
    return cost.linear(image, text) + cost.attention(image, text)
