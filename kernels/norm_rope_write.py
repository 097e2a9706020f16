"""Norm and rotation of queries and keys, and the write of keys and values into a cache that holds more tokens, in one pass.

    q̂[j] = R(j)·(q[j]/√(mean q[j]² + ε)·g_q),   k̂[j] likewise with g_k
    cache_k[place[j]] = k̂[j],   cache_v[place[j]] = v[j];   q̂ is returned

For a forward over part of the tokens ("Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389): place[j] is where token j
of the call stands in the whole sequence, R(j) the rotation of that place, neighbouring channels (2i, 2i+1) a pair.

q, k, v (b, h, a, d); place (1 or b, a); rotations (1 or b, a, d/2, 2, 2) = [[cos, −sin], [sin, cos]] times any amplitude, or None; scales
g (s, d) or None for no norm: row 0 for the first `text` tokens, the last row for the others, as a block with a stream of text has them;
cache_k, cache_v (b, h, n, d). Arithmetic is in float32; q̂ and the caches are rounded once.

    reference   the steps as a model takes them, each rounded to the tensors' dtype
    torch       float32 in place of a rounding a step, index_copy into the cache
    Triton      a program has 32 tokens of a head: rows of 64 to 128 channels are one to two cache lines. 12·a·h·d bytes in 16 bit, where
                the steps of a model move about 90·a·h·d: float32 copies for the rotation, concatenations, and the write
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .backend import takes_triton
from .form import Form
from .token_gather import write_tokens

try:
    import triton
    import triton.language as tl
except ImportError:  # said by `unfit`; the torch path needs nothing of it
    triton = None

__all__ = ["QKNorm", "aot_forms", "norm_rope_write", "reference", "torch_path", "unfit"]

TOKENS = 32  # of a program: with 128 channels, 32 values a thread of 4 warps for each of even and odd channels, rotation and weights
WIDEST = 256  # channels of a head, beyond which a tile would not fit the registers


@dataclass(frozen=True, eq=False)
class QKNorm:
    """g_q, g_k (s, d), s 1 or 2, and ε."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float = 1e-6


def _normed(x: torch.Tensor, scale: torch.Tensor | None, eps: float, text: int) -> torch.Tensor:
    if scale is None:
        return x
    parts = zip(x.split((text, x.shape[2] - text), dim=2), (scale[0], scale[-1])) if len(scale) > 1 else [(x, scale[0])]
    normed = [F.rms_norm(rows, rows.shape[-1:], weight.to(x.dtype), eps) for rows, weight in parts]
    return normed[0] if len(normed) == 1 else torch.cat(normed, dim=2)


def _turned(x: torch.Tensor, rotations: torch.Tensor | None) -> torch.Tensor:
    """x (b, h, a, d) by rotations (1 or b, a, d/2, 2, 2), in the rotations' dtype."""
    if rotations is None:
        return x
    pe, pairs = rotations[:, None], x.to(rotations.dtype).unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2)


def reference(q, k, v, cache_k, cache_v, place, rotations=None, norm: QKNorm | None = None, text: int = 0) -> torch.Tensor:
    """As norm_rope_write."""
    found = []
    for x, scale in ((q, norm and norm.q), (k, norm and norm.k)):
        found.append(_turned(_normed(x, scale, norm.eps if norm else 0.0, text), rotations).to(x.dtype))
    for sample in range(len(q)):
        for j, to in enumerate(place[sample % len(place)].tolist()):
            cache_k[sample, :, to], cache_v[sample, :, to] = found[1][sample, :, j].to(cache_k.dtype), v[sample, :, j].to(cache_v.dtype)
    return found[0]


def torch_path(q, k, v, cache_k, cache_v, place, rotations=None, norm: QKNorm | None = None, text: int = 0) -> torch.Tensor:
    """As norm_rope_write."""
    eps = norm.eps if norm else 0.0
    turned = [_normed(x.float(), scale, eps, text) for x, scale in ((q, norm and norm.q), (k, norm and norm.k))]
    if rotations is not None:  # one complex product in place of four real ones and a sum
        turn = torch.view_as_complex(rotations[..., 0].float().contiguous())[:, None]  # cos + i·sin
        pairs = [torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) for x in turned]
        turned = [torch.view_as_real(x * turn).flatten(-2) for x in pairs]
    write_tokens((cache_k, cache_v), place, (turned[1].to(cache_k.dtype), v.to(cache_v.dtype)), 2, backend="torch")
    return turned[0].to(q.dtype, copy=turned[0] is q)


def unfit(q: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor) -> str:
    """Why the kernel cannot be used for these tensors; an empty string where it can."""
    if triton is None:
        return "is not installed"
    if q.shape[-1] > WIDEST or q.shape[-1] % 2:
        return f"takes heads of an even number of channels up to {WIDEST}, not {q.shape[-1]}"
    if any(x.dtype not in (torch.float16, torch.bfloat16, torch.float32) for x in (q, cache_k)):
        return f"does not take {q.dtype} and a cache of {cache_k.dtype}"
    return "" if cache_k.is_contiguous() and cache_v.is_contiguous() else "needs contiguous caches"


if triton is not None:

    @triton.jit
    def _normed_and_turned(
        x_ptr, place, weight_ptr, rotation, stream, inside, there, width, eps, TOKENS: tl.constexpr, PADDED: tl.constexpr,
        NORM: tl.constexpr, ROPE: tl.constexpr,
    ):  # fmt: skip
        """(TOKENS, PADDED) float32."""
        channel = tl.arange(0, PADDED)
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        if NORM:
            weight = tl.load(weight_ptr + stream[:, None] * width + channel[None, :], mask=there, other=0.0).to(tl.float32)
            x = x * tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None] * weight
        if ROPE:
            even, odd = tl.split(tl.reshape(x, (TOKENS, PADDED // 2, 2)))
            pair = tl.arange(0, PADDED // 2)
            known = inside[:, None] & (pair < width // 2)[None, :]
            cosine = tl.load(rotation + pair[None, :] * 4, mask=known, other=0.0)
            sine = tl.load(rotation + pair[None, :] * 4 + 2, mask=known, other=0.0)
            x = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (TOKENS, PADDED))
        return x

    @triton.jit
    def norm_rope_write_kernel(
        q_ptr, k_ptr, v_ptr, out_ptr, cache_k_ptr, cache_v_ptr, place_ptr, rotation_ptr, weight_q_ptr, weight_k_ptr, count, heads, width,
        length, text, streams, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, stride_place, stride_rotation, eps,
        TOKENS: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    ):  # fmt: skip
        head, sample = tl.program_id(1), tl.program_id(2)
        row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        inside = row < count
        channel = tl.arange(0, PADDED)
        there = inside[:, None] & (channel < width)[None, :]
        stream = tl.where(row < text, 0, streams - 1)
        rotation = rotation_ptr + sample.to(tl.int64) * stride_rotation + row[:, None] * (width * 2)
        pair = sample.to(tl.int64) * heads + head

        place = row[:, None] * q_n + channel[None, :]
        q = _normed_and_turned(
            q_ptr + sample.to(tl.int64) * q_b + head * q_h, place, weight_q_ptr, rotation, stream, inside, there, width, eps,
            TOKENS, PADDED, NORM, ROPE,
        )  # fmt: skip
        tl.store(out_ptr + pair * count * width + row[:, None] * width + channel[None, :], q.to(out_ptr.dtype.element_ty), mask=there)

        to = tl.load(place_ptr + sample * stride_place + row, mask=inside, other=0)
        target = pair * length * width + to.to(tl.int64)[:, None] * width + channel[None, :]
        place = row[:, None] * k_n + channel[None, :]
        k = _normed_and_turned(
            k_ptr + sample.to(tl.int64) * k_b + head * k_h, place, weight_k_ptr, rotation, stream, inside, there, width, eps,
            TOKENS, PADDED, NORM, ROPE,
        )  # fmt: skip
        tl.store(cache_k_ptr + target, k.to(cache_k_ptr.dtype.element_ty), mask=there)
        v_place = row[:, None] * v_n + channel[None, :]
        v = tl.load(v_ptr + sample.to(tl.int64) * v_b + head * v_h + v_place, mask=there, other=0.0)
        tl.store(cache_v_ptr + target, v.to(cache_v_ptr.dtype.element_ty), mask=there)


def _padded(width: int) -> int:
    return 1 << (width - 1).bit_length()


def launch(q, k, v, cache_k, cache_v, place, rotations, norm: QKNorm | None, text: int) -> torch.Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, count, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    rotation = out if rotations is None else rotations.float().contiguous()
    weights = (out, out) if norm is None else (norm.q.contiguous(), norm.k.contiguous())
    place = place.contiguous()
    norm_rope_write_kernel[(triton.cdiv(count, TOKENS), heads, batch)](
        q, k, v, out, cache_k, cache_v, place, rotation, *weights, count, heads, width, cache_k.shape[2], text,
        len(weights[0]) if norm else 1, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], count if len(place) > 1 else 0,
        rotation.stride(0) if rotations is not None and len(rotations) > 1 else 0, norm.eps if norm else 0.0,
        TOKENS=TOKENS, PADDED=_padded(width), NORM=norm is not None, ROPE=rotations is not None, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op(
    "rectiflow::norm_rope_write", mutates_args=("cache_k", "cache_v"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor place, Tensor? rotations, Tensor? scale_q, "
    "Tensor? scale_k, float eps, int text) -> Tensor",
)  # fmt: skip
def _operator(q, k, v, cache_k, cache_v, place, rotations, scale_q, scale_k, eps, text):
    norm = None if scale_q is None else QKNorm(scale_q, scale_k, eps)
    run = launch if q.is_cuda else torch_path
    return run(q, k, v, cache_k, cache_v, place, rotations, norm, text)


@_operator.register_fake
def _(q, k, v, cache_k, cache_v, place, rotations, scale_q, scale_k, eps, text):
    return q.new_empty(q.shape)


def norm_rope_write(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor, place: torch.Tensor,
    rotations: torch.Tensor | None = None, norm: QKNorm | None = None, text: int = 0, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """q̂ (b, h, a, d); cache_k and cache_v (b, h, n, d) get k̂ and v at `place` (1 or b, a).

    Args:
        rotations: (1 or b, a, d/2, 2, 2) of the call's tokens, float32, or None. norm: weights, or None for none. text: tokens in front
            that take the norm's first weights.
        backend: auto (Triton on CUDA where it is installed and the caches are contiguous, else torch), torch or triton.

    Raises: ValueError for caches or an index that do not fit, or a backend that is not there.
    """
    batch, heads, count, width = q.shape
    same = q.shape == k.shape == v.shape and cache_k.shape == cache_v.shape
    fits = same and cache_k.shape[:2] + cache_k.shape[3:] == (batch, heads, width)
    if not fits or place.ndim != 2 or place.shape[0] not in (1, batch) or place.shape[1] != count or count > cache_k.shape[2]:
        given = f"q, k, v {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, place {tuple(place.shape)}, caches {tuple(cache_k.shape)}"
        raise ValueError(f"norm_rope_write: {given}, {tuple(cache_v.shape)} do not fit each other")
    if rotations is not None and (rotations.shape[0] not in (1, batch) or rotations.shape[1:] != (count, width // 2, 2, 2)):
        raise ValueError(f"norm_rope_write: rotations {tuple(rotations.shape)}; (1 or {batch}, {count}, {width // 2}, 2, 2) are needed")
    if not takes_triton("norm_rope_write", backend, q.is_cuda, lambda: unfit(q, cache_k, cache_v)):
        return torch_path(q, k, v, cache_k, cache_v, place, rotations, norm, text)
    if not q.is_cuda:
        return launch(q, k, v, cache_k, cache_v, place, rotations, norm, text)
    scale_q, scale_k, eps = (norm.q, norm.k, norm.eps) if norm else (None, None, 0.0)
    return _operator(q, k, v, cache_k, cache_v, place, rotations, scale_q, scale_k, eps, text)


def aot_forms(major: int) -> list[Form]:
    """The forms that bench/kernels.py compiles without a device; the same for every compute capability."""
    types = {f"{name}_ptr": "*bf16" for name in ("q", "k", "v", "out", "cache_k", "cache_v", "weight_q", "weight_k")}
    types |= {"place_ptr": "*i64", "rotation_ptr": "*fp32", "eps": "fp32"}
    strides = tuple(f"{name}_{axis}" for name in "qkv" for axis in "bhn")
    types |= {name: "i32" for name in ("count", "heads", "width", "length", "text", "streams", *strides, "stride_place", "stride_rotation")}
    forms = []
    for width, norm, rope in ((64, True, False), (96, True, True), (128, True, True)):
        constants = {"TOKENS": TOKENS, "PADDED": _padded(width), "NORM": norm, "ROPE": rope}
        name = f"norm_rope_write d{width}{'' if rope else ' without rope'}"
        aligned = (*strides, "width", "stride_rotation")
        forms.append(Form(name, norm_rope_write_kernel, types, constants, {"num_warps": 4, "num_stages": 2}, aligned))
    return forms
