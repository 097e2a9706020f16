"""Runs inside ComfyUI's Python: RF-Edit on ComfyUI's own classes of every family, at toy sizes with random weights; prints one JSON object.

Started by test_editing_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

import torch
from comfyui_masks import load_pack  # starts ComfyUI on the CPU; before any of its modules

import comfy.model_patcher  # noqa: E402  isort: skip
import comfy.sample  # noqa: E402  isort: skip
import comfy.samplers  # noqa: E402  isort: skip
import comfy.supported_models as supported  # noqa: E402  isort: skip

STEPS = 4
SIGMAS = torch.linspace(1, 0, STEPS + 1)


@dataclass(frozen=True)
class Family:
    """config: ComfyUI's class; sizes: its unet_config; latent: shape; context: width of a text token; pooled: width, 0 for none;
    blocks: what shares; place: kind and number of the block whose values are looked at; image: image tokens; text: text tokens in V."""

    config: type
    sizes: dict
    latent: tuple[int, ...]
    context: int
    pooled: int
    blocks: str
    place: tuple[str, int]
    image: int
    text: int


FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 12, "context_in_dim": 20, "hidden_size": 64,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 14, 14], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 12, "num_patches": 100,
    "pos_embed_max_size": 10, "pos_embed_scaling_factor": None, "qk_norm": "rms", "x_block_self_attn_layers": [0],
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 20, "out_features": 128}},
}  # fmt: skip
HUNYUAN = {
    **FLUX, "image_model": "hunyuan_video", "patch_size": [1, 2, 2], "theta": 256, "guidance_embed": False, "byt5": False,
    "meanflow": False,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "patch_size": (1, 2, 2),
    "freq_dim": 32, "in_dim": 16, "out_dim": 16, "text_dim": 20, "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 20, "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
LTXV = {
    "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2,
    "num_layers": 2, "caption_channels": 20,
}  # fmt: skip
FAMILIES = {
    "Flux": Family(supported.Flux, FLUX, (1, 16, 6, 8), 20, 12, "double:1,single:1", ("single", 1), 12, 5),
    "SD3": Family(supported.SD3, SD3, (1, 16, 6, 8), 20, 12, "double", ("double", 0), 12, 5),
    "HunyuanVideo": Family(supported.HunyuanVideo, HUNYUAN, (1, 16, 3, 6, 8), 20, 12, "double:1,single:1", ("single", 1), 36, 5),
    "Wan": Family(supported.WAN21_T2V, WAN, (1, 16, 3, 6, 8), 20, 0, "double", ("double", 1), 36, 0),
    "Qwen-Image": Family(supported.QwenImage, QWEN, (1, 16, 1, 6, 8), 20, 0, "double", ("double", 1), 12, 5),
    "LTX-Video": Family(supported.LTXV, LTXV, (1, 128, 3, 3, 4), 20, 0, "double", ("double", 1), 36, 0),
}


def draw_weights(network: torch.nn.Module, scale: float) -> None:
    """Random parameters, norms around one; SD3's table of positions too, and buffers that are not finite: the classes leave them unset."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in sorted((*network.named_parameters(), *network.named_buffers()), key=lambda entry: entry[0]):
        unset = isinstance(tensor, torch.nn.Parameter) or name == "pos_embed" or not torch.isfinite(tensor).all()
        if unset and tensor.is_floating_point():
            centre = 1.0 if "norm" in name and tensor.ndim == 1 and not name.endswith("bias") else 0.0
            tensor.data = centre + torch.randn(tensor.shape, generator=generator) * scale


def build(family: Family, scale: float) -> comfy.model_patcher.ModelPatcher:
    config = family.config(dict(family.sizes))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    draw_weights(model.diffusion_model, scale)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


class Values:
    """An attention override that was there before ours: every value tensor it meets, in order."""

    def __init__(self, model):
        self.seen: list[torch.Tensor] = []
        self.model = model.clone()
        self.model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = self

    def __call__(self, func, *args, **kwargs):
        self.seen.append(args[2].clone())
        return func(*args, **kwargs)


class Toy:
    """One family's model, its picture, and the pack's nodes on it."""

    def __init__(self, nodes: dict, family: Family, scale: float):
        self.nodes, self.family, self.model = nodes, family, build(family, scale)
        self.random = partial(torch.randn, generator=torch.Generator().manual_seed(3))
        self.picture = self.random(family.latent)
        self.source, self.target, self.empty = (self.prompt() for _ in range(3))

    def prompt(self) -> list:
        pooled = {"pooled_output": self.random((1, self.family.pooled))} if self.family.pooled else {}
        mask = {"attention_mask": torch.ones(1, 5, dtype=torch.long)} if self.family.config is supported.LTXV else {}
        return [[self.random((1, 5, self.family.context)), {**pooled, **mask, "guidance": 1.0}]]

    def invert(self, model=None):
        inputs = {"source": self.source, "latent": {"samples": self.picture}, "sigmas": SIGMAS, "solver": "rf_solver", "save_steps": 2}
        z, bank, _ = self.nodes["RectiflowFlowInvert"]().execute(model=model or self.model, **inputs, blocks=self.family.blocks)
        return z["samples"], bank

    def draw(self, z, sampler, target, model=None, cfg=2.0):
        none = torch.zeros_like(z)
        return comfy.sample.sample_custom(model or self.model, none, cfg, sampler, SIGMAS, target, self.empty, z, disable_pbar=True, seed=0)

    def edit(self, z, bank, target=None, model=None, cfg=2.0, **changes):
        inputs = {"inject_steps": 2, "match": "interval", "tokens": "all", "rows": "cond_and_uncond", "strength": 1.0, **changes}
        (sampler,) = self.nodes["RectiflowRFEditSampler"]().execute(features=bank, **inputs)
        return self.draw(z, sampler, target or self.target, model, cfg)


def shared(toy: Toy, z: torch.Tensor, kept: dict) -> dict[str, bool]:
    """What attention is handed in the first evaluation of the edit: the kept values in the chosen blocks, the fresh ones elsewhere."""
    plain, edited = Values(toy.model), Values(toy.model)
    toy.edit(z, toy.invert()[1], model=plain.model, inject_steps=0, cfg=1.0)
    toy.edit(z, toy.invert()[1], model=edited.model, inject_steps=1, cfg=1.0)
    chosen = [index for index, v in enumerate(edited.seen) if any(v.shape == old.shape and torch.equal(v, old) for old in kept.values())]
    first = chosen[: len(kept)]
    before = edited.seen[: first[0]] if first else []
    alike = all(torch.equal(v, fresh) for v, fresh in zip(before, plain.seen))
    return {"put_back": len(first) == len(kept), "others_untouched": alike and len(plain.seen) == len(edited.seen)}


def answers(nodes: dict, name: str, family: Family) -> dict:
    toy = Toy(nodes, family, 0.15)
    (plain_sampler,) = nodes["RectiflowRFSolverSampler"]().execute(derivative="midpoint", probe=0.01, start_from="latent")
    z, bank = toy.invert()
    plain = toy.draw(z, plain_sampler, toy.target)
    kind, number = family.place
    first = dict(bank.values[STEPS - 1, "first"])
    value = first[f"{kind}_block", number]
    found = {
        "family": bank.layout.family,
        "tokens": value.shape[bank.axis],
        "no_steps": torch.equal(toy.edit(z, bank, inject_steps=0), plain),
        "strength_0": torch.equal(toy.edit(z, toy.invert()[1], strength=0.0), plain),
    }
    edited = toy.edit(z, toy.invert()[1])
    found["finite"] = bool(torch.isfinite(edited).all())
    found["shares"] = not torch.equal(edited, plain)
    found.update(shared(toy, z, first))
    bank = toy.invert()[1]
    toy.edit(z, bank)
    found["freed"] = bank.nbytes == 0
    found["made_again"] = torch.equal(toy.edit(z, bank), edited)
    only = toy.edit(z, toy.invert()[1], tokens="image_only")
    found["image_only"] = bool(torch.isfinite(only).all()) and torch.equal(only, edited) == (family.text == 0)
    small = Toy(nodes, family, 0.02)  # what is left is the round trip's own error, see test_feature_identity.py
    z, bank = small.invert()
    same = small.edit(z, bank, target=small.source, cfg=1.0, match="exact_sigma")
    without = small.edit(z, bank, target=small.source, cfg=1.0, inject_steps=0)
    found["identity"] = float((same - without).abs().max())
    return found


def main() -> None:
    nodes = load_pack()
    print(json.dumps({name: answers(nodes, name, family) for name, family in FAMILIES.items()}))


if __name__ == "__main__":
    main()
