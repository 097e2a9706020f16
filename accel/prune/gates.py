"""A function around every block of a MODEL: it sees the tokens before a block and decides what comes after it.

The block's `forward` is exchanged by an object patch, so the network keeps its modules, names and weights, LoRAs and weight wrappers stay
where they are, and families without block patches are reached as well. Where another module already stands in the block's place, a
stand-in of that one takes its place. What hangs in patches_replace runs around it.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ...families.stack import StackBlock, State
from .identity import NETWORK, original_module

__all__ = ["Handler", "StandIn", "gate_blocks", "own"]

# (block, tokens before it, run) → tokens after it; run() computes the block, run(state) computes it on other tokens, and
# run(state, module) another module with the rest of the block's arguments.
Handler = Callable[[StackBlock, State, Callable[..., State]], State]


def own(state: State) -> State:
    """Copies: a host's blocks write into the tokens they are given. A stream that ends (SD3's last block) stays None."""
    return tuple(tokens if tokens is None else tokens.clone() for tokens in state)


class StandIn(nn.Module):
    """`module` with another forward: its weights and layers are the same ones under the same names, so that patches of them fit both.

    extra: further modules, by name.
    """

    def __init__(self, module: nn.Module, forward: Callable, extra: dict[str, nn.Module] | None = None):
        super().__init__()
        self.__dict__["_parameters"], self.__dict__["_buffers"] = module._parameters, module._buffers
        self.__dict__["_modules"] = {**module._modules, **(extra or {})} if extra else module._modules
        self.__dict__["called"] = forward

    def __deepcopy__(self, memo):
        return self

    def forward(self, *args, **kwargs):
        return self.called(*args, **kwargs)


def gate_blocks(model: Any, blocks: Iterable[StackBlock], handler: Handler) -> Any:
    """A clone of MODEL `model` with `handler` around each of `blocks`."""
    patched = model.clone()
    for block in blocks:
        name = f"{NETWORK}{block.path}.forward"
        exchanged = patched.object_patches.get(NETWORK + block.path)
        if exchanged is not None:  # its forward would be put on the block it stands for when patches are taken off
            patched.add_object_patch(NETWORK + block.path, StandIn(exchanged, _gated(block, exchanged, handler)))
            continue
        module = original_module(model, block.path)
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
