"""Runs inside ComfyUI's Python: a call over part of the tokens of each of its transformers, with random weights, against the dense call.

Prints one JSON object: family → largest error on computed tokens, after a fill at the same input. Started by test_region.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

sys.path.insert(0, os.environ["COMFYUI_PATH"])
sys.argv = [sys.argv[0], "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.chroma.model import Chroma  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.lumina.model import NextDiT  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper  # noqa: E402
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402
from comfy.ldm.wan.model import WanModel  # noqa: E402
from rectiflow.accel.region.embed import NAMES, embed_patches, running  # noqa: E402
from rectiflow.accel.region.grid import TokenGrid  # noqa: E402
from rectiflow.accel.region.hooks import PartialCall  # noqa: E402
from rectiflow.accel.region.kv_cache import KVStore  # noqa: E402
from rectiflow.accel.region.plan import KVOptions  # noqa: E402
from rectiflow.families.tokens import token_spec  # noqa: E402

MADE = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.manual_cast}
FLUX = {
    "in_channels": 16, "out_channels": 16, "context_in_dim": 40, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [4, 14, 14], "theta": 10000, "patch_size": 2, "qkv_bias": True,
}  # fmt: skip


def networks():
    """(family, network, keyword arguments beside x, timestep, context)."""
    yield "flux", Flux(**FLUX, vec_in_dim=24, guidance_embed=True, **MADE), {"y": random(2, 24), "guidance": torch.full((2,), 4.0)}
    # Chroma counts channels of a token, not of a latent, and its approximator makes 3 vectors a single and 12 a double block, and 2.
    chroma = {**FLUX, "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 64, "hidden_dim": 64, "n_layers": 1}
    yield "chroma", Chroma(**chroma, **MADE), {"guidance": torch.zeros(2)}
    sd3 = {"num_patches": 144, "pos_embed_max_size": 12, "num_blocks": 4, "x_block_self_attn_layers": [0, 1], "qk_norm": "rms"}
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 128}}
    mmdit = OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=2, adm_in_channels=24, context_embedder_config=embedder, **sd3, **MADE
    )  # fmt: skip
    yield "sd3", mmdit, {"y": random(2, 24)}
    lumina = NextDiT(
        patch_size=2, in_channels=16, dim=96, n_layers=4, n_refiner_layers=1, n_heads=4, n_kv_heads=2, qk_norm=True, cap_feat_dim=40,
        axes_dims=[8, 8, 8], axes_lens=[300, 512, 512], **MADE,
    )  # fmt: skip
    yield "lumina2", lumina, {"num_tokens": 5}
    qwen = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=3, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=40,
        pooled_projection_dim=24, axes_dims_rope=(4, 14, 14), **MADE,
    )  # fmt: skip
    yield "qwen_image", qwen, {}
    yield "wan", WanModel(text_len=5, dim=64, ffn_dim=96, text_dim=40, freq_dim=64, num_heads=2, num_layers=3, **MADE), {}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(network: torch.nn.Module) -> None:
    with torch.no_grad():
        for i, (name, tensor) in enumerate(sorted(network.state_dict().items())):
            centre = 1.0 if tensor.ndim == 1 and ("norm" in name or "ln_" in name) and not name.endswith("bias") else 0.0
            tensor.copy_(centre + 0.15 * random(*tensor.shape, seed=i))


def error(family: str, network: torch.nn.Module, given: dict) -> float:
    randomise(network)
    frames = {"qwen_image": (1,), "wan": (3,)}.get(family, ())
    x = random(2, 16, *frames, 10, 14, seed=3)
    spec = token_spec(network, family)
    grid = TokenGrid.of(x.shape[2:], spec.patch, family)
    store = KVStore(KVOptions(), spec.layers, family)
    if not spec.blocks:
        for name, patch in zip(NAMES, embed_patches(*(getattr(network, name) for name in NAMES))):
            setattr(network, name, patch)
    drawn = torch.rand(2, grid.count, generator=torch.Generator().manual_seed(5)).argsort(dim=1)
    index = drawn[:, : grid.count // 3].sort(dim=1).values

    def call(partial: PartialCall | None) -> torch.Tensor:
        options = {} if partial is None else partial.patched({})
        time = torch.tensor([0.4, 0.4]) * (1000 if family in ("sd3", "wan") else 1)
        with torch.inference_mode(), contextlib.nullcontext() if partial is None or spec.blocks else running(partial):
            return network(x.clone(), time, context=random(2, 5, 40, seed=4), transformer_options=options, **given)

    dense = call(None)
    if not torch.equal(call(PartialCall(spec, grid.count, ["one"], None, store)), dense):
        return float("inf")
    assert store.has("one"), f"{family}: {len(store.rows)} of {spec.layers} attentions stored"
    out = call(PartialCall(spec, grid.count, ["one"], index, store))
    computed = grid.spread(torch.zeros(2, grid.count, dtype=torch.bool).scatter_(1, index, True)).expand_as(dense)
    assert (out - dense)[~computed].abs().max() > 0.01  # tokens left out come back as something else
    return float((out - dense)[computed].abs().max() / dense.abs().max().clamp_min(1.0))


print(json.dumps({family: error(family, network, given) for family, network, given in networks()}))
