"""Every model and codec gives what ComfyUI's class gives with the same weights. Needs COMFYUI_PATH; runs it in its own Python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.host.embedded.ldm.lumina2 import NextDiT
from rectiflow.host.embedded.ldm.mmdit import MMDiT
from rectiflow.host.embedded.model_base import MODEL_CLASSES
from rectiflow.host.embedded.model_detection import (
    flux_config,
    flux_params,
    mmdit_params,
    model_config_from_unet,
    nextdit_params,
    with_dtypes,
)
from rectiflow.host.embedded.safetensors_file import load_safetensors
from rectiflow.host.embedded.vae import VAE, find_codec
from rectiflow.host.embedded.weights import load_into

pytestmark = pytest.mark.comfyui

SCRIPT = Path(__file__).with_name("comfyui_reference.py")
FP32 = 2e-5  # relative to the largest output: sums in another order
BF16 = 3e-2  # bf16 keeps 8 bits; a reordered sum moves a few activations by one step each, block after block


class Case:
    def __init__(self, path: Path):
        tensors, metadata = load_safetensors(path)
        self.name = path.stem
        self.facts = json.loads(metadata["facts"])
        self.weights = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("w.")}
        self.inputs = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("i.")}
        for key in sorted(key for key in tensors if key.startswith("l.")):
            self.inputs.setdefault(key[2:].rpartition(".")[0], []).append(tensors[key])
        self.out = tensors["out"]
        self.dtype = torch.bfloat16 if self.name.endswith("bf16") else torch.float32

    def cast(self, *names: str):
        return [self.inputs[name].to(self.dtype) for name in names]

    def check(self, out: torch.Tensor) -> None:
        assert out.shape == self.out.shape and out.dtype == self.out.dtype
        error = (out.float() - self.out.float()).abs().max() / self.out.float().abs().max()
        assert error < (BF16 if self.dtype == torch.bfloat16 else FP32), f"{self.name}: relative error {error:.2e}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory, request) -> Path:
    folder = tmp_path_factory.mktemp("comfyui_models")
    python = os.environ.get("COMFYUI_PYTHON", "python")
    done = subprocess.run([python, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def network(make, params, case: Case):
    return load_into(make(params, dtype=case.dtype, device="meta"), case.weights, case.name, case.dtype, strict=True)


@pytest.mark.parametrize("name", [
    "flux", "flux_odd_size", "flux_plain", "flux_no_bias", "flux_mask", "flux_control", "flux_bf16", "flux_ref_offset", "flux_ref_index",
    "flux_ref_uxo",
])  # fmt: skip
def test_flux(reference, name):
    case = Case(reference / f"{name}.safetensors")
    params = flux_params(case.weights)
    assert params == FluxParams(**case.facts["sizes"])
    x, context, y = case.cast("x", "context", "y")
    guidance = case.inputs.get("guidance")
    control = {"input": case.inputs["control_input"], "output": case.inputs["control_output"]} if "control_input" in case.inputs else None
    more = {"attention_mask": case.inputs["attention_mask"]} if "attention_mask" in case.inputs else {}
    if case.facts["method"]:
        more["ref_latents_method"] = case.facts["method"]
    out = network(Flux, params, case)(
        x, case.inputs["timestep"], context, y, None if guidance is None else guidance.to(case.dtype), case.inputs.get("ref_latents"),
        control, {}, **more,
    )  # fmt: skip
    case.check(out)


@pytest.mark.parametrize("name", ["sd3", "sd3_odd_size", "sd3_norm", "sd3_dual", "sd3_control", "sd3_bf16"])
def test_sd3(reference, name):
    case = Case(reference / f"{name}.safetensors")
    x, context, y = case.cast("x", "context", "y")
    control = {"output": case.inputs["control_output"]} if "control_output" in case.inputs else None
    case.check(network(MMDiT, mmdit_params(case.weights), case)(x, case.inputs["timestep"], context, y, control=control))


@pytest.mark.parametrize("name", ["lumina2", "lumina2_odd_size", "lumina2_equal_heads", "lumina2_mask", "lumina2_bf16"])
def test_lumina2(reference, name):
    case = Case(reference / f"{name}.safetensors")
    x, context = case.cast("x", "context")
    mask = case.inputs.get("attention_mask")
    case.check(network(NextDiT, nextdit_params(case.weights), case)(x, case.inputs["timestep"], context, case.facts["num_tokens"], mask))


@pytest.mark.parametrize("name", ["taesd_4", "taesd_16", "kl_16", "kl_quant"])
def test_codecs(reference, name):
    case = Case(reference / f"{name}.safetensors")
    codec = find_codec(case.weights).module
    case.check(torch.cat((codec.encode(case.inputs["pixels"]).flatten(), codec.decode(case.inputs["latent"]).flatten())))


def test_vae_wrapper(reference, tmp_path):
    """Cropping, ranges, and the three blended tilings."""
    case = Case(reference / "vae.safetensors")
    pixels, latent = case.inputs["pixels"], case.inputs["latent"]
    with use_host(make_host(tmp_path, settings=HostSettings(device="cpu"))):
        vae = VAE(sd=case.weights)
        calls = (
            vae.encode(pixels), vae.decode(latent), vae.encode_tiled(pixels, tile_x=48, tile_y=64, overlap=16),
            vae.decode_tiled(latent, tile_x=8, tile_y=6, overlap=2),
        )  # fmt: skip
    case.check(torch.cat([result.flatten() for result in calls]))


@pytest.mark.parametrize("name", ["wrapped_flux", "wrapped_schnell", "wrapped_fill", "wrapped_sd3", "wrapped_lumina2"])
def test_apply_model(reference, name):
    """Conditions, latent scaling, sigma tables, memory estimate and the call itself, through BaseModel."""
    case = Case(reference / f"{name}.safetensors")
    config = model_config_from_unet(case.weights, "")
    if config.image_model == "flux":
        assert config == flux_config(FluxParams(**case.facts["sizes"]), config.latent_format)
    networks = {"flux": (Flux, flux_params), "sd3": (MMDiT, mmdit_params), "lumina2": (NextDiT, nextdit_params)}
    make, params_from = networks[config.image_model]
    model = MODEL_CLASSES[config.image_model](with_dtypes(config, torch.float32, None), network(make, params_from(case.weights), case))
    given = case.inputs
    entry = {
        "cross_attn": given["cross_attn"], "pooled_output": given["pooled"], "noise": given["x"], "device": "cpu", "guidance": 2.5,
        "attention_mask": torch.ones(1, 5, dtype=torch.long) if name == "wrapped_lumina2" else None,
        "reference_latents": [given["reference"]] if name == "wrapped_flux" else None,
    }  # fmt: skip
    if name == "wrapped_fill":
        entry |= {"concat_latent_image": given["concat"], "concat_mask": given["mask"]}
    conds = {key: cond.process_cond(batch_size=2, device="cpu", area=None).cond for key, cond in model.extra_conds(**entry).items()}
    assert sorted(conds) == case.facts["conds"]
    case.check(model.apply_model(given["x"], given["sigma"], **conds))
    sigmas = model.model_sampling.sigmas
    assert [float(sigmas[i]) for i in (0, 10, -1)] == pytest.approx(case.facts["sigmas"], rel=1e-6)
    assert model.memory_required([2, 16, 8, 12]) == pytest.approx(case.facts["memory"], rel=1e-6)
