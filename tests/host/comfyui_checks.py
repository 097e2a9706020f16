"""Runs inside ComfyUI's Python and compares this host with it, side by side in one process; prints one JSON object.

Each check returns {case: difference}: the largest absolute difference over values, or 0 and 1 for equal and unequal. It is started by
test_against_comfyui.py.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from types import SimpleNamespace

import torch

sys.argv = [sys.argv[0], "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.k_diffusion.sampling  # noqa: E402
import comfy.latent_formats  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_sampling  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.utils  # noqa: E402
import comfy.weight_adapter  # noqa: E402
from rectiflow.host.embedded import (  # noqa: E402
    k_diffusion_sampling,
    latent_formats,
    lora,
    model_sampling,
    patcher_extension,
    samplers,
    utils,
)
from rectiflow.host.embedded.context import use_host  # noqa: E402
from rectiflow.tests.host.comfyui_runs import check_events, check_runs, difference  # noqa: E402
from rectiflow.tests.host.toy import make_host  # noqa: E402

# Tables, schedules, samplers


def sampling(module, kind: str):
    sigma, prediction = {
        "flow": ("DiscreteFlow", "CONST"),
        "flux": ("Flux", "CONST"),
        "eps": ("Discrete", "EPS"),
        "v": ("Discrete", "V_PREDICTION"),
    }[kind]
    made = type("Sampling", (getattr(module, f"ModelSampling{sigma}"), getattr(module, prediction)), {})()
    if kind == "flow":
        made.set_parameters(shift=3.0)
    return made


def both(kind: str):
    return sampling(comfy.model_sampling, kind), sampling(model_sampling, kind)


def check_tables() -> dict:
    result = {}
    x, out, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.8])
    for kind in ("flow", "flux", "eps", "v"):
        theirs, ours = both(kind)
        result[f"{kind} table"] = difference(theirs.sigmas, ours.sigmas)
        result[f"{kind} percent"] = max(difference(theirs.percent_to_sigma(p / 7), ours.percent_to_sigma(p / 7)) for p in range(-1, 9))
        result[f"{kind} timestep"] = difference(theirs.timestep(sigma), ours.timestep(sigma))
        for method, args in (
            ("calculate_input", (sigma, x)),
            ("calculate_denoised", (sigma, out, x)),
            ("inverse_noise_scaling", (sigma, x)),
        ):
            result[f"{kind} {method}"] = difference(getattr(theirs, method)(*args), getattr(ours, method)(*args))
        for full in (False, True):
            result[f"{kind} noise {full}"] = difference(
                theirs.noise_scaling(sigma, x.clone(), out, full), ours.noise_scaling(sigma, x, out, full)
            )
    return result


def check_schedules() -> dict:
    result = {}
    for kind in ("flow", "flux", "eps"):
        theirs, ours = both(kind)
        for name in comfy.samplers.SCHEDULER_NAMES:
            for steps in (1, 2, 3, 4, 7, 20, 50, 1000):
                if (name, steps) != ("kl_optimal", 1):  # 0/0 there
                    one, other = comfy.samplers.calculate_sigmas(theirs, name, steps), samplers.calculate_sigmas(ours, name, steps)
                    result[f"{kind} {name} {steps}"] = difference(one, other)
    return result


def denoiser(sampling_object):
    """A smooth nonlinear denoiser with a separate unconditional prediction, in the shape that sampler functions are given."""
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)) * 0.3

    def call(x, sigma, model_options=None, seed=None, denoise_mask=None):
        level = sigma.view(-1, 1, 1, 1)
        cond_denoised, uncond_denoised = (
            torch.tanh(torch.einsum("dc,bchw->bdhw", mix, x) * gain + level) * (1 - 0.3 * level) for gain in (1.0, 0.7)
        )
        denoised = uncond_denoised + (cond_denoised - uncond_denoised) * 1.7
        for function in (model_options or {}).get("sampler_post_cfg_function", []):
            denoised = function({"denoised": denoised, "uncond_denoised": uncond_denoised, "cond_denoised": cond_denoised})
        return denoised

    patcher = SimpleNamespace(get_model_object=lambda name: sampling_object)
    call.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling_object), model_patcher=patcher)
    return call


def check_samplers() -> dict:
    """Relative to the result's size. uni_pc with a single step is left out: ComfyUI returns its start unsolved there."""
    result = {}
    for kind in ("flow", "flux", "eps"):
        theirs, ours = both(kind)
        for schedule, steps in (("simple", 8), ("normal", 5), ("simple", 1), ("simple", 2), ("beta", 12), ("karras", 6)):
            sigmas = comfy.samplers.calculate_sigmas(theirs, schedule, steps)
            noise = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))
            start = theirs.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
            for name in comfy.samplers.SAMPLER_NAMES:
                if name in k_diffusion_sampling.UNAVAILABLE or (steps == 1 and name.startswith("uni_pc")):
                    continue
                outcomes = []
                for module, sampling_object in ((comfy.samplers, theirs), (samplers, ours)):
                    reports = []
                    function = module.sampler_object(name).sampler_function
                    end = function(
                        denoiser(sampling_object), start.clone(), sigmas.clone(), extra_args={"model_options": {}, "seed": 3},
                        callback=lambda report, reports=reports: reports.append((report["i"], report["denoised"].clone())), disable=True,
                    )  # fmt: skip
                    outcomes.append((end, [i for i, _ in reports], torch.stack([end] + [x0 for _, x0 in reports])))
                (one, indices, x0), (other, our_indices, our_x0) = outcomes
                scale = max(1.0, float(one.abs().max()))
                result[f"{kind} {schedule} {steps} {name}"] = max(difference(one, other), difference(x0, our_x0)) / scale + difference(
                    indices, our_indices
                )
    return result


# Helpers


def check_helpers() -> dict:
    result = {}
    random = torch.Generator().manual_seed(5)
    for size, target in (((6, 10), (8, 5)), ((9, 9), (4, 12)), ((5, 7), (5, 7))):
        samples = torch.rand(2, 3, *size, generator=random)
        for method in ("nearest-exact", "bilinear", "area", "bicubic", "lanczos", "bislerp"):
            for crop in ("disabled", "center"):
                arguments = (target[1], target[0], method, crop)
                one, other = comfy.utils.common_upscale(samples, *arguments), utils.common_upscale(samples, *arguments)
                result[f"upscale {size} {arguments}"] = difference(one, other)
    video = torch.rand(2, 3, 4, 6, 6, generator=random)
    result["upscale video"] = difference(
        comfy.utils.common_upscale(video, 4, 9, "bilinear", "center"), utils.common_upscale(video, 4, 9, "bilinear", "center")
    )
    for old in range(1, 6):
        for new in range(1, 9):
            tensor = torch.arange(float(old)).unsqueeze(1)
            for name in ("repeat_to_batch_size", "resize_to_batch_size"):
                result[f"{name} {old} {new}"] = difference(getattr(comfy.utils, name)(tensor, new), getattr(utils, name)(tensor, new))
    for mask, shape in (((3, 7, 9), (2, 4, 5, 5)), ((1, 1, 8, 8), (3, 2, 4, 4)), ((5, 4, 4), (1, 2, 3, 6, 6)), ((2, 1, 9), (2, 3, 5))):
        values = torch.rand(mask, generator=random)
        result[f"reshape_mask {mask}"] = difference(comfy.utils.reshape_mask(values, shape), utils.reshape_mask(values, shape))
    mask = torch.rand(2, 3 + 12, 3 + 12, generator=random)
    result["dit mask"] = difference(comfy.utils.upscale_dit_mask(mask, (3, 4), (5, 2)), utils.upscale_dit_mask(mask, (3, 4), (5, 2)))
    samples = torch.rand(1, 3, 40, 23, generator=random)
    for tile, overlap in ((16, 4), (24, 8), (64, 8)):
        functions = [lambda part: torch.nn.functional.interpolate(part, scale_factor=2, mode="bicubic")] * 2
        one, other = (module.tiled_scale(samples, f, tile, tile, overlap, 2) for module, f in zip((comfy.utils, utils), functions))
        result[f"tiles {tile} {overlap}"] = difference(one, other)
    return result


def check_weight_patches() -> dict:
    result = {}
    random = torch.Generator().manual_seed(6)
    adapters = (comfy.weight_adapter.LoRAAdapter, lora.LoRAAdapter)
    modules = (comfy.lora, lora)
    up, down, whole = torch.randn(4, 2, generator=random), torch.randn(2, 3, generator=random), torch.randn(4, 3, generator=random)
    cases = {
        "diff": lambda adapter: (whole,),
        "set": lambda adapter: ("set", (whole,)),
        "pad": lambda adapter: ("diff", (torch.ones(6, 5), {"pad_weight": True})),
        "lora": lambda adapter: adapter(set(), (up, down, 1.5, None, None, None)),
        "lora plain": lambda adapter: adapter(set(), (up, down, None, None, None, None)),
        "model as lora": lambda adapter: ("model_as_lora", (whole,)),
        "misfit": lambda adapter: (torch.ones(9, 9),),
    }
    for case, make in cases.items():
        for strength, of_model in ((1.0, 1.0), (0.3, 0.7)):
            weights = []
            for module, adapter in zip(modules, adapters):
                patches = [(strength, make(adapter), of_model, None, None), (0.5, (torch.ones(1, 3),), 1.0, (0, 1, 1), lambda d: d * 2)]
                weights.append(module.calculate_weight(patches, torch.ones(4, 3), "k", original_weights={"k": [(torch.zeros(4, 3), None)]}))
            result[f"{case} {strength}"] = difference(*weights)
    return result


def check_merging() -> dict:
    first = {"a": {"k1": [1], "k2": [2]}, "b": [3], "c": 4, "n": {"m": {"x": [1]}}}
    second = {"a": {"k3": [5], "k1": [6]}, "b": [7], "c": 8, "d": {"e": 9}, "n": {"m": {"y": [2], "x": [3]}}}
    one, other = (json.dumps(module.merge_nested_dicts(first, second)) for module in (comfy.patcher_extension, patcher_extension))
    return {"merged dicts, with the order of their keys": difference(one, other)}


def check_latent_formats() -> dict:
    result = {}
    for name in ("SD15", "SDXL", "SD3", "Flux"):
        theirs, ours = getattr(comfy.latent_formats, name)(), getattr(latent_formats, name)()
        latent = torch.randn(1, ours.latent_channels, 2, 2)
        result[f"{name} in"] = difference(theirs.process_in(latent), ours.process_in(latent))
        result[f"{name} out"] = difference(theirs.process_out(latent), ours.process_out(latent))
        for field in ("latent_channels", "latent_dimensions", "latent_rgb_factors", "latent_rgb_factors_bias", "taesd_decoder_name"):
            result[f"{name} {field}"] = difference(getattr(theirs, field), getattr(ours, field))
    return result


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    host = make_host()
    host.memory.reported_free = 10**15
    checks = (
        check_tables, check_schedules, check_samplers, check_runs, check_events, check_helpers, check_weight_patches, check_merging,
        check_latent_formats,
    )  # fmt: skip
    with use_host(host), torch.inference_mode():
        print(json.dumps({check.__name__.removeprefix("check_"): check() for check in checks}))


if __name__ == "__main__":
    main()
