"""SD3's MMDiT (Esser et al. 2024, arXiv:2403.03206), with the options of SD 3.5: RMS norm on q and k (Large), and a second,
image-only attention in the first blocks (Medium).

Names follow the published checkpoints. Token order in attention is text, image. Positions are a table of absolute embeddings
from which the middle is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .attention import optimized_attention
from .common import TimestepEmbedder, call_block, modulate, pad_to_patch_size, unpatchify
from .ops import Conv2d, LayerNorm, Linear, RMSNorm, cast_to_input

__all__ = ["MMDiT", "MMDiTParams"]


@dataclass(frozen=True)
class MMDiTParams:
    """Sizes of an MMDiT; `dual_attention` lists the blocks with a second image attention, `max_positions` is the table's side."""

    in_channels: int
    out_channels: int
    patch_size: int
    hidden_size: int
    num_heads: int
    depth: int
    mlp_hidden: int
    context_in_dim: int
    vec_in_dim: int
    max_positions: int
    qkv_bias: bool = True
    qk_norm: bool = False
    dual_attention: tuple[int, ...] = ()

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"MMDiT: hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads")


class VectorEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_size: int, **made):
        super().__init__()
        self.mlp = nn.Sequential(Linear(in_dim, hidden_size, **made), nn.SiLU(), Linear(hidden_size, hidden_size, **made))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.mlp(y)


class PatchEmbed(nn.Module):
    def __init__(self, params: MMDiTParams, **made):
        super().__init__()
        p = params.patch_size
        self.proj = Conv2d(params.in_channels, params.hidden_size, kernel_size=p, stride=p, **made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w), sides multiples of the patch → (b, n, d)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, **made):
        super().__init__()
        self.fc1 = Linear(dim, hidden, **made)
        self.fc2 = Linear(hidden, dim, **made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """The projections around an attention that others run. `pre_only` has no way back: the last text block ends in keys and values."""

    def __init__(self, params: MMDiTParams, pre_only: bool = False, **made):
        super().__init__()
        dim = params.hidden_size
        self.num_heads = params.num_heads
        self.qkv = Linear(dim, dim * 3, bias=params.qkv_bias, **made)
        if not pre_only:
            self.proj = Linear(dim, dim, **made)
        self.ln_q, self.ln_k = (
            RMSNorm(dim // params.num_heads, eps=1e-6, **made) if params.qk_norm else nn.Identity() for _ in range(2)
        )  # fmt: skip

    def qkv_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(b, n, d) → q, k, v, each (b, n, d)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (b, n, h, head)
        return self.ln_q(q).flatten(2), self.ln_k(k).flatten(2), v.flatten(2)


class DismantledBlock(nn.Module):
    """One stream's half of a joint block: what comes before the shared attention, and what comes after it."""

    def __init__(self, params: MMDiTParams, pre_only: bool = False, dual: bool = False, **made):
        super().__init__()
        dim = params.hidden_size
        self.pre_only = pre_only
        self.x_block_self_attn = dual
        self.parts = 2 if pre_only else 9 if dual else 6
        self.norm1 = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(params, pre_only, **made)
        if dual:
            self.attn2 = SelfAttention(params, **made)
        if not pre_only:
            self.norm2 = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(dim, params.mlp_hidden, **made)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, self.parts * dim, **made))

    def modulation(self, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """c (b, d) → (shift, scale[, gate, shift, scale, gate of the MLP[, shift, scale, gate of attn2]]), each (b, 1, d)."""
        return self.adaLN_modulation(c).unsqueeze(1).chunk(self.parts, dim=-1)

    def finish(self, x: torch.Tensor, mods: tuple[torch.Tensor, ...], attn: torch.Tensor, attn2: torch.Tensor | None = None):
        """Gate the attention's result into x (b, n, d), then the MLP's."""
        _, _, gate, shift_mlp, scale_mlp, gate_mlp, *dual = mods
        out = torch.addcmul(x, gate, self.attn.proj(attn))
        if attn2 is not None:
            out = torch.addcmul(out, dual[2], self.attn2.proj(attn2))
        return torch.addcmul(out, gate_mlp, self.mlp(modulate(self.norm2(out), shift_mlp, scale_mlp)))


class JointBlock(nn.Module):
    def __init__(self, params: MMDiTParams, pre_only: bool, dual: bool, **made):
        super().__init__()
        self.context_block = DismantledBlock(params, pre_only=pre_only, **made)
        self.x_block = DismantledBlock(params, dual=dual, **made)

    def forward(
        self, context: torch.Tensor, x: torch.Tensor, c: torch.Tensor, transformer_options: dict | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """context (b, m, d), x (b, n, d), c (b, d) → new context (None after the last block) and x."""
        options = transformer_options or {}
        heads = self.x_block.attn.num_heads
        context_mods, x_mods = self.context_block.modulation(c), self.x_block.modulation(c)
        context_qkv = self.context_block.attn.qkv_tokens(modulate(self.context_block.norm1(context), *context_mods[:2]))
        x_norm = self.x_block.norm1(x)
        x_qkv = self.x_block.attn.qkv_tokens(modulate(x_norm, *x_mods[:2]))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(context_qkv, x_qkv))
        attn = optimized_attention(q, k, v, heads=heads, transformer_options=options)
        context_attn, x_attn = attn.split((context.shape[1], x.shape[1]), dim=1)

        context = None if self.context_block.pre_only else self.context_block.finish(context, context_mods, context_attn)
        attn2 = None
        if self.x_block.x_block_self_attn:
            qkv2 = self.x_block.attn2.qkv_tokens(modulate(x_norm, *x_mods[6:8]))
            attn2 = optimized_attention(*qkv2, heads=self.x_block.attn2.num_heads, transformer_options=options)
        return context, self.x_block.finish(x, x_mods, x_attn, attn2)


class FinalLayer(nn.Module):
    def __init__(self, params: MMDiTParams, **made):
        super().__init__()
        dim = params.hidden_size
        self.norm_final = LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(dim, params.patch_size**2 * params.out_channels, **made)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim, **made))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class MMDiT(nn.Module):
    """Velocity of a latent under text: forward(x (b, c, h, w), timesteps (b,) in 0…1000, context (b, m, context_in_dim), y)."""

    def __init__(self, params: MMDiTParams, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        made = {"dtype": dtype, "device": device}
        dim = params.hidden_size
        self.dtype = dtype
        self.params = params
        self.patch_size = params.patch_size
        self.in_channels = params.in_channels
        self.out_channels = params.out_channels
        self.hidden_size = dim
        self.num_heads = params.num_heads
        self.depth = params.depth
        self.pos_embed_max_size = params.max_positions
        self.x_embedder = PatchEmbed(params, **made)
        self.t_embedder = TimestepEmbedder(dim, **made)
        self.y_embedder = VectorEmbedder(params.vec_in_dim, dim, **made)
        self.context_embedder = Linear(params.context_in_dim, dim, **made)
        self.register_buffer("pos_embed", torch.empty(1, params.max_positions**2, dim, **made))
        self.joint_blocks = nn.ModuleList(
            JointBlock(params, pre_only=i == params.depth - 1, dual=i in params.dual_attention, **made) for i in range(params.depth)
        )
        self.final_layer = FinalLayer(params, **made)

    def cropped_pos_embed(self, rows: int, columns: int) -> torch.Tensor:
        """The middle `rows` × `columns` of the position table: (1, rows·columns, d)."""
        side, patch = self.pos_embed_max_size, self.patch_size
        if rows > side or columns > side:
            raise ValueError(
                f"SD3: a latent of {rows * patch}×{columns * patch} cells is larger than the model's position table; "
                f"allowed: up to {side * patch}×{side * patch}. Choose a smaller picture."
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        grid = self.pos_embed.unflatten(1, (side, side))
        return grid[:, top : top + rows, left : left + columns].flatten(1, 2)

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | None = None, y: torch.Tensor | None = None,
        control: dict | None = None, transformer_options: dict | None = None, **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        """Velocity (b, out_channels, h, w). y: pooled text (b, vec_in_dim). There is no DIFFUSION_MODEL hook, as in ComfyUI 0.3.64."""
        height, width = x.shape[-2:]
        p = self.patch_size
        rows, columns = -(-height // p), -(-width // p)
        tokens = self.x_embedder(pad_to_patch_size(x, p))
        tokens = tokens + cast_to_input(self.cropped_pos_embed(rows, columns), x)
        c = self.t_embedder(timesteps, dtype=x.dtype)  # (b, d)
        if y is not None:
            c = c + self.y_embedder(y)
        if context is None:
            raise ValueError("SD3: the model was called without text states; link a conditioning that has them.")
        tokens = self._blocks(tokens, self.context_embedder(context), c, control, dict(transformer_options or {}))
        out = self.final_layer(tokens, c)
        return unpatchify(out, p, rows, columns, channels_last=True)[:, :, :height, :width]

    def _blocks(self, x: torch.Tensor, context: torch.Tensor, c: torch.Tensor, control: dict | None, options: dict) -> torch.Tensor:
        replace = options.get("patches_replace", {}).get("dit", {})
        residuals = (control or {}).get("output") or ()
        options.update(total_blocks=len(self.joint_blocks), block_type="double")
        for i, block in enumerate(self.joint_blocks):
            options["block_index"] = i

            def run(args: dict, block=block) -> dict:
                txt, img = block(args["txt"], args["img"], c=args["vec"], transformer_options=args["transformer_options"])
                return {"txt": txt, "img": img}

            out = call_block(replace, ("double_block", i), run, {"img": x, "txt": context, "vec": c, "transformer_options": options})
            context, x = out["txt"], out["img"]
            if i < len(residuals) and residuals[i] is not None:
                x = x + residuals[i]
        return x
