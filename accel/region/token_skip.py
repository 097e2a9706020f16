"""The MLP of a block for part of the image's tokens: DyDiT's spatial half without its trained routers.

"Dynamic Diffusion Transformer", arXiv 2410.03456, and DyDiT++, arXiv 2504.06803, gate every block's MLP by a token's own logit:

    x_i ← x_i + M_i · gate · MLP(x_i),    M_i ∈ {0, 1}; attention is never skipped, text never either

Here a rule that needs no training takes the place of the router, the same for all blocks of a visit: the ⌈ratio·n⌉ tokens of the image
with the highest score run. Their number is fixed, where a threshold would make it depend on data. `cached_mlp_output` is ours: tokens that
are left out get what the MLP last gave them, under the gate of now.

Where one layer serves attention and MLP (Flux's single blocks) it is split exactly: W₁ = [W_qkv; W_in] by rows, W₂ = [W_attn | W_out] by
columns, so that attention is whole and only the second parts run over chosen rows. The product of such a layer is caught where the layer
asks torch for it, so that casts, LoRAs and weight functions of the host have been applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ...errors import input_error
from ...families.mlps import MlpSite
from .grid import TokenGrid
from .select import focus_metric

__all__ = ["KEY", "REUSES", "ROUTERS", "MlpStore", "SkipCall", "TokenSkip", "scores_of"]

KEY = "rectiflow_token_skip"
ROUTERS = ("velocity_change", "latent_variance", "ras_metric")
REUSES = ("residual_only", "cached_mlp_output")


@dataclass(frozen=True)
class TokenSkip:
    """ratio: share of the image's tokens whose MLP runs. router, reuse: see the head of this file and `scores_of`. blocks: see
    chosen_sites. start, end: shares of a run's steps. cap: bytes that kept outputs may take. always: MASK, 1 where the MLP always runs."""

    ratio: float = 0.7
    router: str = "velocity_change"
    reuse: str = "residual_only"
    blocks: str = "all"
    start: float = 0.15
    end: float = 1.0
    cap: int = 1 << 34
    always: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def check(self, where: str) -> None:
        """Raises: NodeInputError naming what does not fit."""
        if not 0.05 <= self.ratio <= 1.0:
            raise input_error(where, "ratio", self.ratio, "0.05 to 1", "Enter 0.7.")
        for name, value, allowed in (("router", self.router, ROUTERS), ("reuse", self.reuse, REUSES)):
            if value not in allowed:
                raise input_error(where, name, value, ", ".join(allowed), "Choose one of these.")
        if not 0.0 <= self.start < self.end <= 1.0:
            allowed = "0 ≤ start_percent < end_percent ≤ 1"
            raise input_error(where, "start_percent", (self.start, self.end), allowed, "Enter 0.15 and 1.")

    @property
    def keeps(self) -> bool:
        return self.reuse == "cached_mlp_output"

    def count(self, tokens: int) -> int:
        """How many of an image's tokens run."""
        return math.ceil(self.ratio * tokens - 1e-9)

    def line(self) -> str:
        return f"MLP for {self.ratio:.0%} of the tokens by {self.router}, {self.reuse}, blocks {self.blocks}"


def scores_of(router: str, v: torch.Tensor, before: torch.Tensor | None, denoised: torch.Tensor, grid: TokenGrid) -> torch.Tensor | None:
    """Which tokens' MLPs run first, (b, n), higher first; None where the rule needs an earlier velocity and there is none.

    velocity_change: mean over a token's cells of ‖v − v_before‖ over channels. latent_variance: variance of the denoised latent over a
    token's channels and cells. ras_metric: low deviation of v over channels first, as region-adaptive sampling chooses. v, before,
    denoised: (b, c, *shape).
    """
    if router == "velocity_change":
        return None if before is None else focus_metric(v - before, grid, "l2norm")
    if router == "latent_variance":
        mean = grid.pool(denoised.float().mean(dim=1))
        return grid.pool(denoised.float().square().mean(dim=1)) - mean.square()
    return -focus_metric(v, grid, "std")


class MlpStore:
    """What MLPs last gave: (condition, path) → (b, image rows, d)."""

    def __init__(self, cap: int, where: str):
        self.cap, self.where = cap, where
        self.rows: dict[tuple[Hashable, str], torch.Tensor] = {}
        self.nbytes = self.peak = 0

    def has(self, keys: Sequence[Hashable]) -> bool:
        """Whether each of these conditions has outputs of every MLP that any condition has."""
        paths = {path for _, path in self.rows}
        return bool(paths) and all((key, path) in self.rows for key in keys for path in paths)

    def keep(self, key: Hashable, path: str, rows: torch.Tensor) -> None:
        """Raises: NodeInputError before more is taken than the cap allows."""
        old = self.rows.get((key, path))
        size = rows.numel() * rows.element_size()
        grown = self.nbytes + size - (0 if old is None else old.nbytes)
        if grown > self.cap:
            remedy = "Raise max_mib, name fewer blocks, or choose residual_only, which keeps nothing."
            raise input_error(self.where, "max_mib", f"{grown / 2**20:.1f} MiB of outputs", f"up to {self.cap >> 20} MiB", remedy)
        self.rows[key, path] = rows.detach().clone()
        self.nbytes, self.peak = grown, max(self.peak, grown)

    def drop(self) -> None:
        self.rows.clear()
        self.nbytes = 0


class _Product(TorchFunctionMode):
    """Catches the one product of a linear layer with a weight of this shape and has `compute` make it."""

    def __init__(self, shape: tuple[int, int], compute: Callable[..., torch.Tensor]):
        super().__init__()
        self.shape, self.compute, self.caught = shape, compute, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and not self.caught and len(args) > 1 and tuple(args[1].shape) == self.shape:
            self.caught = True
            return self.compute(*args, **kwargs)
        return func(*args, **kwargs)


@dataclass
class SkipCall:
    """One model call. chosen: (b, n) bool, the image's tokens whose MLP runs, or None for a whole call that only keeps outputs.

    even: tokens of each picture in `chosen` where all have as many. keys: one a condition in the batch. text: tokens of text in the call,
    for networks whose image is nowhere apart; tokens: of the picture. store: where outputs are kept, or None. beside: paths of MLPs over
    the image alone that run whole: from those the length of the text is read, which another node may have made longer.
    """

    sites: Sequence[MlpSite]
    chosen: torch.Tensor | None
    even: int | None
    tokens: int
    text: int
    keys: Sequence[Hashable]
    store: MlpStore | None
    beside: Sequence[str] = ()
    ran: set[str] = field(default_factory=set)  # paths that did what they should
    whole: set[str] = field(default_factory=set)  # paths that did not, being of another length or no plain layers
    _image: int = 0  # rows of the picture and of references, once an MLP over them has run
    _flat: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    _open: list[Any] = field(default_factory=list)

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Hooks on the MLPs of `network`, which stand for this call alone."""
        def see(module: nn.Module, args: tuple) -> None:
            self._image = args[0].shape[1]

        self._image = 0
        with ExitStack() as hooks:
            for path in self.beside:
                hooks.enter_context(network.get_submodule(path).register_forward_pre_hook(see))
            for site in self.sites:
                put_on = self._fused if site.kind == "fused" else self._plain
                for handle in put_on(site, network.get_submodule(site.path)):
                    hooks.enter_context(handle)
            yield

    def rows(self, batch: int, length: int, text: int) -> torch.Tensor:
        """Places in (batch · length) rows of the tokens that run: text, the chosen ones of the picture, and those of references."""
        known = self._flat.get((batch, length, text))
        if known is None:
            chosen = self.chosen.repeat(batch // len(self.chosen), 1)
            mask = torch.ones(batch, length, dtype=torch.bool, device=chosen.device)
            mask[:, text : text + self.tokens] = chosen
            if self.even is None:
                known = mask.flatten().nonzero()[:, 0]
            else:  # a stable sort has a known number of rows, so that nothing waits for the device
                count = length - self.tokens + self.even
                known = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
                known = (known + length * torch.arange(batch, device=known.device)[:, None]).flatten()
            self._flat[batch, length, text] = known
        return known

    def _text(self, site: MlpSite, length: int) -> int | None:
        """Rows of text in front of the image in a site's tokens, or None where the picture's tokens are not all there."""
        if site.kind == "fused":
            text = length - self._image if self._image else self.text
        else:
            text = 0 if site.kind == "image" else length - self.tokens
        return text if 0 <= text <= length - self.tokens else None

    # An MLP of its own

    def _plain(self, site: MlpSite, module: nn.Module) -> list:
        shapes: list[tuple[int, int, int] | None] = []

        def take(module: nn.Module, args: tuple):
            x = args[0]  # (b, n, d)
            self._image = x.shape[1] if site.kind == "image" else 0
            text = self._text(site, x.shape[1])
            shapes.append(None if text is None else (*x.shape[:2], text))
            if text is None or self.chosen is None:
                return None
            return (x.flatten(0, 1).index_select(0, self.rows(*shapes[-1]))[None], *args[1:])

        def put(module: nn.Module, args: tuple, out: torch.Tensor):
            shape = shapes.pop()
            if shape is None:
                self.whole.add(site.path)
                return None
            self.ran.add(site.path)
            batch, length, text = shape
            if self.chosen is None:
                self._keep(site, out, text)
                return None
            whole = self._left(site, batch, length, text, out)
            whole.flatten(0, 1).index_copy_(0, self.rows(*shape), out[0])
            if self.store is not None:
                self._keep(site, whole, text)
            return whole

        return [module.register_forward_pre_hook(take), module.register_forward_hook(put)]

    def _left(self, site: MlpSite, batch: int, length: int, text: int, like: torch.Tensor) -> torch.Tensor:
        """What tokens that are left out get: nothing, or what they got last."""
        whole = like.new_zeros(batch, length, like.shape[-1])
        if self.store is not None:
            for part, key in zip(whole.chunk(len(self.keys)), self.keys):
                part[:, text:] = self.store.rows[key, site.path]
        return whole

    def _keep(self, site: MlpSite, out: torch.Tensor, text: int) -> None:
        for part, key in zip(out.chunk(len(self.keys)), self.keys):
            self.store.keep(key, site.path, part[:, text:])

    # One that shares its layers with attention

    def _fused(self, site: MlpSite, block: nn.Module) -> list:
        hidden = block.mlp_hidden_dim
        first, second = block.linear1, block.linear2
        caught: list[bool] = []

        def enter(layer: nn.Module, compute: Callable) -> None:
            mode = _Product((layer.out_features, layer.in_features), compute)
            mode.__enter__()
            self._open.append(mode)

        def leave(layer: nn.Module, args: tuple, out: Any) -> None:
            mode = self._open.pop()
            mode.__exit__(None, None, None)
            caught.append(mode.caught)

        def before_first(layer: nn.Module, args: tuple) -> None:
            text = self._text(site, args[0].shape[1])
            fits = self.chosen is not None and text is not None
            enter(layer, (lambda x, w, b=None: self._make_hidden(x, w, b, hidden, text)) if fits else F.linear)

        def before_second(layer: nn.Module, args: tuple) -> None:
            text = self._text(site, args[0].shape[1])
            fits = text is not None and caught[-1]
            (self.ran if fits else self.whole).add(site.path)
            enter(layer, (lambda x, w, b=None: self._read_hidden(site, x, w, b, hidden, text)) if fits else F.linear)

        hooks = [first.register_forward_pre_hook(before_first), first.register_forward_hook(leave, always_call=True)]
        return [*hooks, second.register_forward_pre_hook(before_second), second.register_forward_hook(leave, always_call=True)]

    def _make_hidden(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, hidden: int, text: int) -> torch.Tensor:
        """[qkv | hidden] of all rows, hidden being zero where it does not run, as it is behind an activation too."""
        batch, length, _ = x.shape
        split = weight.shape[0] - hidden
        biases = (None, None) if bias is None else bias.split((split, hidden))
        rows = self.rows(batch, length, text)
        out = x.new_zeros(batch * length, weight.shape[0])
        out[:, :split] = F.linear(x.flatten(0, 1), weight[:split], biases[0])
        out[:, split:].index_copy_(0, rows, F.linear(x.flatten(0, 1).index_select(0, rows), weight[split:], biases[1]))
        return out.view(batch, length, -1)

    def _read_hidden(self, site: MlpSite, x: torch.Tensor, weight: torch.Tensor, bias: Any, hidden: int, text: int) -> torch.Tensor:
        batch, length, width = x.shape
        x, split = x.flatten(0, 1), width - hidden
        out = F.linear(x[:, :split], weight[:, :split], bias)
        if self.chosen is None:
            part = F.linear(x[:, split:], weight[:, split:]).view(batch, length, -1)
            self._keep(site, part, text)
            return out.view(batch, length, -1).add_(part)
        rows = self.rows(batch, length, text)
        few = F.linear(x[:, split:].index_select(0, rows), weight[:, split:])
        if self.store is None:
            return out.index_add_(0, rows, few).view(batch, length, -1)
        whole = self._left(site, batch, length, text, few)
        whole.flatten(0, 1).index_copy_(0, rows, few)
        self._keep(site, whole, text)
        return out.view(batch, length, -1).add_(whole)
