"""Whole runs on this host and on ComfyUI, side by side: the same latents, the same events. Part of comfyui_checks.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from rectiflow.host.embedded import sample, samplers
from rectiflow.tests.host.toy import CPU, ToyLatent, ToyNet, cond, toy_model


def difference(one, other) -> float:
    if isinstance(one, torch.Tensor):
        return float((one.float() - other.float()).abs().max()) if one.shape == other.shape else float("inf")
    return float(one != other)


class ComfyLatent(comfy.latent_formats.LatentFormat):
    latent_channels, scale_factor, shift_factor = ToyLatent.latent_channels, ToyLatent.scale_factor, ToyLatent.shift_factor
    process_in, process_out = ToyLatent.process_in, ToyLatent.process_out


def comfy_toy():
    """The toy network inside ComfyUI's own BaseModel and patcher."""
    config = SimpleNamespace(
        unet_config={"disable_unet_model_creation": True}, latent_format=ComfyLatent(), sampling_settings={"shift": 1.0, "multiplier": 1.0},
        manual_cast_dtype=None, memory_usage_factor=1.0,
    )  # fmt: skip
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.FLOW, device=CPU)
    model.diffusion_model = ToyNet()
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


HOSTS = ((comfy_toy, comfy.sample, comfy.samplers), (toy_model, sample, samplers))


def run_cases() -> dict:
    noise_of = lambda size: torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(0))  # noqa: E731
    picture = torch.rand(2, 2, 12, 10, generator=torch.Generator().manual_seed(1))
    half = torch.zeros(24, 20)
    half[:, :9] = 1
    soft = torch.rand(1, 1, 6, 5, generator=torch.Generator().manual_seed(3))
    small = {"noise": noise_of((12, 10)), "latent": torch.zeros(2, 2, 12, 10)}
    return {
        "plain": small,
        "cfg 1": {**small, "cfg": 1.0},
        "heun": {**small, "name": "heun"},
        "image to image": {**small, "latent": picture, "sigmas": [0.6, 0.4, 0.0]},
        "stopped half way": {**small, "latent": picture, "sigmas": [1.0, 0.6, 0.4]},
        "soft inpainting": {**small, "latent": picture, "mask": soft},
        "ddim inpainting": {**small, "latent": picture, "mask": soft, "name": "ddim"},
        "ancestral": {**small, "name": "euler_ancestral"},
        "several conditions": {
            **small,
            "positive": cond(1, strength=0.4) + cond(2, tokens=4) + cond(-1, tokens=3),
            "negative": cond(0.3) + cond(0.1),
        },
        "masks": {**small, "positive": cond(1, mask=half) + cond(2, mask=(1 - half)[None], mask_strength=0.3)},
        "mask bounds": {**small, "positive": cond(1) + cond(2, mask=half, set_area_to_bounds=True)},
        "areas": {**small, "positive": cond(1) + cond(2, area=(6, 7, 3, 2), strength=2.0), "negative": cond(0.5)},
        "relative area": {**small, "positive": cond(1) + cond(2, area=("percentage", 0.4, 0.7, 0.3, 0.2))},
        "area in area": {**small, "positive": cond(1) + cond(2, area=(8, 8, 2, 1)) + cond(3, area=(4, 4, 4, 3))},
        "area of the negative": {**small, "positive": cond(1), "negative": cond(2, area=(8, 8, 2, 1)) + cond(0)},
        "ranges": {**small, "positive": cond(1, end_percent=0.45) + cond(2, start_percent=0.45), "negative": cond(0, start_percent=0.2)},
        "text encoder ranges": {**small, "positive": cond(1, clip_start_percent=0.0, clip_end_percent=0.5) + cond(2, start_percent=0.3)},
        "defaults": {**small, "positive": cond(1, mask=half) + cond(2, default=True)},
    }


def check_runs() -> dict:
    result = {}
    for case, given in run_cases().items():
        ends = []
        for make, sample_module, samplers_module in HOSTS:
            sigmas = torch.tensor(given.get("sigmas", [1.0, 0.8, 0.55, 0.3, 0.0]))
            sampler = samplers_module.sampler_object(given.get("name", "euler"))
            arguments = (given.get("cfg", 2.5), sampler, sigmas, given.get("positive", cond(1)), given.get("negative", cond(0.2)))
            end = sample_module.sample_custom(
                make(),
                given["noise"].clone(),
                *arguments,
                given["latent"].clone(),
                noise_mask=given.get("mask"),
                disable_pbar=True,
                seed=11,
            )
            ends.append(end)
        result[case] = difference(*ends)
    cases = (
        (5, "euler", "simple", 1.0, {}),
        (4, "dpmpp_2m", "beta", 0.6, {}),
        (4, "dpm_2", "normal", 1.0, {}),
        (3, "res_multistep", "simple", 0.31, {}),
        (6, "euler", "simple", 1.0, {"start_step": 2, "last_step": 4}),
        (6, "heun", "simple", 1.0, {"last_step": 3, "force_full_denoise": True}),
    )
    for steps, name, scheduler, denoise, options in cases:
        ends = []
        for make, sample_module, _ in HOSTS:
            latent = torch.rand(2, 2, 5, 4, generator=torch.Generator().manual_seed(4))
            noise = sample_module.prepare_noise(latent, 77, [3, 1])
            arguments = (noise, steps, 3.0, name, scheduler, cond(1), cond(-1), latent)
            ends.append(sample_module.sample(make(), *arguments, denoise=denoise, disable_pbar=True, seed=77, **options))
        result[f"ksampler {name} {scheduler} {denoise} {options}"] = difference(*ends)
    for seed, chosen in ((0, None), (2**64 - 1, None), (9, [0, 4, 2, 2])):
        latent = torch.zeros(4, 3, 2, 2)
        result[f"noise {seed} {chosen}"] = difference(
            comfy.sample.prepare_noise(latent, seed, chosen), sample.prepare_noise(latent, seed, chosen)
        )
    return result


def traced_events(make, sample_module, samplers_module, prepare) -> list:
    """Everything a node can hear of two runs, a run of a clone, a failing run and the end of the model."""
    events: list = []
    model = make()
    for name, kind in vars(comfy.patcher_extension.CallbacksMP).items():
        if name.isupper() and name != "ON_REGISTER_ALL_HOOK_PATCHES":  # hooks are ComfyUI's own
            model.add_callback(kind, lambda patcher, *args, name=name: events.append((name, len(args), patcher is model)))
    injection = comfy.patcher_extension.PatcherInjection(lambda patcher: events.append("inject"), lambda patcher: events.append("eject"))

    def spans(kind):
        def wrapper(executor, *args, **kwargs):
            owner = type(executor.class_obj).__name__
            names = [type(argument).__name__ for argument in args]
            words = sorted(set(kwargs) - {"latent_shapes"})
            events.append((kind, owner, names, words))
            try:
                return executor(*args, **kwargs)
            finally:
                events.append(f"end of {kind}")

        return wrapper

    for name, kind in vars(comfy.patcher_extension.WrappersMP).items():
        if name.isupper():
            model.add_wrapper_with_key(kind, "k", spans(kind))
    model.set_injections("k", [injection])
    model.add_object_patch("model_sampling", model.get_model_object("model_sampling"))
    prepare(model, events)
    noise, latent, sigmas = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.tensor([1.0, 0.5, 0.0])

    def run(model):
        sampler = samplers_module.sampler_object("euler")
        sample_module.sample_custom(model, noise, 2.0, sampler, sigmas, cond(1), cond(0), latent, disable_pbar=True, seed=1)

    run(model)
    events.append("again")
    run(model)
    clone = model.clone()
    events.append("clone")
    run(clone)
    clone.add_wrapper("predict_noise", lambda executor, *args, **kwargs: {}["fails"])
    events.append("failing")
    try:
        run(clone)
    except KeyError as error:
        events.append(str(error))
    del clone
    events.append("patched")
    patched = model.clone()
    patched.add_patches({"diffusion_model.gain": (torch.ones(2),)})
    run(patched)
    events.append(("gain", patched.model.diffusion_model.gain.tolist()))
    run(model)
    events.append(("gain", model.model.diffusion_model.gain.tolist()))
    model.detach()
    return events


def without_idle_ejections(events: list) -> list:
    """ComfyUI takes injections out and puts them back while it looks for weight hooks to undo; this host has none to look for."""
    kept: list = []
    for event in events:
        kept.append(event)
        if [name if isinstance(name, str) else name[0] for name in kept[-4:]] == ["eject", "ON_EJECT_MODEL", "inject", "ON_INJECT_MODEL"]:
            del kept[-4:]
    return kept


def check_events() -> dict:
    result = {}

    def hooks(model, events):
        def hear(name, answer):
            return lambda args: events.append((name, sorted(args))) or answer(args)

        model.set_model_sampler_pre_cfg_function(hear("pre", lambda args: args["conds_out"]))
        model.set_model_sampler_cfg_function(hear("cfg", lambda args: args["cond"]))
        model.set_model_sampler_post_cfg_function(hear("post", lambda args: args["denoised"]))
        model.set_model_unet_function_wrapper(
            lambda apply, args: (
                events.append(("call", sorted(args), sorted(args["c"]))) or apply(args["input"], args["timestep"], **args["c"])
            )
        )

    for case, prepare in (("plain", lambda model, events: None), ("hooks", hooks)):
        theirs, ours = (without_idle_ejections(traced_events(*host, prepare)) for host in HOSTS)
        first = next((i for i, (one, other) in enumerate(zip(theirs, ours)) if one != other), None)
        result[case] = float(first is not None or len(theirs) != len(ours))
        if result[case]:
            place = first if first is not None else min(len(theirs), len(ours))
            print(
                f"{case}, event {place}: theirs {theirs[max(0, place - 3) : place + 3]}\nours {ours[max(0, place - 3) : place + 3]}",
                file=sys.stderr,
            )
    return result
