"""Runs inside ComfyUI's Python: masked runs of ComfyUI's own Wan 2.2 class, at toy sizes, through the pack's nodes; prints one JSON object.

Started by test_masks_in_comfyui.py with the pack's folder as its only argument.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

PACK = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402

SIZES = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "patch_size": (1, 2, 2),
    "freq_dim": 32, "in_dim": 48, "out_dim": 48, "text_dim": 16, "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
SIGMAS = torch.tensor([1.0, 0.5, 0.0])
VIDEO = torch.randn(1, 48, 5, 4, 6, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(1, 48, 5, 4, 6, generator=torch.Generator().manual_seed(1))


def load_pack() -> dict[str, type]:
    """The pack as ComfyUI loads a folder of custom nodes: under a name of its own."""
    spec = importlib.util.spec_from_file_location("pack_under_test", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack_under_test"] = module
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


def wan() -> tuple[comfy.model_patcher.ModelPatcher, list[torch.Tensor]]:
    """A Wan 2.2 5B of toy size with random weights, and the list its network's times are put on."""
    config = comfy.supported_models.WAN22_T2V(SIZES)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(2)
    for parameter in model.diffusion_model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    times, forward = [], model.diffusion_model.forward

    def watched(x, timestep, *args, **kwargs):
        times.append(timestep.clone())
        return forward(x, timestep, *args, **kwargs)

    model.diffusion_model.forward = watched
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")), times


def main() -> None:
    nodes = load_pack()
    model, times = wan()
    condition = [[torch.zeros(1, 7, 16), {}]]

    def run(patched, latent, sampler, sigmas=SIGMAS):
        mask = latent.get("noise_mask")
        return comfy.sample.sample_custom(
            patched, NOISE, 1.0, sampler, sigmas, condition, condition, latent["samples"], noise_mask=mask, disable_pbar=True, seed=1
        )

    builder = nodes["RectiflowVideoMaskBuilder"]
    defaults = {declared.name: declared.options.get("default") for declared in builder.INPUTS if not declared.optional}
    inputs = {**defaults, "latent": {"samples": VIDEO}, "task": "predict", "vae_stride": "4x16x16", "given": 5}
    pixels, _, _ = builder().execute(**inputs)
    answers = {}
    for known in ("auto", "clean_t0", "noised", "clean_shared"):
        times.clear()
        latent, patched = nodes["RectiflowMaskedVideoCondition"]().execute(model=model, latent={"samples": VIDEO}, mask=pixels, known=known)
        (heun,) = nodes["RectiflowFlowODESampler"]().execute(solver="heun", start_from="noise", last_step="euler")
        out = run(patched, latent, heun)
        (pasted,) = nodes["RectiflowPasteKnown"]().execute(generated={"samples": out}, known=latent)
        kept = torch.equal(pasted["samples"][:, :, :2], VIDEO[:, :, :2]) and bool(torch.isfinite(out).all())
        answers[known] = {"times": [time.flatten().tolist() for time in times], "kept": kept}
    (repaint,) = nodes["RectiflowRepaintSampler"]().execute(resample=2, seed_offset=0)
    answers["repaint"] = bool(torch.isfinite(run(patched, latent, repaint)).all())
    (eps,) = nodes["RectiflowConvertPrediction"]().execute(model=model, to="eps")
    levels = SIGMAS.clamp_max(0.99) / (1 - SIGMAS.clamp_max(0.99))
    flow = run(model, {"samples": VIDEO}, comfy.samplers.sampler_object("euler"), SIGMAS.clamp_max(0.99))
    other = run(eps, {"samples": VIDEO}, comfy.samplers.sampler_object("euler"), levels)
    answers["views_differ_by"] = float((flow - other).abs().max() / flow.abs().max())
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
