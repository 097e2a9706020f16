"""Which heads and hidden neurons a block has, and where each of them lies in the block's weights.

A head or a neuron is a block of rows in the layers that make it (q, k and v; the MLP's first layer, both of them where it is gated) and a
block of columns in the layers that read it (the projection after attention; the MLP's second layer). Setting those columns to zero takes it
out; deleting them with its rows makes the layers smaller. Facts of ComfyUI 0.3.64:

    Flux, Chroma, HunyuanVideo   joint attention: a head is the same one of image and text; single blocks have one layer for
                                 [q | k | v | mlp] and one for [heads | mlp], and split by `hidden_size` and `mlp_hidden_dim`
    SD3                          joint attention, and in some blocks a second one of the image alone
    Qwen-Image                   six projections into joint attention, two out of it
    Lumina 2                     several query heads share a key head: they stay or go together
    Wan, LTX-Video               q and k are normalised over all heads at once, so that without a head the others would change: MLP only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .stack import Stack, StackBlock

__all__ = ["HEADS", "KINDS", "Span", "WidthGroup", "width_groups"]

HEADS = ("heads", "heads2")
KINDS = (*HEADS, "ffn", "txt_ffn")  # as plans name them; heads2: SD3's second attention; txt_ffn: the text's own MLP
Part = Callable[[str], Any]  # a path below the network → the module or number there as it was loaded


@dataclass(frozen=True)
class Span:
    """Unit u takes rows, or columns, start + u·size to start + (u + 1)·size of a layer."""

    layer: str
    start: int
    size: int


@dataclass(frozen=True)
class WidthGroup:
    """The heads, or the neurons, of one block.

    path: of the block. kind: one of KINDS. count: how many there are. rows: where the layers make them; columns: where others read them.
    fields: attribute below the network → how much of it one unit is.
    """

    path: str
    kind: str
    count: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    fields: tuple[tuple[str, int], ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.path, self.kind

    @property
    def name(self) -> str:
        return f"{self.path}.{self.kind}"

    @property
    def is_heads(self) -> bool:
        return self.kind in HEADS


def width_groups(stack: Stack, part: Part) -> tuple[WidthGroup, ...]:
    """The groups of every block of `stack`, in running order."""
    describe = _FAMILIES[stack.family]
    return tuple(group for block in stack.blocks for group in describe(block, lambda name, at=block.path: part(f"{at}.{name}")))


def _has(part: Part, name: str) -> bool:
    try:
        part(name)
    except AttributeError:
        return False
    return True


def _mlp(path: str, kind: str, part: Part, up: tuple[str, ...], down: str) -> Iterator[WidthGroup]:
    """None where the MLP is one linear map (accel/prune/linear_mlps.py)."""
    if _has(part, down):
        rows = tuple(Span(f"{path}.{name}", 0, 1) for name in up)
        yield WidthGroup(path, kind, part(down).in_features, rows, (Span(f"{path}.{down}", 0, 1),))


def _fields(path: str, part: Part, names: tuple[str, ...], size: int = 1) -> tuple[tuple[str, int], ...]:
    return tuple((f"{path}.{name}", size) for name in names if _has(part, name))


def _joint(path: str, kind: str, heads: int, width: int, fused: tuple[str, ...], out: tuple[str, ...], fields: tuple) -> WidthGroup:
    """Attention whose layers in `fused` hold the rows [q | k | v], each as wide as `width`."""
    size = width // heads
    rows = tuple(Span(f"{path}.{layer}", third * width, size) for layer in fused for third in range(3))
    return WidthGroup(path, kind, heads, rows, tuple(Span(f"{path}.{layer}", 0, size) for layer in out), fields)


def _flux(block: StackBlock, part: Part) -> Iterator[WidthGroup]:
    path = block.path
    if block.kind == "double":
        fields = _fields(path, part, ("num_heads", "img_attn.num_heads", "txt_attn.num_heads"))
        heads, width = part("img_attn.num_heads"), part("img_attn.proj").in_features
        fused, out = ("img_attn.qkv", "txt_attn.qkv"), ("img_attn.proj", "txt_attn.proj")
        yield _joint(path, "heads", heads, width, fused, out, fields)
        yield from _mlp(path, "ffn", part, ("img_mlp.0",), "img_mlp.2")
        yield from _mlp(path, "txt_ffn", part, ("txt_mlp.0",), "txt_mlp.2")
        return
    hidden, heads, mlp = part("hidden_size"), part("num_heads"), part("mlp_hidden_dim")
    fields = ((f"{path}.num_heads", 1), (f"{path}.hidden_size", hidden // heads))
    yield _joint(path, "heads", heads, hidden, ("linear1",), ("linear2",), fields)
    rows, columns = (Span(f"{path}.linear1", 3 * hidden, 1),), (Span(f"{path}.linear2", hidden, 1),)
    yield WidthGroup(path, "ffn", mlp, rows, columns, ((f"{path}.mlp_hidden_dim", 1),))


def _sd3(block: StackBlock, part: Part) -> Iterator[WidthGroup]:
    path, streams = block.path, ("x_block", "context_block")
    heads, width = part("x_block.attn.num_heads"), part("x_block.attn.proj").in_features
    out = tuple(f"{stream}.attn.proj" for stream in streams if _has(part, f"{stream}.attn.proj"))  # the last block's text ends in k and v
    fields = _fields(path, part, tuple(f"{stream}.attn.num_heads" for stream in streams))
    yield _joint(path, "heads", heads, width, tuple(f"{stream}.attn.qkv" for stream in streams), out, fields)
    if _has(part, "x_block.attn2"):
        fields = _fields(path, part, ("x_block.attn2.num_heads",))
        yield _joint(path, "heads2", part("x_block.attn2.num_heads"), width, ("x_block.attn2.qkv",), ("x_block.attn2.proj",), fields)
    yield from _mlp(path, "ffn", part, ("x_block.mlp.fc1",), "x_block.mlp.fc2")
    if _has(part, "context_block.mlp"):
        yield from _mlp(path, "txt_ffn", part, ("context_block.mlp.fc1",), "context_block.mlp.fc2")


def _qwen(block: StackBlock, part: Part) -> Iterator[WidthGroup]:
    path, heads = block.path, part("attn.heads")
    size = part("attn.to_out.0").in_features // heads
    made = tuple(Span(f"{path}.attn.{name}", 0, size) for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"))
    read = tuple(Span(f"{path}.attn.{name}", 0, size) for name in ("to_out.0", "to_add_out"))
    yield WidthGroup(path, "heads", heads, made, read, ((f"{path}.attn.heads", 1),))
    yield from _mlp(path, "ffn", part, ("img_mlp.net.0.proj",), "img_mlp.net.2")
    yield from _mlp(path, "txt_ffn", part, ("txt_mlp.net.0.proj",), "txt_mlp.net.2")


def _lumina(block: StackBlock, part: Part) -> Iterator[WidthGroup]:
    path = block.path
    queries, keys, head = (part(f"attention.{name}") for name in ("n_local_heads", "n_local_kv_heads", "head_dim"))
    shared, layer = queries // keys, f"{path}.attention.qkv"
    rows = (Span(layer, 0, shared * head), Span(layer, queries * head, head), Span(layer, (queries + keys) * head, head))
    fields = ((f"{path}.attention.n_local_heads", shared), (f"{path}.attention.n_local_kv_heads", 1))
    yield WidthGroup(path, "heads", keys, rows, (Span(f"{path}.attention.out", 0, shared * head),), fields)
    yield from _mlp(path, "ffn", part, ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2")


def _wan(block: StackBlock, part: Part) -> Iterator[WidthGroup]:
    yield from _mlp(block.path, "ffn", part, ("ffn.0",), "ffn.2")


def _ltx(block: StackBlock, part: Part) -> Iterator[WidthGroup]:
    yield from _mlp(block.path, "ffn", part, ("ff.net.0.proj",), "ff.net.2")


_FAMILIES = MappingProxyType({
    "Flux": _flux, "HunyuanVideo": _flux, "SD3": _sd3, "Qwen-Image": _qwen, "Lumina 2": _lumina, "Wan": _wan, "LTX-Video": _ltx,
})  # fmt: skip
