"""Runs inside a real ComfyUI (its Python, its folder on the path): builds its classes with random weights and writes weights,
inputs and outputs to one safetensors file a case. test_against_comfyui.py then runs ours on the same tensors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ["COMFYUI_PATH"])
DESTINATION = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]  # ComfyUI reads its options from here
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.latent_formats  # noqa: E402
import comfy.ldm.models.autoencoder  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.lumina.model import NextDiT  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

OPS = comfy.ops.manual_cast
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 40, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 14, 14], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "guidance_embed": True,
}  # fmt: skip
SD3 = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 2, "adm_in_channels": 24, "num_patches": 144, "pos_embed_max_size": 12,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 128}}, "num_blocks": 3,
}  # fmt: skip
LUMINA = {
    "patch_size": 2, "in_channels": 16, "dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 2, "qk_norm": True,
    "cap_feat_dim": 40, "axes_dims": [8, 8, 8], "axes_lens": [300, 512, 512],
}  # fmt: skip
KL = {
    "double_z": True, "z_channels": 16, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 2],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def randomise(module: torch.nn.Module, scale: float = 0.15) -> None:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            centre = 1.0 if name.endswith((".scale", "norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight", "ln_k.weight")) else 0.0
            tensor.copy_(centre + scale * torch.randn(tensor.shape))


def inputs(*, batch: int = 2, height: int = 8, width: int = 12, tokens: int = 5) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(batch, 16, height, width), "timestep": torch.rand(batch), "context": torch.randn(batch, tokens, 40),
        "y": torch.randn(batch, 24),
    }  # fmt: skip


def write(folder: Path, name: str, module: torch.nn.Module, given: dict, out: torch.Tensor, **facts) -> None:
    tensors = {f"w.{key}": value.contiguous() for key, value in module.state_dict().items()}
    tensors |= {f"i.{key}": value.contiguous() for key, value in given.items() if isinstance(value, torch.Tensor)}
    for key, values in given.items():
        if isinstance(values, list):
            tensors |= {f"l.{key}.{i}": value.contiguous() for i, value in enumerate(values)}
    save_file({**tensors, "out": out.contiguous()}, folder / f"{name}.safetensors", metadata={"facts": json.dumps(facts)})


def flux_cases(folder: Path) -> None:
    guided = {"guidance": torch.tensor([3.5, 2.0])}
    cases = {
        "flux": ({}, {}, guided), "flux_odd_size": ({}, {"height": 7, "width": 9}, guided),
        "flux_plain": ({"guidance_embed": False}, {}, {}),
        "flux_no_bias": ({"qkv_bias": False, "mlp_ratio": 2.0}, {}, guided),
        "flux_mask": ({}, {"height": 4, "width": 4}, {**guided, "attention_mask": torch.randn(2, 9, 9)}),
        "flux_control": ({}, {}, {**guided, "control_input": [torch.randn(2, 24, 64), torch.randn(2, 10, 64)],
                                  "control_output": [torch.randn(2, 24, 64)]}),
        "flux_bf16": ({}, {}, guided),
    }  # fmt: skip
    for method in ("offset", "index", "uxo"):
        refs = [torch.randn(2, 16, 6, 4), torch.randn(2, 16, 5, 8), torch.randn(2, 16, 4, 4)]
        cases[f"flux_ref_{method}"] = ({}, {}, {**guided, "ref_latents": refs, "ref_latents_method": method})
    for name, (sizes, shape, more) in cases.items():
        sizes = {**FLUX, **sizes}
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        model = Flux(**sizes, dtype=dtype, operations=OPS)
        randomise(model)
        given = {**inputs(**shape), **more}
        call = {key: value.to(dtype) if isinstance(value, torch.Tensor) and key != "timestep" else value for key, value in given.items()}
        control = {"input": call.pop("control_input", []), "output": call.pop("control_output", [])}
        out = model(**call, control=control if control["input"] else None, transformer_options={})
        write(folder, name, model, given, out, sizes=sizes, method=more.get("ref_latents_method"))


def sd3_cases(folder: Path) -> None:
    cases = {
        "sd3": ({}, {}), "sd3_odd_size": ({}, {"height": 9, "width": 7}), "sd3_norm": ({"qk_norm": "rms"}, {}),
        "sd3_dual": ({"qk_norm": "rms", "x_block_self_attn_layers": [0, 1]}, {}), "sd3_control": ({}, {}), "sd3_bf16": ({}, {}),
    }  # fmt: skip
    for name, (sizes, shape) in cases.items():
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        model = OpenAISignatureMMDITWrapper(**{**SD3, **sizes}, dtype=dtype, operations=OPS)
        randomise(model)
        given = inputs(**shape)
        given["timestep"] = given["timestep"] * 1000
        if name == "sd3_control":
            given["control_output"] = [torch.randn(2, 24, 128), torch.randn(2, 24, 128)]
        call = {key: value.to(dtype) if key != "timestep" else value for key, value in given.items() if key != "control_output"}
        call["timesteps"] = call.pop("timestep")
        control = {"output": given["control_output"]} if name == "sd3_control" else None
        write(folder, name, model, given, model(**call, control=control, transformer_options={}))


def lumina_cases(folder: Path) -> None:
    cases = {
        "lumina2": ({}, {"tokens": 7}), "lumina2_odd_size": ({}, {"height": 5, "width": 9}), "lumina2_equal_heads": ({"n_kv_heads": 4}, {}),
        "lumina2_mask": ({}, {"batch": 1, "tokens": 8}), "lumina2_bf16": ({}, {}),
    }  # fmt: skip
    for name, (sizes, shape) in cases.items():
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        model = NextDiT(**{**LUMINA, **sizes}, dtype=dtype, operations=OPS)
        randomise(model)
        given = inputs(**shape)
        del given["y"]
        call = {key: value.to(dtype) if key != "timestep" else value for key, value in given.items()}
        call["timesteps"] = call.pop("timestep")
        count = call["context"].shape[1]
        if name == "lumina2_mask":
            given["attention_mask"] = call["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
            count = 5
        write(folder, name, model, given, model(**call, num_tokens=count, transformer_options={}), num_tokens=count)


def codec_cases(folder: Path) -> None:
    for channels in (4, 16):
        model = TAESD(latent_channels=channels)
        randomise(model, 0.05)
        model.vae_scale.data.fill_(1.5)
        model.vae_shift.data.fill_(0.1)
        given = {"pixels": torch.rand(2, 3, 16, 24) * 2 - 1, "latent": torch.randn(2, channels, 2, 3)}
        out = torch.cat((model.encode(given["pixels"]).flatten(), model.decode(given["latent"]).flatten()))
        write(folder, f"taesd_{channels}", model, given, out)
    vae = comfy.sd.VAE(sd=model.state_dict())
    given = {"pixels": torch.rand(2, 83, 100, 3), "latent": torch.randn(2, 16, 9, 12)}
    calls = (
        vae.encode(given["pixels"]), vae.decode(given["latent"]), vae.encode_tiled(given["pixels"], tile_x=48, tile_y=64, overlap=16),
        vae.decode_tiled(given["latent"], tile_x=8, tile_y=6, overlap=2),
    )  # fmt: skip
    write(folder, "vae", model, given, torch.cat([result.flatten() for result in calls]))
    regular = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
    path = "comfy.ldm.modules.diffusionmodules.model."
    parts = {f"{half.lower()}_config": {"target": path + half, "params": KL} for half in ("Encoder", "Decoder")}
    models = {
        "kl_16": comfy.ldm.models.autoencoder.AutoencodingEngine(regularizer_config=regular, **parts),
        "kl_quant": comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig={**KL, "z_channels": 4}, embed_dim=4),
    }
    for name, model in models.items():
        randomise(model, 0.05)
        given = {"pixels": torch.rand(2, 3, 16, 24) * 2 - 1, "latent": torch.randn(2, 16 if name == "kl_16" else 4, 4, 6)}
        out = torch.cat((model.encode(given["pixels"]).flatten(), model.decode(given["latent"]).flatten()))
        write(folder, name, model, given, out)


def wrapped_cases(folder: Path) -> None:
    """The whole of apply_model, with conditions built by extra_conds, for each family."""
    families = {
        "wrapped_flux": (comfy.supported_models.Flux, {"image_model": "flux", **FLUX}),
        "wrapped_schnell": (comfy.supported_models.FluxSchnell, {"image_model": "flux", **FLUX, "guidance_embed": False}),
        "wrapped_fill": (comfy.supported_models.Flux, {"image_model": "flux", **FLUX, "in_channels": 96}),
        "wrapped_sd3": (comfy.supported_models.SD3, dict(SD3)),
        "wrapped_lumina2": (comfy.supported_models.Lumina2, {"image_model": "lumina2", **LUMINA}),
    }
    for name, (config, sizes) in families.items():
        model_config = config(sizes)
        model_config.unet_config["dtype"] = torch.float32
        model = model_config.get_model({}, "")
        randomise(model.diffusion_model)
        given = {
            "x": torch.randn(2, 16, 8, 12), "sigma": torch.tensor([0.7, 0.3]), "cross_attn": torch.randn(1, 5, 40),
            "pooled": torch.randn(1, 24), "reference": torch.randn(1, 16, 6, 4), "mask": torch.rand(1, 1, 64, 96),
            "concat": torch.randn(1, 16, 8, 12),
        }  # fmt: skip
        entry = {
            "cross_attn": given["cross_attn"], "pooled_output": given["pooled"], "noise": given["x"], "device": "cpu",
            "attention_mask": torch.ones(1, 5, dtype=torch.long) if name == "wrapped_lumina2" else None,
            "reference_latents": [given["reference"]] if name == "wrapped_flux" else None, "guidance": 2.5,
        }  # fmt: skip
        if name == "wrapped_fill":
            entry |= {"concat_latent_image": given["concat"], "concat_mask": given["mask"]}
        conds = {key: cond.process_cond(batch_size=2, device="cpu", area=None).cond for key, cond in model.extra_conds(**entry).items()}
        out = model.apply_model(given["x"], given["sigma"], **conds)
        facts = {
            "sizes": {key: value for key, value in sizes.items() if key != "image_model"}, "conds": sorted(conds),
            "sigmas": [float(model.model_sampling.sigmas[i]) for i in (0, 10, -1)],
            "memory": float(model.memory_required([2, 16, 8, 12])),
        }  # fmt: skip
        write(folder, name, model.diffusion_model, given, out, **facts)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        for cases in (flux_cases, sd3_cases, lumina_cases, codec_cases, wrapped_cases):
            cases(DESTINATION)
