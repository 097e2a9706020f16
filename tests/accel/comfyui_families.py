"""Runs inside ComfyUI's Python: caches on ComfyUI's own classes of every family, at toy sizes with random weights; prints one JSON object.

Started by test_cache_families_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samplers"))
from comfyui_masks import load_pack  # noqa: E402  starts ComfyUI on the CPU; before any of its modules

import comfy.model_patcher  # noqa: E402  isort: skip
import comfy.sample  # noqa: E402  isort: skip
import comfy.samplers  # noqa: E402  isort: skip
import comfy.supported_models as supported  # noqa: E402  isort: skip
from comfy.ldm.audio.embedders import NumberConditioner  # noqa: E402  isort: skip
import comfyui_editing as editing  # noqa: E402  isort: skip

FALLING = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1])
STANDING = torch.tensor([0.7, 0.7, 0.7])


def twice(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Two evaluations at one x and sigma; the second's answer. A cache of interval 2 puts back there what it captured in the first."""
    for sigma in sigmas[:-1]:
        denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
    return denoised


@dataclass(frozen=True)
class Toy:
    """config: ComfyUI's class; sizes: its unet_config; latent: shape; context: width of a text token; blocks: those with patches.

    pooled: width of a pooled vector; cond: shapes of further tensors of a condition, or values.
    """

    config: type
    sizes: dict
    latent: tuple[int, ...]
    context: int
    blocks: int
    pooled: int = 0
    cond: dict = field(default_factory=dict)
    length: int = 5


def from_editing(name: str, blocks: int) -> Toy:
    family = editing.FAMILIES[name]
    mask = {"attention_mask": torch.ones(1, 5, dtype=torch.long)} if name == "LTX-Video" else {}
    return Toy(family.config, family.sizes, family.latent, family.context, blocks, family.pooled, mask)


WAN_VIDEO = (1, 16, 3, 6, 8)
PICTURE = (1, 16, 6, 8)
ONES = partial(torch.ones, dtype=torch.long)
TOYS = {
    "Flux": from_editing("Flux", 4),
    "SD3": from_editing("SD3", 2),
    "HunyuanVideo": from_editing("HunyuanVideo", 4),
    "Wan": from_editing("Wan", 2),
    "Qwen-Image": from_editing("Qwen-Image", 2),
    "LTX-Video": from_editing("LTX-Video", 2),
    "Chroma": Toy(supported.Chroma, {
        "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": 20, "hidden_size": 64, "mlp_ratio": 2.0,
        "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 14, 14], "theta": 10000, "patch_size": 2, "qkv_bias": True,
        "in_dim": 64, "out_dim": 64, "hidden_dim": 32, "n_layers": 1,
    }, PICTURE, 20, 4, 12),
    "Wan VACE": Toy(supported.WAN21_Vace, {**editing.WAN, "model_type": "vace", "vace_in_dim": 96, "vace_layers": 2}, WAN_VIDEO, 20, 2),
    "Wan Camera": Toy(supported.WAN21_Camera, {**editing.WAN, "model_type": "camera", "in_dim": 32}, WAN_VIDEO, 20, 2),
    "AuraFlow": Toy(supported.AuraFlow, {
        "cond_seq_dim": 20, "in_channels": 4, "out_channels": 4, "dim": 64, "n_layers": 4, "n_double_layers": 2, "n_heads": 2,
        "global_conddim": 64, "max_seq": 256,
    }, (1, 4, 6, 8), 20, 4),
    "Mochi": Toy(supported.GenmoMochi, {
        "image_model": "mochi_preview", "depth": 3, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 32,
        "mlp_ratio_x": 192.0, "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
        "out_bias": True, "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False,
        "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 32, "t5_token_length": 5, "rope_theta": 10000.0,
    }, (1, 12, 2, 6, 8), 32, 3, 0, {"attention_mask": ONES(1, 5)}),
    "Stable Audio": Toy(supported.StableAudio, {
        "audio_model": "dit1.0", "io_channels": 64, "embed_dim": 64, "cond_token_dim": 768, "global_cond_dim": 1536, "depth": 2,
        "num_heads": 2,
    }, (1, 64, 12), 768, 2),
    "HunyuanDiT": Toy(supported.HunyuanDiT, {
        "image_model": "hydit", "hidden_size": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0, "text_states_dim": 32,
        "text_states_dim_t5": 32, "text_len": 5, "text_len_t5": 5, "size_cond": False, "use_style_cond": False,
    }, (1, 4, 6, 8), 32, 4, 0, {
        "attention_mask": ONES(1, 5), "attention_mask_mt5xl": ONES(1, 5), "conditioning_mt5xl": (1, 5, 32),
    }),
    "Hunyuan3D 2": Toy(supported.Hunyuan3Dv2, {
        "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 20, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2,
        "depth": 2, "depth_single_blocks": 2, "qkv_bias": True, "guidance_embed": False,
    }, (1, 64, 12), 20, 4),
    "Hunyuan3D 2.1": Toy(supported.Hunyuan3Dv2_1, {
        "image_model": "hunyuan3d2_1", "in_channels": 64, "context_dim": 20, "hidden_size": 64, "depth": 4, "num_heads": 2,
        "qkv_bias": False, "guidance_cond_proj_dim": None, "num_moe_layers": 1, "num_experts": 2, "moe_top_k": 1,
    }, (1, 64, 12), 20, 4),
    "Lumina 2": Toy(supported.Lumina2, {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 64, "cap_feat_dim": 20, "n_layers": 2, "n_heads": 2,
        "n_kv_heads": 1, "qk_norm": True, "axes_dims": [8, 12, 12], "axes_lens": [300, 64, 64], "n_refiner_layers": 1,
    }, PICTURE, 20, 0, 0, {"attention_mask": ONES(1, 5)}),
    "OmniGen 2": Toy(supported.Omnigen2, {
        "image_model": "omnigen2", "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2,
        "num_kv_heads": 1, "axes_dim_rope": (8, 12, 12), "axes_lens": (300, 64, 64), "text_feat_dim": 20,
    }, PICTURE, 20, 0, 0, {"attention_mask": ONES(1, 5)}),
    "PixArt": Toy(supported.PixArtAlpha, {
        "image_model": "pixart_alpha", "num_heads": 2, "patch_size": 2, "hidden_size": 64, "in_channels": 4, "depth": 2,
        "model_max_length": 5, "input_size": 64, "pe_interpolation": 1, "micro_condition": False, "caption_channels": 20,
    }, (1, 4, 64, 64), 20, 0),
    "HiDream": Toy(supported.HiDream, {
        "image_model": "hidream", "attention_head_dim": 32, "axes_dims_rope": [16, 8, 8], "caption_channels": [20, 20],
        "max_resolution": [16, 16], "in_channels": 16, "llama_layers": [0, 1, 1], "num_attention_heads": 2, "num_routed_experts": 2,
        "num_activated_experts": 1, "num_layers": 1, "num_single_layers": 1, "out_channels": 16, "patch_size": 2, "text_emb_dim": 12,
    }, PICTURE, 20, 0, 12, {"conditioning_llama3": (1, 2, 5, 20)}),
    "ACE-Step": Toy(supported.ACEStep, {
        "audio_model": "ace", "attention_head_dim": 32, "in_channels": 8, "inner_dim": 64, "max_height": 16, "max_position": 256,
        "max_width": 256, "mlp_ratio": 2.0, "num_attention_heads": 2, "num_layers": 2, "out_channels": 8, "patch_size": [16, 1],
        "rope_theta": 1000000.0, "speaker_embedding_dim": 512, "text_embedding_dim": 20, "ssl_encoder_depths": [1, 1],
        "ssl_latent_dims": [16, 16], "ssl_names": ["mert", "m-hubert"], "lyric_encoder_vocab_size": 16, "lyric_hidden_size": 1024,
    }, (1, 8, 16, 12), 20, 0, 0, {"conditioning_lyrics": ONES(1, 4)}),
    "Cosmos Predict2": Toy(supported.CosmosT2IPredict2, {
        "image_model": "cosmos_predict2", "max_img_h": 16, "max_img_w": 16, "max_frames": 8, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "model_channels": 96, "concat_padding_mask": True, "crossattn_emb_channels": 20,
        "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
        "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 2, "num_heads": 2, "extra_per_block_abs_pos_emb": False,
        "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
    }, (1, 16, 1, 6, 8), 20, 0),
    "Cosmos": Toy(supported.CosmosT2V, {
        "image_model": "cosmos", "max_img_h": 16, "max_img_w": 16, "max_frames": 8, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "model_channels": 96, "block_config": "FA-CA-MLP", "concat_padding_mask": True,
        "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop", "block_x_format": "THWBD",
        "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 2, "num_heads": 2,
        "crossattn_emb_channels": 20, "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
        "rope_h_extrapolation_ratio": 1.0, "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 2.0,
    }, (1, 16, 1, 6, 8), 20, 0),
}  # fmt: skip


def build(toy: Toy) -> comfy.model_patcher.ModelPatcher:
    config = toy.config(dict(toy.sizes))
    config.set_inference_dtype(torch.float32, None)
    weights = {}
    if toy.config is supported.StableAudio:  # the two number conditioners come with the checkpoint
        made = NumberConditioner(768, min_val=0, max_val=512).state_dict()
        number = {name: torch.full_like(value, 0.01) for name, value in made.items()}
        weights = {f"conditioner.conditioners.seconds_{end}.{name}": value for end in ("start", "total") for name, value in number.items()}
    model = config.get_model(weights, "", device="cpu").eval().requires_grad_(False)
    editing.draw_weights(model.diffusion_model, 0.1)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


class Bench:
    """One toy with its conditions, and the pack's engine."""

    def __init__(self, name: str):
        self.toy = TOYS[name]
        self.model = build(self.toy)
        self.random = partial(torch.randn, generator=torch.Generator().manual_seed(3))
        self.noise = self.random(self.toy.latent)
        self.prompts = [self.prompt(), self.prompt()]
        self.engine = {part: importlib.import_module(f"pack_under_test.accel.cache.{part}") for part in (
            "binding", "interval", "policy", "report", "visits",
        )}  # fmt: skip

    def prompt(self) -> list:
        pooled = {"pooled_output": self.random((1, self.toy.pooled))} if self.toy.pooled else {}
        further = {name: self.random(given) if isinstance(given, tuple) else given for name, given in self.toy.cond.items()}
        return [[self.random((1, self.toy.length, self.toy.context)), {**pooled, **further}]]

    def draw(self, sigmas: torch.Tensor, model=None) -> torch.Tensor:
        fresh = [[[text.clone(), dict(given)] for text, given in prompt] for prompt in self.prompts]  # HunyuanDiT writes into its text
        sampler = comfy.samplers.KSAMPLER(twice) if sigmas is STANDING else comfy.samplers.sampler_object("euler")
        nothing = torch.zeros_like(self.noise)
        model = self.model if model is None else model
        return comfy.sample.sample_custom(model, self.noise, 2.0, sampler, sigmas, *fresh, nothing, disable_pbar=True, seed=0)

    def cached(self, target: str, interval: int, blocks: str = ""):
        engine = self.engine
        log = engine["report"].CacheLog()
        policy, limits = engine["interval"].IntervalReuse(interval=interval), engine["policy"].Limits()
        plan = engine["visits"].CachePlan(policy, target, limits, blocks=blocks)
        return engine["binding"].attach(self.model, plan, log, "test"), log


def answers(name: str) -> dict:
    bench = Bench(name)
    arch = importlib.import_module("pack_under_test.families.arch").arch_spec(bench.model.model.diffusion_model)
    plain, standing = bench.draw(FALLING), bench.draw(STANDING)
    scale = float((standing - 0.7 * bench.noise).abs().max())
    found = {"blocks": len(arch.blocks) if arch else 0, "finite": bool(torch.isfinite(plain).all()), "moves": scale > 0}
    ranges = [("output", "")] + [("last_block", ""), ("block_delta", ""), ("block_delta", "tail")] * bool(arch)
    if arch is None:
        try:
            bench.cached("last_block", 2)
        except ValueError as refusal:
            found["refused"] = str(refusal)
    for target, blocks in ranges:
        kind = "double:1-" + (", single" if arch and arch.layout.counts.get("single") else "")
        off, _ = bench.cached(target, 1, kind if blocks else "")
        model, log = bench.cached(target, 2, kind if blocks else "")
        forecast = bench.draw(STANDING, model)
        found[target + blocks] = {
            "no_op": torch.equal(bench.draw(FALLING, off), plain),
            "forecasts": log.last.parts[1],
            "identity": float((forecast - standing).abs().max()) / scale,
            "notes": log.last.notes,
            "near": bool(torch.isfinite(bench.draw(FALLING, model)).all()),
        }
    return found


def main() -> None:
    load_pack()
    print(json.dumps({name: answers(name) for name in TOYS}))


if __name__ == "__main__":
    main()
