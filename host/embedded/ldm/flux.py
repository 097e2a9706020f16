"""Flux (Black Forest Labs 2024): double blocks with own weights for text and image, then single blocks over both.

Names follow the published checkpoints. Token order is text, image. All sizes come from FluxParams, so that small models of the
same layout load too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from .attention import optimized_attention
from .common import (
    EmbedND,
    apply_rope,
    call_block,
    finite_in_half,
    modulate,
    pad_to_patch_size,
    patchify,
    timestep_embedding,
    unpatchify,
)
from .ops import LayerNorm, Linear, rms_norm

__all__ = ["DoubleStreamBlock", "Flux", "FluxParams", "SingleStreamBlock"]


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a Flux transformer. in_channels and out_channels are latent channels, before patches are folded in."""

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: float
    patch_size: int
    qkv_bias: bool
    guidance_embed: bool

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"Flux: hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads")
        head = self.hidden_size // self.num_heads
        if sum(self.axes_dim) != head or any(axis % 2 for axis in self.axes_dim) or len(self.axes_dim) != 3:
            raise ValueError(f"Flux: three even RoPE axes must sum to the head size {head}, not {list(self.axes_dim)}")


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, **made):
        super().__init__()
        self.in_layer = Linear(in_dim, hidden_dim, **made)
        self.out_layer = Linear(hidden_dim, hidden_dim, **made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class _Scale(nn.Module):
    """An RMS norm's weight under Flux's name for it."""

    def __init__(self, dim: int, **made):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim, **made), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.scale, 1e-6)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int, **made):
        super().__init__()
        self.query_norm = _Scale(head_dim, **made)
        self.key_norm = _Scale(head_dim, **made)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.query_norm(q), self.key_norm(k)


def _heads(qkv: torch.Tensor, heads: int, norm: QKNorm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(b, n, 3·heads·d) → normalised q, k and plain v, each (b, heads, n, d)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)  # (b, n, h, d)
    q, k = norm(q, k)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _attend(q, k, v, pe: torch.Tensor | None, mask: torch.Tensor | None, transformer_options: dict) -> torch.Tensor:
    """Attention over (b, h, n, d) with rotated q and k → (b, n, h·d)."""
    if pe is not None:
        q, k = apply_rope(q, pe), apply_rope(k, pe)
    return optimized_attention(q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=transformer_options)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, **made):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, dim * 3, bias=qkv_bias, **made)
        self.norm = QKNorm(dim // num_heads, **made)
        self.proj = Linear(dim, dim, **made)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _heads(self.qkv(x), self.num_heads, self.norm)


class Modulation(nn.Module):
    """vec (b, d) → shift, scale, gate for one or two sub-layers, each (b, 1, d)."""

    def __init__(self, dim: int, double: bool, **made):
        super().__init__()
        self.parts = 6 if double else 3
        self.lin = Linear(dim, self.parts * dim, **made)

    def forward(self, vec: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if vec.ndim == 2:
            vec = vec[:, None, :]
        return self.lin(F.silu(vec)).chunk(self.parts, dim=-1)


def _mlp(hidden_size: int, mlp_hidden: int, **made) -> nn.Sequential:
    return nn.Sequential(Linear(hidden_size, mlp_hidden, **made), nn.GELU(approximate="tanh"), Linear(mlp_hidden, hidden_size, **made))


def _norm(hidden_size: int) -> LayerNorm:
    return LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


class DoubleStreamBlock(nn.Module):
    """Image and text each with own weights; one attention over both."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, **made):
        super().__init__()
        mlp_hidden = int(hidden_size * mlp_ratio)
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(hidden_size, double=True, **made))
            self.add_module(f"{stream}_norm1", _norm(hidden_size))
            self.add_module(f"{stream}_attn", SelfAttention(hidden_size, num_heads, qkv_bias, **made))
            self.add_module(f"{stream}_norm2", _norm(hidden_size))
            self.add_module(f"{stream}_mlp", _mlp(hidden_size, mlp_hidden, **made))

    def forward(
        self, img: torch.Tensor, txt: torch.Tensor, vec: torch.Tensor, pe: torch.Tensor | None,
        attn_mask: torch.Tensor | None = None, transformer_options: dict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """img (b, n, d), txt (b, m, d), vec (b, d), pe (b, 1, m + n, head/2, 2, 2) → new img and txt."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_qkv = self.img_attn.heads(modulate(self.img_norm1(img), img_shift1, img_scale1))
        txt_qkv = self.txt_attn.heads(modulate(self.txt_norm1(txt), txt_shift1, txt_scale1))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv))  # (b, h, m + n, head)
        attn = _attend(q, k, v, pe, attn_mask, transformer_options or {})
        txt_attn, img_attn = attn.split((txt.shape[1], attn.shape[1] - txt.shape[1]), dim=1)

        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_attn))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(self.img_norm2(img), img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_attn))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(self.txt_norm2(txt), txt_shift2, txt_scale2)))
        return img, finite_in_half(txt)


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side over the joined tokens (Dehghani et al. 2023)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, **made):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.mlp_hidden_dim = int(hidden_size * mlp_ratio)
        self.linear1 = Linear(hidden_size, hidden_size * 3 + self.mlp_hidden_dim, **made)
        self.linear2 = Linear(hidden_size + self.mlp_hidden_dim, hidden_size, **made)
        self.norm = QKNorm(hidden_size // num_heads, **made)
        self.pre_norm = _norm(hidden_size)
        self.modulation = Modulation(hidden_size, double=False, **made)

    def forward(
        self, x: torch.Tensor, vec: torch.Tensor, pe: torch.Tensor | None,
        attn_mask: torch.Tensor | None = None, transformer_options: dict | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """x (b, m + n, d) → the same shape."""
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(self.pre_norm(x), shift, scale)).split((3 * self.hidden_size, self.mlp_hidden_dim), dim=-1)
        attn = _attend(*_heads(qkv, self.num_heads, self.norm), pe, attn_mask, transformer_options or {})
        out = self.linear2(torch.cat((attn, F.gelu(mlp, approximate="tanh")), dim=2))
        return finite_in_half(torch.addcmul(x, gate, out))


class LastLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int, **made):
        super().__init__()
        self.norm_final = _norm(hidden_size)
        self.linear = Linear(hidden_size, out_features, **made)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size, **made))

    def forward(self, x: torch.Tensor, vec: torch.Tensor) -> torch.Tensor:
        if vec.ndim == 2:
            vec = vec[:, None, :]
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def _reference_offsets(refs: list[torch.Tensor], method: str, target: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(index, row, column) in latent cells where each reference latent is placed.

    "index": each under an index of its own. "uxo": along the diagonal after the picture, as UNO was trained (Wu et al. 2025).
    Otherwise: index 1, each beside or below the former ones, whichever keeps the whole squarer.
    """
    places = []
    h = w = 0
    for number, ref in enumerate(refs, start=1):
        rows, columns = ref.shape[-2:]
        if method == "index":
            places.append((number, 0, 0))
        elif method == "uxo":
            places.append((0, target[0] + h, target[1] + w))
            h, w = h + rows, w + columns
        else:
            row, column = (0, w) if rows + h > columns + w else (h, 0)
            places.append((1, row, column))
            h, w = max(h, rows + row), max(w, columns + column)
    return places


class Flux(nn.Module):
    """Velocity of a latent under text: forward(x (b, c, h, w), timestep (b,) in 0…1, context (b, m, context_in_dim), …)."""

    def __init__(self, params: FluxParams, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        hidden = params.hidden_size
        self.dtype = dtype
        self.params = params
        self.patch_size = params.patch_size
        self.in_channels = params.in_channels * params.patch_size**2
        self.out_channels = params.out_channels * params.patch_size**2
        self.hidden_size = hidden
        self.num_heads = params.num_heads
        self.pe_embedder = EmbedND(dim=hidden // params.num_heads, theta=params.theta, axes_dim=params.axes_dim)
        self.img_in = Linear(self.in_channels, hidden, **made)
        self.time_in = MLPEmbedder(256, hidden, **made)
        self.vector_in = MLPEmbedder(params.vec_in_dim, hidden, **made)
        self.guidance_in = MLPEmbedder(256, hidden, **made) if params.guidance_embed else nn.Identity()
        self.txt_in = Linear(params.context_in_dim, hidden, **made)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(hidden, params.num_heads, params.mlp_ratio, params.qkv_bias, **made) for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(hidden, params.num_heads, params.mlp_ratio, **made) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(hidden, self.out_channels, **made)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None, ref_latents: list[torch.Tensor] | None = None, control: dict | None = None,
        transformer_options: dict | None = None, **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        """Run the DIFFUSION_MODEL wrappers, then the network.

        y: pooled vector (b, ≥ vec_in_dim), zeros when None. guidance: (b,), read only with guidance weights. ref_latents: pictures
        (b, c, h', w') whose tokens join the image's. Keywords: ref_latents_method, attention_mask over [text, image] tokens.
        Returns (b, out_channels, h, w).
        """
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)

    def _forward(self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None, transformer_options=None, **kwargs):
        height, width = x.shape[-2:]
        rows, columns = -(-height // self.patch_size), -(-width // self.patch_size)
        img, img_ids = self.process_img(x)
        img_tokens = img.shape[1]
        if ref_latents:
            method = kwargs.get("ref_latents_method") or "offset"
            places = _reference_offsets(ref_latents, method, (rows * self.patch_size, columns * self.patch_size))
            references = [self.process_img(ref, *place) for ref, place in zip(ref_latents, places)]
            img = torch.cat((img, *(tokens for tokens, _ in references)), dim=1)
            img_ids = _joined_ids(img_ids, *(ids for _, ids in references))
        txt_ids = torch.zeros((1, context.shape[1], 3), device=x.device, dtype=torch.float32).expand(x.shape[0], -1, -1)
        mask = kwargs.get("attention_mask")
        out = self.forward_orig(img, img_ids, context, txt_ids, timestep, y, guidance, control, transformer_options, attn_mask=mask)
        return unpatchify(out[:, :img_tokens], self.patch_size, rows, columns)[:, :, :height, :width]

    def process_img(self, x: torch.Tensor, index: int = 0, h_offset: int = 0, w_offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (b, n, c·p²) and their ids (b, n, 3) = (index, row, column), one table for the batch; offsets are in latent cells.

        Ids are fp32 in every compute dtype: bf16 would merge rows past 256.
        """
        p = self.patch_size
        tokens = patchify(pad_to_patch_size(x, p), p)
        rows, columns = -(-x.shape[-2] // p), -(-x.shape[-1] // p)
        ids = torch.empty((rows, columns, 3), device=x.device, dtype=torch.float32)
        ids[..., 0] = index
        ids[..., 1] = torch.arange(rows, device=x.device, dtype=torch.float32)[:, None] + (h_offset + p // 2) // p
        ids[..., 2] = torch.arange(columns, device=x.device, dtype=torch.float32)[None, :] + (w_offset + p // 2) // p
        return tokens, ids.reshape(1, rows * columns, 3).expand(x.shape[0], -1, -1)

    def _vector(self, like: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None, guidance: torch.Tensor | None) -> torch.Tensor:
        """Time, guidance and pooled text in one vector (b, d)."""
        vec = self.time_in(timestep_embedding(timesteps, 256, time_factor=1000.0).to(like.dtype))
        if self.params.guidance_embed and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, 256, time_factor=1000.0).to(like.dtype))
        if y is None:
            y = torch.zeros((like.shape[0], self.params.vec_in_dim), device=like.device, dtype=like.dtype)
        return vec + self.vector_in(y[:, : self.params.vec_in_dim])

    def forward_orig(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, control=None, transformer_options=None, attn_mask=None):
        """From image and text tokens with ids to output tokens (b, n, out_channels·p²), with the post_input and block hooks."""
        options = dict(transformer_options or {})
        img = self.img_in(img)
        vec = self._vector(img, timesteps, y, guidance)
        txt = self.txt_in(txt)

        post_input = options.get("patches", {}).get("post_input", ())
        if post_input:  # a patch may change ids per image and in place, so each image gets its own
            tokens = {"img": img, "txt": txt, "img_ids": img_ids.clone(), "txt_ids": txt_ids.clone()}
            for patch in post_input:
                tokens = patch(dict(tokens))
            img, txt, img_ids, txt_ids = (tokens[name] for name in ("img", "txt", "img_ids", "txt_ids"))
        pe = self.pe_embedder(_joined_ids(txt_ids, img_ids))

        shared = {"vec": vec, "pe": pe, "attn_mask": attn_mask, "transformer_options": options}
        img, txt = self._double(img, txt, shared, control)
        joined = self._single(torch.cat((txt, finite_in_half(img)), dim=1), txt.shape[1], shared, control)
        return self.final_layer(joined[:, txt.shape[1] :], vec)

    def _double(self, img: torch.Tensor, txt: torch.Tensor, shared: dict, control: dict | None) -> tuple[torch.Tensor, torch.Tensor]:
        options = shared["transformer_options"]
        replace = options.get("patches_replace", {}).get("dit", {})
        residuals = (control or {}).get("input") or ()
        options.update(total_blocks=len(self.double_blocks), block_type="double")
        for i, block in enumerate(self.double_blocks):
            options["block_index"] = i

            def run(args: dict, block=block) -> dict:
                mask, given = args.get("attn_mask"), args.get("transformer_options")
                out = block(args["img"], args["txt"], vec=args["vec"], pe=args["pe"], attn_mask=mask, transformer_options=given)
                return {"img": out[0], "txt": out[1]}

            out = call_block(replace, ("double_block", i), run, {"img": img, "txt": txt, **shared})
            img, txt = out["img"], out["txt"]
            if i < len(residuals):
                img = _add_residual(img, residuals[i], 0)
        return img, txt

    def _single(self, x: torch.Tensor, txt_tokens: int, shared: dict, control: dict | None) -> torch.Tensor:
        options = shared["transformer_options"]
        replace = options.get("patches_replace", {}).get("dit", {})
        residuals = (control or {}).get("output") or ()
        options.update(total_blocks=len(self.single_blocks), block_type="single")
        for i, block in enumerate(self.single_blocks):
            options["block_index"] = i

            def run(args: dict, block=block) -> dict:
                mask, given = args.get("attn_mask"), args.get("transformer_options")
                return {"img": block(args["img"], vec=args["vec"], pe=args["pe"], attn_mask=mask, transformer_options=given)}

            x = call_block(replace, ("single_block", i), run, {"img": x, **shared})["img"]
            if i < len(residuals):
                x = _add_residual(x, residuals[i], txt_tokens)
        return x


def _joined_ids(*ids: torch.Tensor) -> torch.Tensor:
    """Ids (b, n, 3) one after the other; tables that a whole batch shares (stride 0) stay shared."""
    batch = ids[0].shape[0]
    if batch > 1 and all(table.stride(0) == 0 for table in ids):
        return torch.cat([table[:1] for table in ids], dim=1).expand(batch, -1, -1)
    return torch.cat(ids, dim=1)


def _add_residual(x: torch.Tensor, add: torch.Tensor | None, start: int) -> torch.Tensor:
    """Add a controlnet's (b, n, d) to the tokens from `start` on. A new tensor: a patch may have kept the block's output."""
    if add is None:
        return x
    x = x.clone()
    x[:, start : start + add.shape[1]] += add
    return x
