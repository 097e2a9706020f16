"""Lumina-Image 2.0's unified NextDiT (Qin et al. 2025, arXiv:2503.21758).

Two refiners prepare text and image apart, then one stream of blocks runs over text followed by image. Norms stand before and
after each sub-layer; keys and values may have fewer heads than queries. Names follow the published checkpoints. The network's
time runs from noise to picture and its output is the negative of the velocity that samplers here use; forward() turns both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from .attention import optimized_attention_masked
from .common import EmbedND, TimestepEmbedder, apply_rope, pad_to_patch_size, patchify, unpatchify
from .ops import LayerNorm, Linear, RMSNorm

__all__ = ["NextDiT", "NextDiTParams"]

_MAX_TIME_WIDTH = 1024  # the time vector is no wider than this


@dataclass(frozen=True)
class NextDiTParams:
    """Sizes of a NextDiT. axes_dims split a head's channels among (caption or picture index, row, column)."""

    in_channels: int
    patch_size: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_hidden: int
    cap_feat_dim: int
    axes_dims: tuple[int, ...]
    qk_norm: bool = True
    norm_eps: float = 1e-5
    theta: float = 10000.0

    def __post_init__(self):
        object.__setattr__(self, "axes_dims", tuple(self.axes_dims))
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(f"NextDiT: width {self.dim}, {self.n_heads} heads and {self.n_kv_heads} key heads do not divide each other")
        head = self.dim // self.n_heads
        if sum(self.axes_dims) != head or any(axis % 2 for axis in self.axes_dims) or len(self.axes_dims) != 3:
            raise ValueError(f"NextDiT: three even RoPE axes must sum to the head size {head}, not {list(self.axes_dims)}")


class JointAttention(nn.Module):
    def __init__(self, params: NextDiTParams, **made):
        super().__init__()
        head = params.dim // params.n_heads
        self.n_local_heads = params.n_heads
        self.n_local_kv_heads = params.n_kv_heads
        self.head_dim = head
        self.qkv = Linear(params.dim, (params.n_heads + 2 * params.n_kv_heads) * head, bias=False, **made)
        self.out = Linear(params.n_heads * head, params.dim, bias=False, **made)
        # Without an eps of its own, a norm takes the dtype's, as the published code does for these two.
        self.q_norm, self.k_norm = (RMSNorm(head, eps=None, **made) if params.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, freqs_cis: torch.Tensor, transformer_options: dict) -> torch.Tensor:
        """x (b, n, d), freqs_cis (b, n, 1, head/2, 2, 2) → (b, n, d)."""
        heads, kv_heads = self.n_local_heads, self.n_local_kv_heads
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split((heads, kv_heads, kv_heads), dim=2)  # (b, n, h, head)
        q, k = apply_rope(self.q_norm(q), freqs_cis), apply_rope(self.k_norm(k), freqs_cis)
        if kv_heads != heads:  # attention functions and overrides are given equal heads
            k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attn = optimized_attention_masked(q, k, v, heads, mask, skip_reshape=True, transformer_options=transformer_options)
        return self.out(attn)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x) (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int, **made):
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False, **made)
        self.w2 = Linear(hidden, dim, bias=False, **made)
        self.w3 = Linear(dim, hidden, bias=False, **made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class JointTransformerBlock(nn.Module):
    """x + tanh(gate)·norm2(f(norm1(x)·(1 + scale))) for attention, then the same for the MLP; text blocks have no scale and gate."""

    def __init__(self, params: NextDiTParams, modulation: bool = True, **made):
        super().__init__()
        dim = params.dim
        self.attention = JointAttention(params, **made)
        self.feed_forward = FeedForward(dim, params.ffn_hidden, **made)
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            self.add_module(name, RMSNorm(dim, eps=params.norm_eps, **made))
        self.modulation = modulation
        if modulation:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(min(dim, _MAX_TIME_WIDTH), 4 * dim, **made))

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, freqs_cis: torch.Tensor,
        adaln_input: torch.Tensor | None = None, transformer_options: dict | None = None,
    ) -> torch.Tensor:  # fmt: skip
        options = transformer_options or {}
        if not self.modulation:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), mask, freqs_cis, options))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale_attn, gate_attn, scale_mlp, gate_mlp = self.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=-1)  # (b, 1, d)
        attn = self.attention(self.attention_norm1(x) * (1 + scale_attn), mask, freqs_cis, options)
        x = torch.addcmul(x, gate_attn.tanh(), self.attention_norm2(attn))
        mlp = self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp))
        return torch.addcmul(x, gate_mlp.tanh(), self.ffn_norm2(mlp))


class FinalLayer(nn.Module):
    def __init__(self, params: NextDiTParams, **made):
        super().__init__()
        self.norm_final = LayerNorm(params.dim, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(params.dim, params.patch_size**2 * params.in_channels, **made)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(min(params.dim, _MAX_TIME_WIDTH), params.dim, **made))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm_final(x) * (1 + self.adaLN_modulation(c).unsqueeze(1)))


def _additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(b, m) with 1 = keep → (b, 1, m) added to scores; a float mask is additive already."""
    if not torch.is_floating_point(mask):
        mask = (mask - 1).to(dtype) * torch.finfo(dtype).max
    return mask.unsqueeze(1)


class NextDiT(nn.Module):
    """Velocity of a latent under text: forward(x (b, c, h, w), timesteps (b,) in 0…1, context (b, m, cap_feat_dim), num_tokens)."""

    def __init__(self, params: NextDiTParams, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        dim = params.dim
        self.dtype = dtype
        self.params = params
        self.in_channels = self.out_channels = params.in_channels
        self.patch_size = params.patch_size
        self.dim = dim
        self.n_heads = params.n_heads
        self.axes_dims = list(params.axes_dims)
        self.x_embedder = Linear(params.patch_size**2 * params.in_channels, dim, **made)
        self.noise_refiner = nn.ModuleList(JointTransformerBlock(params, **made) for _ in range(params.n_refiner_layers))
        self.context_refiner = nn.ModuleList(
            JointTransformerBlock(params, modulation=False, **made) for _ in range(params.n_refiner_layers)
        )
        self.t_embedder = TimestepEmbedder(min(dim, _MAX_TIME_WIDTH), **made)
        self.cap_embedder = nn.Sequential(
            RMSNorm(params.cap_feat_dim, eps=params.norm_eps, **made), Linear(params.cap_feat_dim, dim, **made)
        )  # fmt: skip
        self.layers = nn.ModuleList(JointTransformerBlock(params, **made) for _ in range(params.n_layers))
        self.norm_final = RMSNorm(dim, eps=params.norm_eps, **made)  # in the checkpoints, not in the forward
        self.final_layer = FinalLayer(params, **made)
        self.rope_embedder = EmbedND(dim=dim // params.n_heads, theta=params.theta, axes_dim=params.axes_dims)

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, num_tokens: int | None = None,
        attention_mask: torch.Tensor | None = None, **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        """Run the DIFFUSION_MODEL wrappers, then the network. There are no block hooks, as in ComfyUI 0.3.64.

        num_tokens: caption tokens in use, all when None. attention_mask: (b, m), 1 = a caption token in use, which stand first.
        Returns (b, c, h, w).
        """
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, kwargs.get("transformer_options") or {})
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, num_tokens, attention_mask, **kwargs)

    def _forward(self, x, timesteps, context, num_tokens=None, attention_mask=None, **kwargs):
        options = dict(kwargs.get("transformer_options") or {})
        height, width = x.shape[-2:]
        x = pad_to_patch_size(x, self.patch_size)
        time = self.t_embedder(1.0 - timesteps, dtype=x.dtype)
        tokens, mask, sizes, captions, freqs = self.patchify_and_embed(
            x, self.cap_embedder(context), attention_mask, time, num_tokens, transformer_options=options
        )  # fmt: skip

        options.update(total_blocks=len(self.layers), block_type="double")
        for i, layer in enumerate(self.layers):
            options["block_index"] = i
            tokens = layer(tokens, mask, freqs, time, transformer_options=options)
        tokens = self.final_layer(tokens, time)
        return -self.unpatchify(tokens, sizes, captions, return_tensor=True)[:, :, :height, :width]

    def unpatchify(
        self, x: torch.Tensor, img_size: list[tuple[int, int]], cap_size: list[int], return_tensor: bool = False
    ) -> torch.Tensor | list[torch.Tensor]:
        """Pictures (c, h, w) of the image tokens in x (b, n, p²·c), which follow each sample's caption; stacked with `return_tensor`."""
        pictures = []
        for sample, (height, width), length in zip(x, img_size, cap_size):
            rows, columns = height // self.patch_size, width // self.patch_size
            image = sample[None, length : length + rows * columns]
            pictures.append(unpatchify(image, self.patch_size, rows, columns, channels_last=True)[0])
        return torch.stack(pictures) if return_tensor else pictures

    @staticmethod
    def _caption_lengths(context: torch.Tensor, num_tokens: int | None, mask: torch.Tensor | None) -> list[int]:
        """Caption tokens in use, for each sample."""
        if mask is not None:
            return [int(length) for length in mask.sum(dim=1)]
        return [min(int(num_tokens or context.shape[1]), context.shape[1])] * context.shape[0]

    def _freqs(self, lengths: list[int], rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """Rotations (b, longest, 1, head/2, 2, 2): caption tokens count along axis 0, image tokens stay at their caption's length."""
        longest = max(lengths) + rows * columns
        ids = torch.zeros(len(lengths), longest, 3, device=like.device)
        for sample, length in zip(ids, lengths):
            sample[:length, 0] = torch.arange(length, device=like.device)
            image = sample[length : length + rows * columns]
            image[:, 0] = length
            image[:, 1] = torch.arange(rows, device=like.device).repeat_interleave(columns)
            image[:, 2] = torch.arange(columns, device=like.device).repeat(rows)
        if len(set(lengths)) == 1:
            ids = ids[:1].expand(len(lengths), -1, -1)
        return self.rope_embedder(ids).movedim(1, 2).to(like.dtype)

    def patchify_and_embed(
        self, x: torch.Tensor, cap_feats: torch.Tensor, cap_mask: torch.Tensor | None, t: torch.Tensor, num_tokens: int | None,
        transformer_options: dict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[int, int]], list[int], torch.Tensor]:  # fmt: skip
        """Refine caption and image and join them, under ComfyUI's name and order, so that object patches for one serve the other.

        Returns tokens (b, n, d), additive mask (b, 1, n) or None, picture sizes, caption lengths, rotations of all tokens.
        """
        caption, time, options = cap_feats, t, transformer_options or {}
        lengths = self._caption_lengths(caption, num_tokens, cap_mask)
        sizes = [tuple(x.shape[-2:])] * x.shape[0]
        rows, columns = (side // self.patch_size for side in x.shape[-2:])
        count = rows * columns
        freqs = self._freqs(lengths, rows, columns, x)
        uniform = len(set(lengths)) == 1
        cap_freqs = _caption_freqs(freqs, lengths, caption.shape[1])
        cap_mask = None if cap_mask is None else _additive_mask(cap_mask, x.dtype)
        for layer in self.context_refiner:
            caption = layer(caption, cap_mask, cap_freqs, transformer_options=options)

        image = self.x_embedder(patchify(x, self.patch_size, channels_last=True))
        if uniform:
            img_freqs = freqs[:, lengths[0] : lengths[0] + count]
        else:
            img_freqs = torch.stack([sample[length : length + count] for sample, length in zip(freqs, lengths)])
        for layer in self.noise_refiner:
            image = layer(image, None, img_freqs, time, transformer_options=options)

        if uniform:
            return torch.cat((caption[:, : lengths[0]], image), dim=1), None, sizes, lengths, freqs
        # Captions of several lengths: each sample is text, image, padding, and the padding is masked.
        tokens = image.new_zeros(len(lengths), freqs.shape[1], self.dim)
        mask = image.new_zeros(len(lengths), 1, freqs.shape[1])
        for i, length in enumerate(lengths):
            tokens[i, : length + count] = torch.cat((caption[i, :length], image[i]))
            mask[i, :, length + count :] = -torch.finfo(x.dtype).max
        return tokens, mask, sizes, lengths, freqs


def _caption_freqs(freqs: torch.Tensor, lengths: list[int], caption_tokens: int) -> torch.Tensor:
    """Rotations of the caption alone (b, caption_tokens, …), zero where a caption has ended."""
    if all(length == caption_tokens for length in lengths):
        return freqs[:, :caption_tokens]
    own = freqs.new_zeros(freqs.shape[0], caption_tokens, *freqs.shape[2:])
    for sample, source, length in zip(own, freqs, lengths):
        sample[:length] = source[:length]
    return own
