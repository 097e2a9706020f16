"""Every block of a transformer as a module: where it hangs, which of its arguments are tokens, and in which order it hands them back.

arch.py tells how block patches see a stack; this page tells how the network itself calls its blocks, so that a module can take another's
place, and it has NextDiT (Lumina 2), which offers no block patches. Facts of ComfyUI 0.3.64: Flux, Chroma and HunyuanVideo call double
blocks by name and take (img, txt) back; SD3 takes (context, x), and its last block hands no context on; Qwen-Image takes
(encoder_hidden_states, hidden_states); single blocks, Wan, LTX-Video and NextDiT take one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..errors import NodeInputError, input_error
from .blocks import block_layout
from .tokens import is_nextdit

__all__ = ["COUNTED_BY_WIDTH", "SUPPORTED", "Stack", "StackBlock", "State", "depth_is_counted", "stack_of"]

COUNTED_BY_WIDTH = "joint_blocks"  # of SD3: a loader makes as many as the network is wide, whatever the file has
SUPPORTED = "Flux, Chroma, SD3, Qwen-Image, HunyuanVideo, Wan, LTX-Video, Lumina 2"
State = tuple[Tensor, ...]  # the streams of tokens between two blocks, in the order a block hands them back

_TWO = (("double_blocks", "double", ("img", "txt"), ("img", "txt")), ("single_blocks", "single", ("x",), ("x",)))
_QWEN = ("hidden_states", "encoder_hidden_states")
_HOLDERS = MappingProxyType({
    "Flux": _TWO, "HunyuanVideo": _TWO,
    "SD3": (("joint_blocks", "double", ("context", "x"), ("context", "x")),),
    "Qwen-Image": (("transformer_blocks", "double", _QWEN, _QWEN[::-1]),),
    "LTX-Video": (("transformer_blocks", "double", ("x",), ("x",)),),
    "Wan": (("blocks", "double", ("x",), ("x",)),),
    "Lumina 2": (("layers", "double", ("x",), ("x",)),),
})  # fmt: skip


@dataclass(frozen=True)
class StackBlock:
    """One block.

    holder, index: the list that holds it and its place there. kind: as nodes write it, "double" or "single".
    takes: its first parameters, those that hold tokens. gives: the same in the order in which they come back.
    """

    holder: str
    index: int
    kind: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]

    @property
    def path(self) -> str:
        """Below the network: "double_blocks.3"."""
        return f"{self.holder}.{self.index}"

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.index}"

    @property
    def key(self) -> tuple[str, int]:
        """As patches_replace["dit"] names it."""
        return f"{self.kind}_block", self.index

    def read(self, args: tuple, kwargs: dict) -> State:
        """The tokens among the arguments of a call."""
        given = {**dict(zip(self.takes, args)), **kwargs}
        return tuple(given[name] for name in self.gives)

    def put(self, args: tuple, kwargs: dict, state: State) -> tuple[tuple, dict]:
        """The arguments of the same call with other tokens."""
        new = dict(zip(self.gives, state))
        placed = tuple(new[name] for name in self.takes[: len(args)])
        return (*placed, *args[len(self.takes) :]), {name: new.get(name, value) for name, value in kwargs.items()}

    def unpack(self, out: Any) -> State:
        return tuple(out) if len(self.gives) > 1 else (out,)

    def pack(self, state: State) -> Any:
        return tuple(state) if len(self.gives) > 1 else state[0]


@dataclass(frozen=True)
class Stack:
    """family: its name for messages; blocks: all of them in running order; fixed: those that cannot be left out."""

    family: str
    blocks: tuple[StackBlock, ...]
    fixed: tuple[StackBlock, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Holder → how many blocks it has."""
        counts: dict[str, int] = {}
        for block in self.blocks:
            counts[block.holder] = counts.get(block.holder, 0) + 1
        return counts

    def groups(self) -> list[tuple[StackBlock, ...]]:
        """The blocks, one tuple a holder."""
        return [tuple(block for block in self.blocks if block.holder == holder) for holder in self.counts]

    def at(self, path: str) -> StackBlock:
        return next(block for block in self.blocks if block.path == path)


def stack_of(transformer: Any, where: str) -> Stack:
    """The stack of `transformer` (a model's `diffusion_model`).

    Raises: NodeInputError for a family whose blocks cannot be exchanged.
    """
    if is_nextdit(transformer):
        family = "Lumina 2"
    else:
        try:
            family = block_layout(transformer, where).family
        except NodeInputError:
            raise input_error(where, "model", type(transformer).__name__, SUPPORTED, "Use one of these.") from None
    blocks = tuple(
        StackBlock(holder, index, kind, takes, gives)
        for holder, kind, takes, gives in _HOLDERS[family]
        for index in range(len(getattr(transformer, holder)))
    )
    return Stack(family, blocks, blocks[-1:] if family == "SD3" else ())


def depth_is_counted(transformer: Any) -> bool:
    """Whether loaders count this family's blocks in the file. SD3's follow from its width: blocks that a file lacks are made up."""
    return not hasattr(transformer, COUNTED_BY_WIDTH)
