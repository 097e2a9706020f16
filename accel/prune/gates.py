"""A function around every block of a MODEL: it sees the tokens before a block and decides what comes after it.

The block's `forward` is exchanged by an object patch, so the network keeps its modules, names and weights, LoRAs and weight wrappers stay
where they are, and families without block patches are reached as well. What hangs in patches_replace runs around it.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from ...families.stack import StackBlock, State
from .identity import NETWORK, original_module

__all__ = ["Handler", "gate_blocks", "own"]

# (block, tokens before it, run) → tokens after it; run() computes the block, run(state) computes it on other tokens, and
# run(state, module) another module with the rest of the block's arguments.
Handler = Callable[[StackBlock, State, Callable[..., State]], State]


def own(state: State) -> State:
    """Copies: a host's blocks write into the tokens they are given. A stream that ends (SD3's last block) stays None."""
    return tuple(tokens if tokens is None else tokens.clone() for tokens in state)


def gate_blocks(model: Any, blocks: Iterable[StackBlock], handler: Handler) -> Any:
    """A clone of MODEL `model` with `handler` around each of `blocks`."""
    patched = model.clone()
    for block in blocks:
        name = f"{NETWORK}{block.path}.forward"
        module = patched.object_patches.get(NETWORK + block.path) or original_module(model, block.path)
        original = patched.object_patches.get(name) or functools.partial(type(module).forward, module)
        patched.add_object_patch(name, _gated(block, original, handler))
    patched.patches_uuid = uuid.uuid4()  # an object patch alone does not tell the host that the network changes
    return patched


def _gated(block: StackBlock, original: Callable, handler: Handler) -> Callable:
    def forward(*args, **kwargs):
        state = block.read(args, kwargs)

        def run(given: State = state, module: Callable | None = None) -> State:
            new_args, new_kwargs = block.put(args, kwargs, given)
            return block.unpack((module or original)(*new_args, **new_kwargs))

        return block.pack(handler(block, state, run))

    return forward
