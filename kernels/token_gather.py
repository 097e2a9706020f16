"""Rows of tokens taken out, put back and written into a cache, with an index of their own for each sample.

The three moves of a forward over part of the tokens ("Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389):

    gather   out[b, j] = x[b, index[b, j]]
    scatter  out[b, index[b, j]] = rows[b, j], zero elsewhere
    write    cache[b, index[b, j]] = rows[b, j], in place

`dim` is the token axis. Each takes one tensor, or a tuple of them that share the index: keys and values, the residuals of a ControlNet.

    reference   torch's gather and scatter with the index of every element
    torch       a batch of one index serves every sample and is one contiguous copy; else a copy a sample
    Triton      one launch for up to four tensors and all samples, where torch takes one for each; rows are moved as integers of their
                width, whatever they mean
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from .backend import takes_triton
from .form import Form

try:
    import triton
    import triton.language as tl
except ImportError:  # said by `unfit`; the torch path needs nothing of it
    triton = None

__all__ = ["aot_forms", "gather_tokens", "reference", "scatter_tokens", "unfit", "write_tokens"]

TOGETHER = 4  # tensors of a launch
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what a row's elements are moved as, by their bytes
BLOCK_M = 16  # rows of a program: 16 × 256 elements are 16 a thread, two reads of 16 bytes in a 16-bit dtype
BLOCK_C = 256  # elements of a row at a time; a head has 64 to 128, a token 1536 and more


def reference(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Gather by the index of every element."""
    batch = max(len(x), len(index))
    shape = [batch] + [1] * (x.ndim - 1)
    shape[dim] = index.shape[1]
    full = [batch, *x.shape[1:]]
    full[dim] = index.shape[1]
    return x.expand(batch, *x.shape[1:]).gather(dim, index.expand(batch, -1).reshape(shape).expand(full))


def _gather(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    if x.shape[0] == 1:
        x = x.expand(index.shape[0], *x.shape[1:])
    return torch.stack([sample.index_select(dim - 1, rows) for sample, rows in zip(x, index)])


def _write(cache: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, dim: int) -> None:
    if cache.dtype.itemsize == 1 and cache.is_floating_point():  # no index_copy for 8-bit floats; their bytes have one
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    if index.shape[0] == 1:
        cache.index_copy_(dim, index[0], rows)
        return
    for sample, places, values in zip(cache, index, rows):
        sample.index_copy_(dim - 1, places, values)


def unfit(xs: Sequence[torch.Tensor], axes: Collection[int], written: bool) -> str:
    """Why the kernel cannot be used for these tensors, whose tokens lie on `axes`; an empty string where it can."""
    if triton is None:
        return "is not installed"
    if len(axes) > 1:
        return f"moves tensors whose tokens lie on one axis, got {', '.join(map(str, sorted(axes)))}"
    if written and not all(x.is_contiguous() for x in xs):
        return "writes into contiguous tensors"
    if any(x.dtype.itemsize not in WORDS for x in xs):
        return "moves elements of 1, 2, 4 or 8 bytes"
    return ""


if triton is not None:

    @triton.jit
    def _move(
        from_ptr, to_ptr, index_ptr, part, length, count, words, inner, stride_index, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
        WRITE: tl.constexpr,
    ):  # fmt: skip
        """Part `part` = sample·inner + what lies between batch and tokens: `count` rows of `words`, of `length` in the whole."""
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        place = tl.load(index_ptr + part // inner * stride_index + row, mask=row < count, other=0)
        few = (part.to(tl.int64) * count + row)[:, None] * words
        many = (part.to(tl.int64) * length + place)[:, None] * words
        for first in range(0, words, BLOCK_C):
            word = first + tl.arange(0, BLOCK_C)[None, :]
            there = (row < count)[:, None] & (word < words)
            if WRITE:
                tl.store(to_ptr + many + word, tl.load(from_ptr + few + word, mask=there), mask=there)
            else:
                tl.store(to_ptr + few + word, tl.load(from_ptr + many + word, mask=there), mask=there)

    @triton.jit
    def move_kernel(
        from0_ptr, from1_ptr, from2_ptr, from3_ptr, to0_ptr, to1_ptr, to2_ptr, to3_ptr, index_ptr, length, count, inner, stride_index,
        words0, words1, words2, words3, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, WRITE: tl.constexpr,
    ):  # fmt: skip
        part, which = tl.program_id(1), tl.program_id(2)
        if which == 0:
            _move(from0_ptr, to0_ptr, index_ptr, part, length, count, words0, inner, stride_index, BLOCK_M, BLOCK_C, WRITE)
        elif which == 1:
            _move(from1_ptr, to1_ptr, index_ptr, part, length, count, words1, inner, stride_index, BLOCK_M, BLOCK_C, WRITE)
        elif which == 2:
            _move(from2_ptr, to2_ptr, index_ptr, part, length, count, words2, inner, stride_index, BLOCK_M, BLOCK_C, WRITE)
        else:
            _move(from3_ptr, to3_ptr, index_ptr, part, length, count, words3, inner, stride_index, BLOCK_M, BLOCK_C, WRITE)


def _launch(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], index: torch.Tensor, dim: int, write: bool) -> None:
    """Contiguous tensors; those of one dtype's width and one shape up to the token axis go together."""
    together: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for source, target in zip(sources, targets):
        whole = target if write else source
        together.setdefault((whole.dtype.itemsize, whole.shape[1 : dim + 1]), []).append((source, target))
    index = index.contiguous()
    for (width, (*between, length)), pairs in together.items():
        inner, batch = torch.Size(between).numel(), len(pairs[0][1])
        for start in range(0, len(pairs), TOGETHER):
            group = pairs[start : start + TOGETHER]
            words = [source.shape[dim + 1 :].numel() for source, _ in group]
            filled = [*group, *[group[-1]] * (TOGETHER - len(group))]
            flat = [part.view(WORDS[width]) for side in zip(*filled) for part in side]
            words += [words[-1]] * (TOGETHER - len(words))
            count = index.shape[1]
            move_kernel[(triton.cdiv(count, BLOCK_M), batch * inner, len(group))](
                *flat, index, length, count, inner, count if len(index) > 1 else 0, *words, BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C, WRITE=write,
                num_warps=4,
            )  # fmt: skip


def gather_launch(xs: Sequence[torch.Tensor], index: torch.Tensor, dim: int) -> list[torch.Tensor]:
    batch = len(index)
    xs = [x.expand(max(batch, len(x)), *x.shape[1:]).contiguous() for x in xs]
    outs = [x.new_empty([*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :]]) for x in xs]
    if index.numel():
        _launch(xs, outs, index, dim, write=False)
    return outs


def write_launch(caches: Sequence[torch.Tensor], index: torch.Tensor, rows: Sequence[torch.Tensor], dim: int) -> None:
    if index.numel():
        _launch([part.contiguous() for part in rows], caches, index, dim, write=True)


@torch.library.custom_op("rectiflow::gather_tokens", mutates_args=(), schema="(Tensor[] xs, Tensor index, int dim) -> Tensor[]")
def _gather_operator(xs, index, dim):
    return gather_launch(xs, index, dim) if index.is_cuda else [_gather(x, index, dim) for x in xs]


@_gather_operator.register_fake
def _(xs, index, dim):
    batch = len(index)
    return [x.new_empty([max(batch, x.shape[0]), *x.shape[1:dim], index.shape[1], *x.shape[dim + 1 :]]) for x in xs]


@torch.library.custom_op(
    "rectiflow::write_tokens", mutates_args=("caches",), schema="(Tensor(a!)[] caches, Tensor index, Tensor[] rows, int dim) -> ()"
)
def _write_operator(caches, index, rows, dim):
    if index.is_cuda:
        write_launch(caches, index, rows, dim)
    else:
        for cache, part in zip(caches, rows):
            _write(cache, index, part, dim)


@_write_operator.register_fake
def _(caches, index, rows, dim):
    return None


def _axis(x: torch.Tensor, index: torch.Tensor, dim: int, shared_batch: bool = False) -> int:
    """The token axis counted from the front; refuses an index that does not belong to x."""
    axis = dim % x.ndim
    if axis == 0 or index.ndim != 2 or index.shape[0] not in (1, x.shape[0]) and not (shared_batch and x.shape[0] == 1):
        given = f"token index {tuple(index.shape)} does not fit tokens {tuple(x.shape)} along axis {dim}"
        raise ValueError(f"{given}: (1 or batch, count) is needed")
    return axis


def _kernel(xs: Sequence[torch.Tensor], axes: Collection[int], backend: str, written: bool = False) -> bool:
    """Whether Triton moves these tensors."""
    followed = torch.is_grad_enabled() and any(x.requires_grad for x in xs)  # torch knows the derivative of its own moves alone
    return takes_triton("token_gather", backend, xs[0].is_cuda and not followed, lambda: unfit(xs, axes, written))


def gather_tokens(x, index: torch.Tensor, dim: int = 1, backend: str = "auto"):
    """Rows `index` (1 or b, a) of x (b, …, n, …) along `dim`: (b, …, a, …), a tensor of its own; of a tuple, each as a list.

    backend: auto (Triton on CUDA where it is installed, else torch), torch or triton.
    """
    xs = [x] if isinstance(x, torch.Tensor) else list(x)
    axes = {_axis(part, index, dim, shared_batch=True) for part in xs}
    if _kernel(xs, axes, backend):
        found = (_gather_operator if index.is_cuda else gather_launch)(xs, index, axes.pop())
    else:
        found = [_gather(part, index, dim % part.ndim) for part in xs]
    return found[0] if isinstance(x, torch.Tensor) else found


def scatter_tokens(rows: torch.Tensor, index: torch.Tensor, length: int, dim: int = 1, backend: str = "auto") -> torch.Tensor:
    """(b, …, a, …) → (b, …, length, …) with zeros where no row belongs."""
    axis = _axis(rows, index, dim)
    shape = list(rows.shape)
    shape[axis] = length
    return write_tokens(rows.new_zeros(shape), index, rows, axis, backend)


def write_tokens(cache, index: torch.Tensor, rows, dim: int = 1, backend: str = "auto"):
    """Write rows (b, …, a, …), of the cache's dtype, into cache (b, …, n, …); of tuples, each into its own. Returns the cache."""
    caches, parts = ([cache], [rows]) if isinstance(cache, torch.Tensor) else (list(cache), list(rows))
    axes = {_axis(part, index, dim) for part in caches}
    if _kernel(caches, axes, backend, written=True):
        (_write_operator if index.is_cuda else write_launch)(caches, index, parts, axes.pop())
    else:
        for part, values in zip(caches, parts):
            _write(part, index, values, dim % part.ndim)
    return cache


def aot_forms(major: int) -> list[Form]:
    """The forms that bench/kernels.py compiles without a device; the same for every compute capability."""
    integers = ("length", "count", "inner", "stride_index", "words0", "words1", "words2", "words3")
    forms = []
    for write in (False, True):
        for word in ("i16", "i32"):
            types = {f"{side}{i}_ptr": f"*{word}" for side in ("from", "to") for i in range(TOGETHER)} | {"index_ptr": "*i64"}
            types |= {name: "i32" for name in integers}
            constants = {"BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C, "WRITE": write}
            name = f"{'write' if write else 'gather'}_tokens {word}"
            forms.append(Form(name, move_kernel, types, constants, {"num_warps": 4, "num_stages": 3}, integers[4:]))
    return forms
