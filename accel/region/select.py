"""Which tokens go through the network.

"Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389. With the guided velocity v̂ of the last step (b, c, cells):

    m = mean over a token's cells of std_c(v̂)       (unbiased)      or of ‖v̂‖_c     or, ours, of its expected change (drift.py)
    R = m·exp(k·D)                                   eq. 1; D counts how often a token was left out

`reference` is the published code: of n_skip tokens to leave out, floor(n_skip·(1 − h)) with the lowest R and floor(n_skip·h) with the
highest. With h = 1 being left out there raises the chance to be left out again. What we do differently: `low_std` computes the tokens of
lowest m and `high_std` those of highest m, and D always pulls a token back: m·exp(−k·D) for the former, m·exp(+k·D) for the latter.
Everything is in logarithms, one index a sample (b, a), sorted; masks force tokens in or out; ties fall to the earlier token.
"""

from __future__ import annotations

import torch

from .grid import TokenGrid

__all__ = ["FOCUSES", "METRICS", "choose", "focus_metric", "left_out", "scores"]

METRICS = ("std", "l2norm", "random", "change")
FOCUSES = ("low_std", "high_std", "reference")
_TINY = 1e-12


def focus_metric(v: torch.Tensor, grid: TokenGrid, metric: str, seed: int = 0) -> torch.Tensor:
    """m (b, n) of a velocity (b, c, *shape). random: uniform, drawn on the CPU from `seed`. `change` has a class of its own, Drift."""
    if metric == "random":
        drawn = torch.rand(v.shape[0], grid.count, generator=torch.Generator().manual_seed(seed))
        return drawn.to(v.device)
    v = v.float()
    by_cell = v.std(dim=1) if metric == "std" and v.shape[1] > 1 else v.norm(dim=1)
    return grid.pool(by_cell)


def scores(m: torch.Tensor, left: torch.Tensor, focus: str, starvation: float) -> torch.Tensor:
    """Priority to be computed (b, n), higher first; for `reference` log R, of which both ends are left out."""
    log_m = m.float().clamp_min(_TINY).log()
    if focus == "low_std":
        return starvation * left - log_m
    return log_m + starvation * left


def left_out(score: torch.Tensor, count: int, focus: str, high_ratio: float) -> torch.Tensor:
    """Whether each token is left out (b, n), for a `count` of tokens a sample."""
    order = score.sort(dim=1, descending=focus != "reference", stable=True).indices
    n = score.shape[1]
    if focus == "reference":
        low, high = int(count * (1.0 - high_ratio)), int(count * high_ratio)
        chosen = torch.cat((order[:, :low], order[:, n - high :]), dim=1)
    else:
        chosen = order[:, n - count :]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True)


def choose(
    score: torch.Tensor, count: int, focus: str, high_ratio: float = 1.0,
    always: torch.Tensor | None = None, never: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The index of computed tokens (b, a), each row sorted.

    Masks (b, n): `always` comes before `never`, and both before the count, which is raised or lowered for the whole batch where the masks
    need it, so that every sample has the same number. At least one token is computed.
    """
    n = score.shape[1]
    out = left_out(score, count, focus, high_ratio)
    if always is None and never is None:
        return _index(out)
    none = torch.zeros_like(out)
    always = none if always is None else always
    never = none if never is None else never & ~always
    # A second, plain selection: what is left out anyway stays first in line, the forced ones stand before and behind it.
    rank = torch.where(out, -1.0, 1.0) if focus == "reference" else score
    spread = rank.max() - rank.min() + 1.0
    rank = rank + spread * always.float() - spread * never.float()
    count = int(out[0].sum())
    count = min(max(count, int(never.sum(dim=1).min())), n - int(always.sum(dim=1).max()), n - 1)
    return _index(left_out(rank, max(count, 0), "high_std", 1.0))


def _index(out: torch.Tensor) -> torch.Tensor:
    """Positions of False in (b, n), the same number in every row."""
    return (~out).nonzero()[:, 1].reshape(out.shape[0], -1)
