"""Small transformers with random weights, and inputs for them."""

from __future__ import annotations

import torch
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.host.embedded.ldm.lumina2 import NextDiT, NextDiTParams
from rectiflow.host.embedded.ldm.mmdit import MMDiT, MMDiTParams

FLUX = FluxParams(
    in_channels=16, out_channels=16, vec_in_dim=12, context_in_dim=20, hidden_size=64, mlp_ratio=2.0, num_heads=2, depth=2,
    depth_single_blocks=2, axes_dim=(4, 14, 14), theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
)  # fmt: skip
SD3 = MMDiTParams(
    in_channels=16, out_channels=16, patch_size=2, hidden_size=64, num_heads=2, depth=3, mlp_hidden=128, context_in_dim=20, vec_in_dim=12,
    max_positions=10, qk_norm=True, dual_attention=(0,),
)  # fmt: skip
LUMINA = NextDiTParams(
    in_channels=16, patch_size=2, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden=96, cap_feat_dim=20,
    axes_dims=(8, 8, 8),
)  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(model: torch.nn.Module, scale: float = 0.15) -> torch.nn.Module:
    """Norm weights near 1, everything else near 0, drawn in the order of the names."""
    with torch.no_grad():
        for i, (name, tensor) in enumerate(sorted(model.state_dict().items())):
            centre = 1.0 if tensor.ndim == 1 and name.endswith(("scale", "norm.weight", "norm1.weight", "norm2.weight")) else 0.0
            tensor.copy_(centre + scale * random(*tensor.shape, seed=i))
    return model.eval()


def flux(**sizes) -> Flux:
    return filled(Flux(FluxParams(**{**FLUX.__dict__, **sizes}), dtype=torch.float32))


def sd3(**sizes) -> MMDiT:
    return filled(MMDiT(MMDiTParams(**{**SD3.__dict__, **sizes}), dtype=torch.float32))


def lumina2(**sizes) -> NextDiT:
    return filled(NextDiT(NextDiTParams(**{**LUMINA.__dict__, **sizes}), dtype=torch.float32))


MODELS = {"flux": flux, "sd3": sd3, "lumina2": lumina2}


def inputs(family: str, batch: int = 2, height: int = 6, width: int = 8, tokens: int = 5) -> dict:
    given = {
        "x": random(batch, 16, height, width, seed=1), "context": random(batch, tokens, 20, seed=2),
        "timesteps": torch.linspace(0.9, 0.3, batch) * (1000 if family == "sd3" else 1),
    }  # fmt: skip
    if family != "lumina2":
        given["y"] = random(batch, 12, seed=3)
    if family == "flux":
        given["timestep"] = given.pop("timesteps")
        given["guidance"] = torch.full((batch,), 4.0)  # times 1000 it is exact in bf16, where 3.5 is not
    return given
