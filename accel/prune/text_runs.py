"""The text of a run of double blocks as linear maps (the width distillation of PPCL, arXiv 2511.16156).

For a run of blocks a … b whose text changes little and nearly linearly, z_j the modulated text that block j reads, txt_j the text that
enters it:

    z_j ≈ z_a + P_j(z_a)                    for j = a+1 … b
    txt_{b+1} ≈ txt_a + E(txt_a)

P_j and E are affine, by ridge regression over tokens of the model's own samples, each token weighted by 1/‖txt_a‖ or 1/‖z_a‖. Modulation
(but the first block's), output projection and MLP of the run's text go; its q, k and v stay, since the picture attends to them.

P_j costs nothing: q(z + P(z)) is affine in z, so that it is folded into the projections, W ← W·(I + P), b ← b + W·p. Nothing is kept
between blocks either: the text stays txt_a all through the run, and block j asks the first block's modulation, which gives it z_a. The
blocks' own code runs on. In the last one the MLP is E, behind a modulation of shift 0, scale 0 and gate 1.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import input_error
from ...families.stack import Stack, StackBlock, State
from ...families.text import TEXT_FAMILIES, TextParts
from ..modules import own_weight, seen_modules
from .apply import TEXT_RUNS, exchange, plan_of, stack_under
from .linear_mlps import BEFORE_CODES, RIDGES, LinearMlp, NoText, has_whole_weights, linear_like
from .plan import Run
from .probes import ProbeStats, few_tokens, ridge_maps

__all__ = ["RunModulation", "TextTokens", "place_text_run", "text_blocks", "text_losses", "text_runs_of", "with_text_runs"]


class RunModulation(nn.Module):
    """The modulation of a run's first block, asked by another block of the run. It has no weights of its own: `first` keeps them.

    ends: of the run's last block, whose MLP stands for all that the run adds: shift 0, scale 0, gate 1 in front of and behind it.
    """

    def __init__(self, first: nn.Module, ends: bool):
        super().__init__()
        self.__dict__["first"] = first  # no submodule: it hangs in the first block, where hosts move and patch it
        self.ends = ends

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.first(*args, **kwargs)
        if not self.ends:
            return made
        if isinstance(made, Tensor):
            half = made.chunk(6, dim=-1)[:3]
            return torch.cat((*half, *_plain(half[0])), dim=-1)
        if len(made) == 2:  # records of shift, scale and gate
            shift, scale, gate = _plain(made[0].shift)
            return made[0], dataclasses.replace(made[1], shift=shift, scale=scale, gate=gate)
        return (*made[:3], *_plain(made[0]))


def _plain(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(like), torch.zeros_like(like), torch.ones_like(like)


def text_runs_of(model: Any) -> Mapping[str, str]:
    """Path of the first block → path of the last, of every run whose text is linear in MODEL."""
    return model.get_attachment(TEXT_RUNS) or {}


def text_blocks(model: Any, where: str) -> tuple[TextParts, tuple[tuple[StackBlock, ...], ...]]:
    """(parts of the family, groups of neighbouring blocks with text of their own).

    Raises: NodeInputError for a family without such text, a plan of widths, and quantised layers.
    """
    stack, seen, plan = stack_under(model, where), dict(seen_modules(model)), plan_of(model)
    if plan is not None and plan.width:
        remedy = "Take one of the two out: heads of a text that is linear cannot be left out."
        raise input_error(where, "model", "a model with masked or narrow blocks", "blocks of full width", remedy)
    parts = TEXT_FAMILIES.get(stack.family)
    blocks = [] if parts is None else [block for block in stack.blocks if block.holder == parts.holder and block not in stack.fixed]
    if not blocks or not any(f"{block.path}.{parts.modulation}" in seen for block in blocks):
        allowed = f"double blocks whose text has weights of its own: {', '.join(TEXT_FAMILIES)}"
        raise input_error(where, "model", f"{type(model.model.diffusion_model).__name__} without such text", allowed, "Remove this node.")
    taken = _inside(text_runs_of(model), stack)
    groups: list[list[StackBlock]] = [[]]
    for block in blocks:
        if block.path in taken or f"{block.path}.{parts.modulation}" not in seen:  # left out, a student, or linear already
            groups.append([])
            continue
        for name in parts.qkv:
            layer = seen[f"{block.path}.{name}"]
            if not has_whole_weights(layer) or layer.bias is None:
                got = f"{block.path}.{name} in few bits" if not has_whole_weights(layer) else f"{block.path}.{name} without a bias"
                raise input_error(where, "model", got, "layers with biases in 16 or 32 bits", BEFORE_CODES)
        groups[-1].append(block)
    return parts, tuple(tuple(group) for group in groups if len(group) > 1)


def _inside(runs: Mapping[str, str], stack: Stack) -> set[str]:
    """Paths of all blocks of the runs."""
    found = set()
    for first, last in runs.items():
        start, end = stack.at(first), stack.at(last)
        found |= {block.path for block in stack.blocks if block.holder == start.holder and start.index <= block.index <= end.index}
    return found


class TextTokens:
    """The same few tokens of every image: the text before and after each block and the modulated text it reads, on the CPU.

    per_call: tokens kept of each image in a call. held: of images that only judge; None keeps nothing.
    """

    def __init__(self, parts: TextParts, per_call: int, seed: int):
        self.parts, self.per_call, self.seed = parts, per_call, seed
        self.held: bool | None = None
        self.seen: dict[tuple[str, str, bool], list[Tensor]] = {}

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        if block.holder != self.parts.holder:
            return run()
        place = block.gives.index(self.parts.stream)
        self._keep(block.path, "before", state[place])  # before the block writes into it
        after = run()
        if after[place] is not None:
            self._keep(block.path, "after", after[place])
        return after

    def hook(self, path: str) -> Callable:
        """For the first projection of the block at `path`."""

        def read(module: nn.Module, args: tuple) -> None:
            self._keep(path, "read", args[0])

        return read

    def _keep(self, path: str, what: str, tokens: Tensor) -> None:
        if self.held is None:
            return
        self.seen.setdefault((path, what, self.held), []).append(few_tokens(tokens, self.per_call, self.seed))

    def tokens(self, path: str, what: str, held: bool | None) -> Tensor:
        """(n, d). what: "before", "after" or "read". held: None for all."""
        return torch.cat([each for kind in ((True, False) if held is None else (held,)) for each in self.seen.get((path, what, kind), [])])


@dataclass(frozen=True)
class _Target:
    """What a map has to say: `what` of block `path` from the same, or "before", of block `source`."""

    source: str
    path: str
    what: str

    def pair(self, tokens: TextTokens, held: bool | None) -> tuple[Tensor, Tensor]:
        """Inputs and how far the outputs are from them, (n, d) each."""
        given = tokens.tokens(self.source, "read" if self.what == "read" else "before", held)
        return given, tokens.tokens(self.path, self.what, held) - given


def _solved(tokens: TextTokens, targets: list[_Target], held: bool | None, ridges: Sequence[float]) -> list[tuple[Tensor, ...]]:
    """For each ridge the maps (d + 1, d) of targets with one source and one kind, by one system."""
    pairs = [target.pair(tokens, held) for target in targets]
    weigh = 1.0 / pairs[0][0].norm(dim=-1, keepdim=True).clamp(min=1e-12)
    changes = torch.cat([change for _, change in pairs], dim=1)
    return [found.chunk(len(pairs), dim=1) for found in ridge_maps(pairs[0][0], changes, ridges, weigh)]


def _left(given: Tensor, change: Tensor, found: Tensor) -> float:
    """Mean over tokens of ‖ŷ − y‖²/‖y‖²."""
    missing = change.double() - given.double() @ found[:-1] - found[-1]
    return float((missing.square().sum(-1) / (given + change).double().square().sum(-1).clamp(min=1e-30)).mean())


def text_losses(
    tokens: TextTokens, groups: Iterable[tuple[StackBlock, ...]], longest: int, count: int
) -> tuple[ProbeStats, dict[tuple[str, str, str], tuple[float, float]]]:  # fmt: skip
    """(1 − what its maps leave unsaid, of every run of up to `longest` blocks, for best_runs; (source, path, what) → (residual, ridge)).

    A run leaves what E leaves of the text behind it and what every P_j leaves of what is read. count: blocks of the holder.
    """
    holder, found = tokens.parts.holder, {}
    table = torch.full((count, count), float("nan"), dtype=torch.float64)
    for group in groups:
        for place, first in enumerate(group[:-1]):
            others = [block for block in group[place + 1 : place + longest] if (block.path, "after", True) in tokens.seen]
            for what in ("read", "after"):
                targets = [_Target(first.path, block.path, what) for block in others]
                tried = _solved(tokens, targets, False, RIDGES) if targets else []
                for target, maps in zip(targets, zip(*tried)):
                    judged = target.pair(tokens, True)
                    residuals = {ridge: _left(*judged, found_map) for ridge, found_map in zip(RIDGES, maps)}
                    ridge = min(residuals, key=residuals.__getitem__)
                    found[dataclasses.astuple(target)] = residuals[ridge], ridge
            unsaid = 0.0
            for block in others:
                unsaid += found[first.path, block.path, "read"][0]
                table[first.index, block.index] = 1.0 - unsaid - found[first.path, block.path, "after"][0]
    return ProbeStats({holder: table}), found


def with_text_runs(model: Any, runs: Iterable[Run], tokens: TextTokens, ridges: Mapping[tuple[str, str, str], tuple[float, float]]) -> Any:
    """A clone of MODEL in which the text of these runs is linear; maps are fitted to all tokens with the ridges that judged best."""
    seen, patched, size, parts = dict(seen_modules(model)), model.clone(), model.model_size(), tokens.parts

    def fitted(source: str, path: str, what: str) -> Tensor:
        return _solved(tokens, [_Target(source, path, what)], None, ridges[source, path, what][1:])[0][0]

    known = dict(text_runs_of(model))
    for run in runs:
        paths = [f"{run.holder}.{index}" for index in range(run.first, run.last + 1)]
        known[paths[0]] = paths[-1]
        exchanged = _exchanged(lambda name: seen[name], paths, parts)
        for path in paths[1:]:
            turn = fitted(paths[0], path, "read")
            for layer in parts.qkv:
                exchanged[f"{path}.{layer}"] = _folded(model, f"{path}.{layer}", seen[f"{path}.{layer}"], turn)
        adds = fitted(paths[0], paths[-1], "after").float()
        with torch.inference_mode(False):
            made = linear_like(seen[f"{paths[-1]}.{parts.qkv[0]}"], adds[:-1].T.contiguous(), adds[-1].clone())
        exchanged[f"{paths[-1]}.{parts.mlp}"] = LinearMlp(made)
        for path, module in exchanged.items():
            size += exchange(patched, path, module)
    patched.size = size
    patched.set_attachments(TEXT_RUNS, known)
    patched.patches_uuid = uuid.uuid4()  # an object patch alone does not tell the host that the network changes
    return patched


def _exchanged(at: Callable[[str], nn.Module], paths: list[str], parts: TextParts) -> dict[str, nn.Module]:
    """Path → what stands there in a run of these blocks, without the folded projections and without E."""
    found: dict[str, nn.Module] = {f"{path}.{name}": NoText() for path in paths for name in (parts.proj, parts.mlp)}
    first = at(f"{paths[0]}.{parts.modulation}")
    found |= {f"{path}.{parts.modulation}": RunModulation(first, path == paths[-1]) for path in paths[1:]}
    found[f"{paths[-1]}.{parts.norm2}"] = nn.Identity()
    del found[f"{paths[-1]}.{parts.mlp}"]
    return found


def place_text_run(network: nn.Module, first: StackBlock, last: StackBlock, parts: TextParts) -> None:
    """The same on a network that was just made of a file; E is there already.

    Raises: LookupError, AttributeError for blocks that such a run cannot have.
    """
    paths = [f"{first.holder}.{index}" for index in range(first.index, last.index + 1)]
    if first.holder != parts.holder or last.holder != parts.holder or len(paths) < 2:
        raise LookupError(f"{first.path} to {last.path} is no run of {parts.holder}")
    if not isinstance(network.get_submodule(f"{paths[-1]}.{parts.mlp}"), LinearMlp):
        raise LookupError(f"{last.path} has no map for the text of its run")
    for path, module in _exchanged(network.get_submodule, paths, parts).items():
        owner, _, name = path.rpartition(".")
        setattr(network.get_submodule(owner), name, module)


def _folded(model: Any, name: str, layer: nn.Linear, turn: Tensor) -> nn.Linear:
    """layer(z + z·M + m) as one layer; turn (d + 1, d): M above m."""
    weight, bias = (own_weight(model, name, layer, part).double().cpu() for part in ("weight", "bias"))
    with torch.inference_mode(False):
        return linear_like(layer, (weight + weight @ turn[:-1].T).float(), (bias + weight @ turn[-1]).float())
