"""FLOPs and seconds of a run before it is made: FLOPs from the modules' sizes, seconds from a few small calls on this machine.

A model evaluation with a of n image tokens computed, N = n + text tokens keys:

    FLOPs   = linear(a) + attention(a, N)                                         families/cost.py
    seconds = c0 + linear(a)/c1 + Σ attentions · seconds of one on this machine

c0, what a call costs at any size, and c1, the speed of the layers, come from two calls of the model itself at a half and a quarter of the
sides, less their attention; that is timed alone at the size asked for, as its cost grows with the square. What region-adaptive
sampling does besides (choosing, gathering, keeping keys) is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from ..families.cost import ForwardCost, forward_cost
from ..families.tokens import TokenSpec, token_spec
from .attention.break_even import seconds
from .region.grid import TokenGrid

__all__ = ["CostFigures", "Predictor", "TimedCalls", "smaller_sizes"]

Shape = tuple[int, ...]


class TimedCalls:
    """A SAMPLER that asks the model a few times at sigmas[0]; `seconds` is the median after the first."""

    inpaint_options = MappingProxyType({})

    def __init__(self, rounds: int = 3):
        self.rounds, self.seconds = rounds, 0.0

    def max_denoise(self, guider, sigmas) -> bool:
        return False

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """What a host's guider calls; tensors `(b, …)` in model space."""
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image)
        times = sigmas[0] * x.new_ones([x.shape[0]])
        found = []
        for _ in range(self.rounds + 1):
            start = time.perf_counter()
            guider(x, times, model_options=extra_args.get("model_options", {}), seed=extra_args.get("seed"))
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            found.append(time.perf_counter() - start)
        self.seconds = sorted(found[1:])[self.rounds // 2]
        return x


def smaller_sizes(shape: Sequence[int], patch: Sequence[int]) -> list[Shape]:
    """Latents of a half and a quarter of the sides, whole tokens, at least two a side; a clip keeps its frames."""
    found = []
    for share in (2, 4):
        sides = [max(2, side // (cells * share)) * cells for side, cells in zip(shape[-2:], patch[-2:])]
        found.append((*shape[:-2], *sides))
    return found


@dataclass(frozen=True)
class CostFigures:
    """tokens: of the image; dense, partial: (FLOPs, seconds) of an evaluation with all conditions; evaluations: how many of each."""

    tokens: int
    texts: tuple[int, ...]
    ratio: float
    dense: tuple[float, float]
    partial: tuple[float, float]
    evaluations: tuple[int, int]
    unknown: tuple[str, ...] = ()

    def _total(self, place: int) -> float:
        return self.evaluations[0] * self.dense[place] + self.evaluations[1] * self.partial[place]

    @property
    def flops(self) -> float:
        return self._total(0)

    @property
    def seconds(self) -> float:
        return self._total(1)

    def text(self) -> str:
        steps = sum(self.evaluations)
        texts = " and ".join(map(str, self.texts))
        rows = [
            f"{self.tokens} image tokens, {texts} of text; {steps} evaluations, {self.evaluations[0]} with all tokens",
            f"all tokens: {self.dense[0] / 1e12:.4g} TFLOP, {self.dense[1]:.3g} s",
            f"{self.ratio:.0%} of them: {self.partial[0] / 1e12:.4g} TFLOP, {self.partial[1]:.3g} s",
            f"run: {self.flops / 1e12:.4g} TFLOP, {self.seconds:.3g} s; with all tokens {steps * self.dense[0] / 1e12:.4g} TFLOP, "
            f"{steps * self.dense[1]:.3g} s",
        ]
        if self.unknown:
            rows.append("layers not counted: " + ", ".join(self.unknown[:4]) + (" …" if len(self.unknown) > 4 else ""))
        return "\n".join(rows)


@dataclass(frozen=True)
class Predictor:
    """cost, spec: of the model; shape: of the latents to be sampled; texts: tokens of each condition's text; dtype, device: its own."""

    cost: ForwardCost
    spec: TokenSpec
    shape: Shape
    texts: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    where: str

    @classmethod
    def of(cls, model: Any, shape: Shape, texts: Sequence[int], where: str) -> Predictor:
        """Raises: NodeInputError for a family whose sizes are not known, or a latent that does not fit it."""
        transformer = model.get_model_object("diffusion_model")
        spec = token_spec(transformer, where)
        dtype = getattr(transformer, "dtype", None) or next(transformer.parameters()).dtype
        TokenGrid.of(shape[2:], spec.patch, where)
        device = torch.device(model.load_device)
        return cls(forward_cost(transformer, spec), spec, tuple(shape), tuple(texts), dtype, device, where)

    def tokens(self, shape: Sequence[int]) -> int:
        return TokenGrid.of(shape[2:], self.spec.patch, self.where).count

    def flops(self, computed: float, image: int) -> float:
        """Of an evaluation of all conditions with `computed` of `image` tokens."""
        return self.shape[0] * sum(self.cost.linear(computed, text) + self.cost.attention(computed, text, image) for text in self.texts)

    def _linear(self, computed: float) -> float:
        return self.shape[0] * sum(self.cost.linear(computed, text) for text in self.texts)

    @torch.inference_mode()
    def _attention_seconds(self, computed: int, image: int) -> float:
        total = 0.0
        for text in self.texts:
            joint = (computed + text, image + text)
            lengths = {"image": (computed, image), "text": (text, text), "joint": joint, "cross": (computed, text)}
            for part in self.cost.attentions:
                queries, keys = (max(1, length) for length in lengths[part.kind])
                width = part.width // part.heads
                q, k, v = (torch.full((self.shape[0], part.heads, n, width), 0.5, dtype=self.dtype, device=self.device)
                           for n in (queries, keys, keys))  # fmt: skip
                total += part.count * seconds(F.scaled_dot_product_attention, q, k, v)
        return total

    def run(self, measured: Sequence[tuple[Shape, float]], steps: int, ratio: float, dense: int) -> CostFigures:
        """Figures of a run of `steps` evaluations, `dense` of them with all tokens. measured: two (shape, seconds of an evaluation)."""
        image = self.tokens(self.shape)
        computed = max(1, round(ratio * image))
        points = []
        for shape, taken in measured:
            count = self.tokens(shape)
            points.append((self._linear(count), max(taken - self._attention_seconds(count, count), 0.1 * taken)))
        (low, fast), (high, slow) = sorted(points)
        slope = max((slow - fast) / (high - low), 0.0) if high > low else slow / high
        fixed = max(fast - slope * low, 0.0)

        def figures(part: int) -> tuple[float, float]:
            return self.flops(part, image), fixed + slope * self._linear(part) + self._attention_seconds(part, image)

        whole = figures(image)
        partial = whole if computed == image else figures(computed)
        return CostFigures(image, self.texts, ratio, whole, partial, (dense, steps - dense), self.cost.unknown)
