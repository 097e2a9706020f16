"""The sampling and loading nodes on the tiny model: every way to ask for a run gives the same run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import rectiflow
import torch
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded import HostSettings, make_host, use_host
from rectiflow.host.embedded.core_nodes.custom_sampling import Noise_RandomNoise
from rectiflow.host.embedded.sampler_names import SAMPLER_NAMES
from safetensors.torch import save_file

WEIGHTS = Path(rectiflow.__path__[0]) / "tiny" / "tiny-emoji-flux.safetensors"
# Two runs of the same numbers, one of them through a division by 1 − sigma and a multiplication with it.
HANDED_ON = 1e-4


@pytest.fixture(scope="module")
def tiny_host(tmp_path_factory):
    """A host whose checkpoint folder holds the tiny model."""
    folder = tmp_path_factory.mktemp("host")
    for kind in ("checkpoints", "diffusion_models", "vae", "text_encoders", "loras"):
        (folder / "models" / kind).mkdir(parents=True)
        shutil.copy(WEIGHTS, folder / "models" / kind / "tiny.safetensors")
    host = make_host(folder, settings=HostSettings(device="cpu", dtype="fp32"))
    with use_host(host):
        yield host


@pytest.fixture(autouse=True)
def _current(tiny_host):
    with use_host(tiny_host), torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def run(tiny_host):
    def call(class_id, **inputs):
        with use_host(tiny_host), torch.inference_mode():
            cls = tiny_host.registry[class_id]
            return getattr(cls(), cls.FUNCTION)(**inputs)

    return call


@pytest.fixture(scope="module")
def parts(run):
    """model, positive and negative conditioning, an empty latent, the codec."""
    model, clip, vae = run("CheckpointLoaderSimple", ckpt_name="tiny.safetensors")
    positive, negative = (run("CLIPTextEncode", clip=clip, text=text)[0] for text in ("noto cat on blue", ""))
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    return {"model": model, "positive": positive, "negative": negative, "latent": empty, "vae": vae}


def classic(parts, **changed):
    """Inputs of KSampler."""
    kept = {name: parts[name] for name in ("model", "positive", "negative")}
    defaults = {"seed": 5, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "latent_image": parts["latent"]}
    return {**kept, **defaults, **changed}


@pytest.fixture(scope="module")
def picture(run, parts):
    """A finished latent, as the start of image to image."""
    return run("KSampler", **classic(parts))[0]


def schedule(run, parts, steps=4, denoise=1.0, scheduler="simple"):
    return run("BasicScheduler", model=parts["model"], scheduler=scheduler, steps=steps, denoise=denoise)[0]


def test_an_empty_latent_takes_the_models_channels(parts, picture):
    assert picture["samples"].shape == (1, 16, 8, 8)
    assert picture["samples"].isfinite().all()


def test_three_ways_to_ask_for_one_run(run, parts, picture):
    sampler, sigmas = run("KSamplerSelect", sampler_name="euler")[0], schedule(run, parts)
    shared = {"sampler": sampler, "sigmas": sigmas, "latent_image": parts["latent"]}
    ends = {name: parts[name] for name in ("model", "positive", "negative")}
    custom, _ = run("SamplerCustom", **ends, add_noise=True, noise_seed=5, cfg=2.0, **shared)
    noise, guider = run("RandomNoise", noise_seed=5)[0], run("CFGGuider", **ends, cfg=2.0)[0]
    advanced, denoised = run("SamplerCustomAdvanced", noise=noise, guider=guider, **shared)
    assert torch.equal(custom["samples"], picture["samples"])
    assert torch.equal(advanced["samples"], picture["samples"])
    # Euler's last step, to sigma 0, lands on what it denoised to
    assert torch.allclose(denoised["samples"], picture["samples"], atol=1e-5)


def test_a_schedule_shared_by_two_nodes_is_one_run(run, parts, picture):
    stage = {**classic(parts), "noise_seed": 5}
    del stage["seed"]
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 2, "return_with_leftover_noise": "enable"}
    second = {"add_noise": "disable", "start_at_step": 2, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    (halfway,) = run("KSamplerAdvanced", **{**stage, **first})
    (whole,) = run("KSamplerAdvanced", **{**stage, **second, "latent_image": halfway})
    assert (whole["samples"] - picture["samples"]).abs().max() < HANDED_ON
    (cut,) = run("KSamplerAdvanced", **{**stage, **first, "return_with_leftover_noise": "disable"})
    assert not torch.allclose(cut["samples"], halfway["samples"])


def test_a_split_schedule_is_one_run_too(run, parts, picture):
    high, low = run("SplitSigmas", sigmas=schedule(run, parts), step=2)
    sampler = run("KSamplerSelect", sampler_name="euler")[0]
    guider = run("CFGGuider", model=parts["model"], positive=parts["positive"], negative=parts["negative"], cfg=2.0)[0]
    first = {"noise": run("RandomNoise", noise_seed=5)[0], "guider": guider, "sampler": sampler, "sigmas": high}
    halfway, _ = run("SamplerCustomAdvanced", **first, latent_image=parts["latent"])
    rest = {**first, "noise": run("DisableNoise")[0], "sigmas": low}
    whole, _ = run("SamplerCustomAdvanced", **rest, latent_image=halfway)
    assert (whole["samples"] - picture["samples"]).abs().max() < HANDED_ON


def test_no_steps_change_nothing(run, parts, picture):
    (kept,) = run("KSampler", **classic(parts, latent_image=picture, denoise=0.0))
    assert torch.equal(kept["samples"], picture["samples"])
    none = schedule(run, parts, denoise=0.0)
    assert len(none) == 0
    guider = run("BasicGuider", model=parts["model"], conditioning=parts["positive"])[0]
    sampler = run("KSamplerSelect", sampler_name="euler")[0]
    given = {"noise": run("RandomNoise", noise_seed=5)[0], "guider": guider, "sampler": sampler, "sigmas": none}
    output, denoised = run("SamplerCustomAdvanced", **given, latent_image=picture)
    assert torch.equal(output["samples"], picture["samples"])
    assert torch.equal(denoised["samples"], picture["samples"])


def test_unknown_keys_of_a_latent_are_kept_and_the_input_is_not_changed(run, parts):
    given = {"samples": torch.zeros(1, 4, 8, 8), "note": "kept"}
    (result,) = run("KSampler", **classic(parts, steps=1, latent_image=given))
    assert result["note"] == "kept"
    assert not given["samples"].any() and given.keys() == {"samples", "note"}


def test_a_noise_mask_protects_the_rest(run, parts, picture):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1.0
    (masked,) = run("SetLatentNoiseMask", samples=picture, mask=mask)
    (result,) = run("KSampler", **classic(parts, latent_image=masked, seed=9))
    changed = (result["samples"] - picture["samples"]).abs().amax((0, 1, 2))
    assert changed[:4].max() < 1e-6
    assert changed[4:].min() > 1e-3


def test_batches_and_their_index_decide_the_noise(run, parts, picture):
    two = {"samples": torch.zeros(2, 4, 8, 8), "batch_index": [3, 0]}
    (batch,) = run("KSampler", **classic(parts, latent_image=two))
    (first,) = run("LatentFromBatch", samples=batch, batch_index=1, length=1)
    # a batch of two and a batch of one sum in another order
    assert (first["samples"] - picture["samples"]).abs().max() < HANDED_ON


def test_one_condition_alone_is_guidance_of_one(run, parts):
    shared = {"noise": Noise_RandomNoise(5), "sampler": run("KSamplerSelect", sampler_name="euler")[0], "sigmas": schedule(run, parts)}
    alone = run("BasicGuider", model=parts["model"], conditioning=parts["positive"])[0]
    one = run("CFGGuider", model=parts["model"], positive=parts["positive"], negative=parts["negative"], cfg=1.0)[0]
    results = [run("SamplerCustomAdvanced", guider=guider, **shared, latent_image=parts["latent"])[0]["samples"] for guider in (alone, one)]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "style, cfg_conds, cfg_cond2_negative, second, scale",
    [
        ("regular", 0.0, 2.0, "positive", 2.0),  # negative + 2·(mid − negative), the first condition has no weight
        ("regular", 1.0, 2.0, "positive", 2.0),  # both conditions the same: their difference vanishes
        ("nested", 3.0, 1.0, "negative", 3.0),  # mid + 3·(positive − mid), the outer scale of 1 keeps it
        ("nested", 1.0, 2.0, "negative", 2.0),
        ("regular", 2.0, 1.0, "negative", 2.0),
    ],
)
def test_two_scales_reduce_to_one(run, parts, style, cfg_conds, cfg_cond2_negative, second, scale):
    ends = {name: parts[name] for name in ("model", "negative")}
    dual = {"cond1": parts["positive"], "cond2": parts[second], "cfg_conds": cfg_conds, "cfg_cond2_negative": cfg_cond2_negative}
    guiders = (
        run("DualCFGGuider", **ends, **dual, style=style)[0],
        run("CFGGuider", **ends, positive=parts["positive"], cfg=scale)[0],
    )
    shared = {"noise": Noise_RandomNoise(5), "sampler": run("KSamplerSelect", sampler_name="euler")[0], "sigmas": schedule(run, parts)}
    results = [run("SamplerCustomAdvanced", guider=guider, **shared, latent_image=parts["latent"])[0]["samples"] for guider in guiders]
    assert (results[0] - results[1]).abs().max() < HANDED_ON


# Schedules of a model


def flux_shift(mu):
    return lambda u: math.exp(mu) / (math.exp(mu) + 1 / u - 1)


def size(pixels):
    return {"max_shift": 1.15, "base_shift": 0.5, "width": pixels, "height": pixels}


@pytest.mark.parametrize(
    "node, inputs, expected",
    [
        # u = 1, 3/4, 1/2, 1/4; 1024×1024 pixels are 4096 tokens, where mu is max_shift, 256×256 are 256, where it is base_shift
        ("ModelSamplingFlux", size(1024), flux_shift(1.15)),
        ("ModelSamplingFlux", size(256), flux_shift(0.5)),
        ("ModelSamplingSD3", {"shift": 3.0}, lambda u: 3 * u / (1 + 2 * u)),
        ("ModelSamplingAuraFlow", {"shift": 1.73}, lambda u: 1.73 * u / (1 + 0.73 * u)),
    ],
)
def test_shifted_schedules(run, parts, node, inputs, expected):
    (shifted,) = run(node, model=parts["model"], **inputs)
    sigmas = schedule(run, {"model": shifted}).tolist()
    assert sigmas == pytest.approx([*(expected(u) for u in (1, 0.75, 0.5, 0.25)), 0.0], abs=1e-6)
    assert schedule(run, parts).tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-6)  # the first model is as it was
    model_sampling = shifted.get_model_object("model_sampling")
    assert model_sampling.timestep(torch.tensor(0.5)).item() == (500.0 if node == "ModelSamplingSD3" else 0.5)
    assert run("SamplingPercentToSigma", model=shifted, sampling_percent=0.5, return_actual_sigma=False)[0] == pytest.approx(expected(0.5))


@pytest.mark.parametrize("node", ["ModelSamplingSD3", "ModelSamplingAuraFlow"])
@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_a_shift_that_leaves_no_noise_is_refused(run, parts, node, shift):
    with pytest.raises(NodeInputError, match=f"{node}: input 'shift'"):
        run(node, model=parts["model"], shift=shift)


def test_denoise_takes_the_end_of_a_longer_schedule(run, parts):
    assert torch.equal(schedule(run, parts, 4, 0.5), schedule(run, parts, 8)[4:])


def test_actual_sigmas_at_both_ends(run, parts):
    for percent, actual, expected in ((0.0, False, 1.0), (1.0, False, 0.0), (0.0, True, 1.0), (1.0, True, 1e-4)):
        (sigma,) = run("SamplingPercentToSigma", model=parts["model"], sampling_percent=percent, return_actual_sigma=actual)
        assert sigma == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_beta_schedule_needs_positive_parameters(run, parts, name):
    values = {"alpha": 0.6, "beta": 0.6}
    (sigmas,) = run("BetaSamplingScheduler", model=parts["model"], steps=6, **values)
    assert sigmas[0] == pytest.approx(1.0, abs=1e-3) and sigmas[-1] == 0.0 and (sigmas.diff() < 0).all()
    with pytest.raises(NodeInputError, match=f"BetaSamplingScheduler: input '{name}'"):
        run("BetaSamplingScheduler", model=parts["model"], steps=6, **{**values, name: 0.0})


def test_added_noise_is_the_flows_own_mix(run, parts, picture):
    noise = Noise_RandomNoise(3)
    drawn = noise.generate_noise(picture)
    (noisy,) = run("AddNoise", model=parts["model"], noise=noise, sigmas=torch.tensor([0.6]), latent_image=picture)
    assert torch.allclose(noisy["samples"], 0.6 * drawn + 0.4 * picture["samples"], atol=1e-6)
    (between,) = run("AddNoise", model=parts["model"], noise=noise, sigmas=torch.tensor([0.9, 0.5, 0.2]), latent_image=picture)
    assert torch.allclose(between["samples"], 0.7 * drawn + 0.3 * picture["samples"], atol=1e-6)
    assert run("AddNoise", model=parts["model"], noise=noise, sigmas=torch.zeros(0), latent_image=picture) == (picture,)


def test_every_listed_sampler_is_made_or_refused_by_name(run):
    made = 0
    for name in SAMPLER_NAMES:
        try:
            (sampler,) = run("KSamplerSelect", sampler_name=name)
        except NodeInputError as error:
            assert name in str(error)
        else:
            made += callable(sampler.sample)
    assert made > len(SAMPLER_NAMES) // 2
    assert run("SamplerEulerAncestral", eta=0.5, s_noise=0.9)[0].extra_options == {"eta": 0.5, "s_noise": 0.9}


# Loaders


def test_the_parts_of_a_file_load_alone(run, parts, picture):
    (model,) = run("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")
    (clip,) = run("CLIPLoader", clip_name="tiny.safetensors", type="stable_diffusion", device="cpu")
    (vae,) = run("VAELoader", vae_name="tiny.safetensors")
    positive, negative = (run("CLIPTextEncode", clip=clip, text=text)[0] for text in ("noto cat on blue", ""))
    (again,) = run("KSampler", **classic({**parts, "model": model, "positive": positive, "negative": negative}))
    assert torch.equal(again["samples"], picture["samples"])
    whole, alone = (run("VAEDecode", samples=picture, vae=codec)[0] for codec in (parts["vae"], vae))
    assert torch.equal(whole, alone)
    assert whole.shape[0] == 1 and whole.shape[-1] == 3 and whole.shape[1] == whole.shape[2]
    tiled = run("VAEDecodeTiled", samples=picture, vae=vae, tile_size=64, overlap=16)[0]
    assert tiled.shape == whole.shape


@pytest.mark.parametrize(
    "node, inputs, kind",
    [
        ("CheckpointLoaderSimple", {"ckpt_name": "no.safetensors"}, "checkpoints"),
        ("UNETLoader", {"unet_name": "no.safetensors", "weight_dtype": "default"}, "diffusion_models"),
        ("CLIPLoader", {"clip_name": "no.safetensors", "type": "sd3"}, "text_encoders"),
        ("DualCLIPLoader", {"clip_name1": "tiny.safetensors", "clip_name2": "no.safetensors", "type": "flux"}, "text_encoders"),
        ("VAELoader", {"vae_name": "no.safetensors"}, "vae"),
        ("LoraLoaderModelOnly", {"model": None, "lora_name": "no.safetensors", "strength_model": 1.0}, "loras"),
        ("CheckpointLoaderSimple", {"ckpt_name": "../checkpoints/tiny.safetensors"}, "checkpoints"),
    ],
)
def test_missing_files_are_named(run, node, inputs, kind):
    with pytest.raises(FileNotFoundError, match=rf"^Model in folder '{kind}' with filename '.*' not found\.$"):
        run(node, **inputs)


def test_half_a_tiny_autoencoder_is_refused(run):
    with pytest.raises(NodeInputError, match="Load VAE: input 'vae_name' got 'taef1'.*taef1_encoder"):
        run("VAELoader", vae_name="taef1")


def test_a_lora_changes_the_weights_it_names(run, parts, tiny_host, picture):
    key = "diffusion_model.double_blocks.0.img_attn.proj"
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(256, 2, generator=generator), torch.randn(2, 256, generator=generator)
    folder = Path(tiny_host.paths.get_folder_paths("loras")[0])
    save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(1.0)}, folder / "a.safetensors")
    (patched,) = run("LoraLoaderModelOnly", model=parts["model"], lora_name="a.safetensors", strength_model=0.5)
    assert set(patched.patches) == {f"{key}.weight"} and not parts["model"].patches
    (changed,) = run("KSampler", **classic({**parts, "model": patched}))
    assert not torch.allclose(changed["samples"], picture["samples"], atol=1e-3)
    (again,) = run("KSampler", **classic(parts))
    assert torch.equal(again["samples"], picture["samples"])
    assert run("LoraLoader", model=1, clip=2, lora_name="a.safetensors", strength_model=0.0, strength_clip=0.0) == (1, 2)


def test_compute_dtype_is_set_on_a_clone(run, parts):
    (patched,) = run("ModelComputeDtype", model=parts["model"], dtype="bf16")
    assert patched is not parts["model"]
    (result,) = run("KSampler", **classic({**parts, "model": patched}, steps=1))
    assert result["samples"].isfinite().all()
