"""The recipe of the model that ships: a Flux of 13.4 million parameters and its text tables, from random weights to a file.

The network's class belongs to a host, so it is handed in. What is drawn: tiny/emoji.py. The codec is not trained: a principal
component analysis of the same pictures, taken from the shipped file, so that latents made with either weights are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...tiny.codec import LinearCodec
from ...tiny.emoji import Emoji, EmojiLook, load_emoji
from ...tiny.text import STYLES, VOCABULARY_FILE, Vocabulary
from ...tiny.weights import TinyWeights
from ..draws import Draws, seeded
from ..loop import Batch

__all__ = ["EmojiData", "TinyTrainee", "initialise", "start_from", "vocabulary_things", "weight_file"]

PADDING, NO_STYLE = 0, len(STYLES)


def vocabulary_things(path: Path = VOCABULARY_FILE) -> dict[str, str]:
    """Words of a thing → short name of its emoji, as vocabulary.json has them."""
    return json.loads(path.read_text(encoding="utf-8"))["things"]


class EmojiData:
    """Composed pictures as latents; a condition is (token ids, row of the style table)."""

    def __init__(self, emoji: Emoji, look: EmojiLook, codec: LinearCodec, vocabulary: Vocabulary):
        self.emoji, self.look, self.codec, self.vocabulary = emoji, look, codec, vocabulary
        self.fingerprint = f"{emoji.digest}:{look}"

    @classmethod
    def from_folder(cls, folder: Path, look: EmojiLook, codec: LinearCodec) -> EmojiData:
        return cls(load_emoji(folder, vocabulary_things(), look), look, codec, Vocabulary.load())

    def buckets(self) -> list[list[int]]:
        return [list(range(len(self.emoji)))]

    @torch.no_grad()
    def batch(self, rows: Tensor, draws: Draws) -> Batch:
        rgb, captions = self.emoji.compose(rows, self.look, draws.generator("look"))
        prompts = [self.vocabulary.parse(caption) for caption in captions]
        return Batch(self.codec.encode(rgb), [(prompt.ids, prompt.style) for prompt in prompts])


class TinyTrainee(nn.Module):
    """The network and its text tables as one trained thing.

    Args:
        network: a Flux of tiny.weights.FLUX_SIZES with fp32 weights. dtype: of the computation.
        compiled: run the network through torch.compile.
    """

    def __init__(self, network: nn.Module, words: int, dtype: torch.dtype = torch.bfloat16, compiled: bool = False):
        super().__init__()
        self.network = network
        self.text = nn.Parameter(torch.zeros(words, network.params.context_in_dim))
        self.style = nn.Parameter(torch.zeros(NO_STYLE + 1, network.params.vec_in_dim))
        self.dtype = dtype
        self.length = Vocabulary.load().length
        self._call = torch.compile(network, dynamic=False) if compiled else network
        for parameter in network.parameters():
            parameter.requires_grad_(True)

    def describe(self) -> dict[str, Any]:
        return {"model": "tiny", "parameters": sum(value.numel() for value in self.parameters())}

    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def velocity(self, x: Tensor, sigma: Tensor, cond: list[Any]) -> Tensor:
        empty = ((PADDING,) * self.length, NO_STYLE)
        given = [empty if each is None else each for each in cond]
        context = self.text[torch.tensor([ids for ids, _ in given])].to(self.dtype)  # (b, 8, 128)
        pooled = self.style[torch.tensor([style for _, style in given])].to(self.dtype)  # (b, 64)
        options = {"optimized_attention_override": short_attention}
        return self._call(x.to(self.dtype), sigma, context, pooled, transformer_options=options).float()


def short_attention(function, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v in plain products over (b, h, n, d).

    The model has 72 tokens. Backwards through torch's blockwise kernel costs four times as much on a CPU at that length.
    """
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


@torch.no_grad()
def initialise(trainee: TinyTrainee, seed: int) -> None:
    """Random weights: embeddings normal, matrices uniform in ±1/sqrt(inputs), modulation and the last layer zero, norms one."""
    for name, value in trainee.params().items():
        generator = seeded(seed, "initial", name)
        if name in ("text", "style"):
            value.copy_(torch.randn(value.shape, generator=generator))
        elif name.endswith("norm.scale"):
            value.fill_(1.0)
        elif value.ndim < 2 or "mod" in name.lower() or "final_layer" in name:
            value.zero_()
        else:
            value.copy_((torch.rand(value.shape, generator=generator) * 2.0 - 1.0) * value.shape[1] ** -0.5)


@torch.no_grad()
def start_from(trainee: TinyTrainee, weights: TinyWeights) -> None:
    """Copy a weight file of the same layout into the trainee."""
    values = {f"network.{name}": value for name, value in weights.transformer.items()}
    values |= {"text": weights.text_embedding, "style": weights.style_embedding}
    for name, value in trainee.params().items():
        value.copy_(values[name])


def weight_file(values: Mapping[str, Tensor], codec: TinyWeights) -> dict[str, Tensor]:
    """The trainee's parameters (or their average) as the tensors of tiny-emoji-flux.safetensors: transformer fp16, tables fp32."""
    prefix = "network."
    tensors = {name[len(prefix) :]: value.half() for name, value in values.items() if name.startswith(prefix)}
    overflow = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if overflow:
        raise ValueError(f"{overflow[0]} is not finite in fp16; the run has diverged")
    tables = {"text.embedding": values["text"], "style.embedding": values["style"]}
    tables |= {"codec.basis": codec.codec_basis, "codec.scale": codec.codec_scale, "codec.mean": codec.codec_mean}
    return {name: value.detach().contiguous().clone() for name, value in (tensors | tables).items()}
