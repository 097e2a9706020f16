"""Linear probes of blocks and runs of blocks that a straight map nearly replaces (PPCL, "Pluggable Pruning with Contiguous Layer
Distillation", arXiv 2511.16156).

    l_i(h) = h·W_i + b_i fitted to T_i(h) − h by ridge regression, so that h + l_i(h) ≈ T_i(h)
    cka(u, k): linear CKA of T_{u+k} and of the probes of u … u+k, one after the other, on the true input of u
    Δ(u, k) = cka(u, k − 1) − cka(u, k), with cka(u, −1) = 1

A run grows from u while Δ keeps falling (the trend is second order: what each further block costs becomes less) and while
1 − cka(u, k) stays below `largest_loss` (first order: what all of them cost together); a Δ within `tie` counts as no cost. The run
[u, v] ends before the first k that breaks this. The paper's note leaves ties open; this rule is ours, as is the bound: without it any two
blocks whose costs happen to fall make a run. With a number of blocks to remove, `best_runs` takes instead the runs with the least
Σ (1 − cka) that remove exactly so many.

Every stream of tokens has probes of its own, and a run costs what its worst stream costs, or their mean, or the image's alone. CKA is taken
of normalised tokens, as the next block reads them: a few channels of some models are so large that the CKA of the raw tokens is 1 whatever
the block does. What the model's answer loses with a run's student in its place is another table of the same kind (fitted_students.py): CKA
does not know what a block's error does behind it. The paper refines the probes by gradient steps; least squares is the minimum of that
loss already.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...families.stack import Stack, StackBlock, State
from .plan import Run

__all__ = [
    "MERGES", "ProbeStats", "Recorder", "best_runs", "few_tokens", "fit_probe", "linear_cka", "probe_stats", "probe_tables", "ridge_map",
    "ridge_maps", "trend_runs",
]  # fmt: skip

MERGES = ("min", "image", "mean")
IMAGE = ("img", "x", "hidden_states")  # what streams of image tokens are called


def linear_cka(a: Tensor, b: Tensor) -> float:
    """‖BᵀA‖² / (‖AᵀA‖·‖BᵀB‖) of centred features (n, d), in float64; 1 for features that are rotations of each other."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    scale = (a.T @ a).norm() * (b.T @ b).norm()
    return float((b.T @ a).square().sum() / scale) if scale > 0 else 1.0


def ridge_maps(inputs: Tensor, outputs: Tensor, ridges: Sequence[float], weigh: Tensor | None = None) -> Iterator[Tensor]:
    """For each ridge the map of inputs (n, d) to outputs (n, e) with a bias row, (d + 1, e) float64; the bias is not shrunk.

    weigh (n, 1): of rows.
    """
    h, wanted = torch.cat((inputs.double(), inputs.new_ones(len(inputs), 1, dtype=torch.float64)), dim=1), outputs.double()
    if weigh is not None:
        h, wanted = h * weigh, wanted * weigh
    gram, right = h.T @ h, h.T @ wanted
    channel = float(gram.diagonal()[:-1].mean())
    for ridge in ridges:
        system = gram.clone()
        system.diagonal()[:-1] += ridge * channel
        yield torch.linalg.lstsq(system, right, driver="gelsd").solution


def ridge_map(inputs: Tensor, outputs: Tensor, ridge: float, weigh: Tensor | None = None) -> Tensor:
    """ridge_maps of one."""
    return next(ridge_maps(inputs, outputs, (ridge,), weigh))


def fit_probe(inputs: Tensor, outputs: Tensor, ridge: float) -> Tensor:
    """ridge_map to outputs − inputs."""
    return ridge_map(inputs, outputs.double() - inputs.double(), ridge)


def _read(tokens: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(tokens.double(), tokens.shape[-1:])


def apply_probe(inputs: Tensor, probe: Tensor) -> Tensor:
    return inputs + inputs @ probe[:-1] + probe[-1]


def few_tokens(tokens: Tensor, count: int, seed: int) -> Tensor:
    """`count` tokens of each image in (b, n, d), the same for one seed, as (b·count, d) float32 on the CPU."""
    chosen = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(seed))[:count]
    return tokens[:, chosen.to(tokens.device)].detach().float().cpu().flatten(0, 1).clone()


class Recorder:
    """Keeps the same few tokens of every image before and after each block, on the CPU.

    per_call: tokens kept of each image in a call, and of each stream.
    """

    def __init__(self, per_call: int, seed: int = 0):
        self.per_call, self.seed = per_call, seed
        self.before: dict[str, list[list[Tensor]]] = {}
        self.after: dict[str, list[list[Tensor]]] = {}
        self.whole: dict[str, bool] = {}  # whether a block hands every stream on

    def __call__(self, block: StackBlock, state: State, run: Callable[..., State]) -> State:
        before = [self._few(tokens) for tokens in state]
        out = run()
        self.whole[block.path] = all(tokens is not None for tokens in out)  # SD3's last block hands no context on
        if self.whole[block.path]:
            self.before.setdefault(block.path, []).append(before)
            self.after.setdefault(block.path, []).append([self._few(tokens) for tokens in out])
        return out

    def _few(self, tokens: Tensor) -> Tensor:
        return few_tokens(tokens, self.per_call, self.seed + tokens.shape[1])

    def streams(self, path: str) -> list[tuple[Tensor, Tensor]]:
        """(before, after) of each stream, (n, d); none of a block that ends one."""
        if not self.whole[path]:
            return []
        joined = ([torch.cat(parts) for parts in zip(*calls)] for calls in (self.before[path], self.after[path]))
        return list(zip(*joined))


@dataclass(frozen=True)
class ProbeStats:
    """cka: holder → (count, count) with cka(u, v − u) at [u, v] for u ≤ v, or 1 − another loss of that run; NaN elsewhere."""

    cka: Mapping[str, Tensor] = field(default_factory=dict)

    def loss(self, run: Run) -> float:
        return 1.0 - float(self.cka[run.holder][run.first, run.last])

    def scores(self) -> dict[str, float]:
        """1 − cka(u, 0) of every block: what a linear map does not say about it."""
        return {
            f"{holder}.{i}": 1.0 - float(table[i, i]) for holder, table in self.cka.items() for i in range(len(table))
            if math.isfinite(float(table[i, i]))
        }  # fmt: skip


def probe_tables(recorder: Recorder, stack: Stack, longest: int = 10, ridge: float = 1e-4) -> dict[str, ProbeStats]:
    """Probes of every block and the CKA of every run of at most `longest` blocks; one ProbeStats for each of MERGES."""
    tables: dict[str, dict[str, Tensor]] = {merge: {} for merge in MERGES}
    for group in stack.groups():
        streams = [recorder.streams(block.path) for block in group]
        image = next(place for place, name in enumerate(group[0].gives) if name in IMAGE)
        nothing = torch.full((len(group), len(group)), float("nan"), dtype=torch.float64)
        merged = {merge: nothing.clone() for merge in MERGES}
        probes = [[fit_probe(before, after, ridge) for before, after in pairs] for pairs in streams]
        for u in range(len(group)):
            through = [before.double() for before, _ in streams[u]]
            for v in range(u, min(len(group), u + longest)):
                if not probes[v] or not through:
                    break
                through = [apply_probe(tokens, probe) for tokens, probe in zip(through, probes[v])]
                each = [linear_cka(_read(tokens), _read(after)) for tokens, (_, after) in zip(through, streams[v])]
                for merge, value in (("min", min(each)), ("image", each[image]), ("mean", sum(each) / len(each))):
                    merged[merge][u, v] = value
        for merge, table in merged.items():
            tables[merge][group[0].holder] = table
    return {merge: ProbeStats(found) for merge, found in tables.items()}


def probe_stats(recorder: Recorder, stack: Stack, longest: int = 10, ridge: float = 1e-4) -> ProbeStats:
    """probe_tables by the worst stream."""
    return probe_tables(recorder, stack, longest, ridge)["min"]


def trend_runs(
    stats: ProbeStats, longest: int = 10, largest_loss: float = 0.1, tie: float = 1e-3, kept: frozenset[str] = frozenset()
) -> tuple[Run, ...]:
    """The runs of the trend rule at the head of this file; a run holds two blocks at least. kept: paths that stay as they are."""
    runs = []
    for holder, table in stats.cka.items():
        u = 0
        while u < len(table):
            v = u - 1
            before, previous = 1.0, math.inf
            while v + 1 < min(len(table), u + longest) and f"{holder}.{v + 1}" not in kept:
                now = float(table[u, v + 1])
                cost = before - now
                if not (1.0 - now <= largest_loss and (cost < previous or cost <= tie)):
                    break
                v, before, previous = v + 1, now, max(cost, tie)
            if v > u:
                runs.append(Run(holder, u, v))
            u = max(u, v) + 1
    return tuple(runs)


def best_runs(stats: ProbeStats, remove: int, longest: int = 10, kept: frozenset[str] = frozenset()) -> tuple[Run, ...]:
    """Disjoint runs that remove exactly `remove` blocks with the least sum of 1 − cka; () where there are none."""
    best: dict[int, tuple[float, tuple[Run, ...]]] = {0: (0.0, ())}
    for holder, table in stats.cka.items():
        ways = _ways(holder, stats, len(table), remove, longest, kept)
        joined: dict[int, tuple[float, tuple[Run, ...]]] = {}
        for (left, (cost, runs)), (right, (more, others)) in itertools.product(best.items(), ways.items()):
            count = left + right
            if count <= remove and (count not in joined or cost + more < joined[count][0]):
                joined[count] = (cost + more, runs + others)
        best = joined
    return best.get(remove, (0.0, ()))[1]


def _ways(holder: str, stats: ProbeStats, count: int, remove: int, longest: int, kept: frozenset[str]) -> dict:
    """Blocks removed → (cost, runs) within one holder, by dynamic programming over where the last run ends."""
    best: list[dict[int, tuple[float, tuple[Run, ...]]]] = [{0: (0.0, ())}]
    for end in range(count):
        here = dict(best[end])  # block `end` stands alone
        for first in range(max(0, end - longest + 1), end):
            run = Run(holder, first, end)
            if any(f"{holder}.{i}" in kept for i in range(first, end + 1)) or not math.isfinite(stats.loss(run)):
                continue
            for removed, (cost, runs) in best[first].items():
                total = (cost + stats.loss(run), (*runs, run))
                if removed + end - first <= remove and (removed + end - first not in here or total[0] < here[removed + end - first][0]):
                    here[removed + end - first] = total
        best.append(here)
    return best[count]
