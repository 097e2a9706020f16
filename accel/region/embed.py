"""Tokens of NextDiT (Lumina 2), which offers no block patches: object patches on what makes its tokens and on what ends them.

Both patches hand everything on where no call over part of the tokens is running. Which one is running stands in a context variable, because
`unpatchify` is given no options; layers are numbered by the attentions after `patchify_and_embed`, whose own refiners come before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .hooks import LAYER, PartialCall, Unfit

__all__ = ["NAMES", "embed_patches", "running"]

NAMES = ("patchify_and_embed", "unpatchify")
_RUNNING: ContextVar[PartialCall | None] = ContextVar("rectiflow_ras_call", default=None)


@contextmanager
def running(call: PartialCall) -> Iterator[None]:
    token = _RUNNING.set(call)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def embed_patches(embed: Callable, unpatchify: Callable) -> tuple[Callable, Callable]:
    """The two methods, bound to the model, with our part around them."""

    def patched_embed(*args, transformer_options: dict | None = None, **kwargs):
        given = {} if transformer_options is None else transformer_options
        tokens, mask, sizes, captions, freqs = embed(*args, transformer_options=given, **kwargs)
        call = _RUNNING.get()
        if call is None:
            return tokens, mask, sizes, captions, freqs
        if len(set(captions)) != 1:
            raise Unfit("captions of several lengths in one call")
        text = int(captions[0])
        call.enter(text, tokens.shape[1] - text, tokens.shape[0])
        tag = given.get(LAYER)
        if tag is not None:
            tag.name, tag.calls = "layer", 0
        return call.take_joint(tokens), call.key_mask(mask), sizes, captions, call.rotations(freqs)

    def patched_unpatchify(x: torch.Tensor, *args, **kwargs) -> Any:
        call = _RUNNING.get()
        return unpatchify(x if call is None else call.put_joint(x), *args, **kwargs)

    return patched_embed, patched_unpatchify
