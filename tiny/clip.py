"""The text encoder behind the CLIP protocol that stock nodes use: two look-up tables.

A prompt becomes eight rows of the word table (the context) and one row of the style table (the pooled vector). The tokens
have the shape that other nodes of a host expect: {"tiny": [[(id, weight), …]]} with every weight 1.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import input_error
from .placement import ALONE, Placement
from .text import STYLES, Vocabulary

__all__ = ["TinyCLIP", "TinyTextEncoder"]

STREAM = "tiny"  # the key of our tokens, where other encoders write "l", "g" or "t5xxl"


class TinyTextEncoder(nn.Module):
    """Token ids (b, n) → context (b, n, 128) and pooled vector (b, 64)."""

    def __init__(self, text_embedding: Tensor, style_embedding: Tensor):
        super().__init__()
        self.text = nn.Embedding.from_pretrained(text_embedding)
        self.style = nn.Embedding.from_pretrained(style_embedding)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        # A style's token ids are 1 and 2 and stand only where the caption names it; row 2 of the table is "no style".
        named = torch.stack([(ids == row + 1).any(dim=1) for row in range(len(STYLES))], dim=1)  # (b, 2)
        row = torch.where(named.any(dim=1), named.int().argmax(dim=1), len(STYLES))  # (b,)
        return self.text(ids), self.style(row)


class TinyCLIP:
    """A CLIP object for the tiny model. Attribute names are the host's."""

    def __init__(self, encoder: TinyTextEncoder, vocabulary: Vocabulary, placement: Placement = ALONE):
        self.cond_stage_model = encoder
        self.tokenizer = vocabulary
        self.placement = placement
        self.patcher = placement.patcher
        self.layer_idx: int | None = None
        self.tokenizer_options: dict[str, Any] = {}
        self.use_clip_schedule = False
        self.apply_hooks_to_conds = None

    def clone(self) -> TinyCLIP:
        copy = TinyCLIP(self.cond_stage_model, self.tokenizer, self.placement.cloned())
        copy.layer_idx = self.layer_idx
        copy.tokenizer_options = dict(self.tokenizer_options)
        copy.use_clip_schedule = self.use_clip_schedule
        copy.apply_hooks_to_conds = self.apply_hooks_to_conds
        return copy

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs) -> dict[str, list]:
        """Eight (id, weight) pairs; with `return_word_ids` triples whose third number counts the words from 1, padding 0."""
        prompt = self.tokenizer.parse(text)
        complaint = self.tokenizer.complaint(prompt)
        if complaint:
            logging.warning("Tiny model prompt: %s", complaint)
        if return_word_ids:
            return {STREAM: [[(token, 1.0, place if token else 0) for place, token in enumerate(prompt.ids, start=1)]]}
        return {STREAM: [[(token, 1.0) for token in prompt.ids]]}

    def encode_from_tokens(self, tokens: dict[str, list], return_pooled=False, return_dict: bool = False):
        """Context (1, 8, 128); with `return_pooled` also the pooled vector (1, 64); with `return_dict` both by name."""
        if STREAM not in tokens:
            allowed = f"tokens that hold '{STREAM}'"
            raise input_error("CLIP Text Encode", "tokens", sorted(tokens), allowed, "Use the CLIP that made the tokens.")
        self.load_model()
        ids = torch.tensor([[entry[0] for entry in row] for row in tokens[STREAM]], device=self.cond_stage_model.text.weight.device)
        context, pooled = (part.to(self.placement.output_device) for part in self.cond_stage_model(ids))
        if return_dict:
            return self.add_hooks_to_dict({"cond": context, "pooled_output": pooled})
        return (context, pooled) if return_pooled else context

    def encode_from_tokens_scheduled(self, tokens, unprojected: bool = False, add_dict: dict | None = None, show_pbar: bool = True) -> list:
        """CONDITIONING: one [context, {"pooled_output": …}] entry; `add_dict` joins the dictionary."""
        entry = self.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
        context = entry.pop("cond")
        return [[context, {**entry, **(add_dict or {})}]]

    def encode(self, text: str) -> Tensor:
        return self.encode_from_tokens(self.tokenize(text))

    def add_hooks_to_dict(self, pooled: dict[str, Any]) -> dict[str, Any]:
        if self.apply_hooks_to_conds:
            pooled["hooks"] = self.apply_hooks_to_conds
        return pooled

    def clip_layer(self, layer_idx: int) -> None:
        """Kept for nodes that set it; the encoder is one layer deep, so the choice changes nothing."""
        self.layer_idx = layer_idx

    def set_tokenizer_option(self, option_name: str, value: Any) -> None:
        self.tokenizer_options[option_name] = value

    def add_patches(self, patches, strength_patch: float = 1.0, strength_model: float = 1.0):
        return self.patcher.add_patches(patches, strength_patch, strength_model)

    def get_key_patches(self):
        return self.patcher.get_key_patches()

    def load_model(self):
        self.placement.load(self.patcher)
        return self.patcher

    def get_sd(self) -> dict[str, Tensor]:
        return self.cond_stage_model.state_dict()
