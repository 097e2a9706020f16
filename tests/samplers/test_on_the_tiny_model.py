"""The palettes end to end on the small trained model and the embedded host's guider, patcher and masks."""

from __future__ import annotations

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.host import prepare_noise, sample_custom, sampler_object
from rectiflow.tests.samplers.flows import rmse

ZERO = torch.zeros(1, 16, 8, 8)


@pytest.fixture(scope="module")
def tiny():
    model, clip, vae = NODES["RectiflowLoadTiny"]().execute()

    def prompt(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    return model, prompt("noto cat on white"), prompt(""), vae


def node(class_id, **inputs):
    return NODES[class_id]().execute(**inputs)


def draw(tiny, sampler, sigmas, latent=ZERO, cfg=2.5, noise=None, **options):
    model, positive, negative, _ = tiny
    noise = prepare_noise(latent, 7) if noise is None else noise
    return sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, latent, seed=7, disable_pbar=True, **options)


def test_solvers_agree_with_the_stock_ones_and_with_each_other(tiny):
    (sigmas,) = node("RectiflowUniformFlowSigmas", steps=16, start=1.0, end=0.0)
    drawn = {}
    for solver in ("euler", "midpoint", "heun", "ab2", "fireflow"):
        (sampler,) = node("RectiflowFlowODESampler", solver=solver, start_from="noise", last_step="euler")
        drawn[solver] = draw(tiny, sampler, sigmas)
    assert torch.equal(drawn["euler"], draw(tiny, sampler_object("euler"), sigmas))
    (sampler,) = node("RectiflowRFSolverSampler", derivative="midpoint", probe=0.01, start_from="noise")
    assert rmse(draw(tiny, sampler, sigmas), drawn["midpoint"]) < 1e-4
    # Latents have a spread of about 1.3; second-order solvers at 16 steps lie close together, Euler further off.
    for solver in ("heun", "ab2", "fireflow"):
        assert rmse(drawn[solver], drawn["midpoint"]) < 0.3


def test_a_mask_keeps_the_known_half(tiny):
    *_, vae = tiny
    picture, _ = node("RectiflowExamplePicture", picture="smiling cat")
    latent = vae.encode(picture)
    mask = torch.zeros(1, 1, *latent.shape[-2:])
    mask[..., latent.shape[-1] // 2 :] = 1
    (sigmas,) = node("RectiflowUniformFlowSigmas", steps=6, start=1.0, end=0.0)
    for class_id, inputs in (
        ("RectiflowRFSolverSampler", {"derivative": "fixed_probe", "probe": 0.05, "start_from": "noise"}),
        ("RectiflowFlowODESampler", {"solver": "heun", "start_from": "noise", "last_step": "exact"}),
        ("RectiflowFlowSDESampler", {"eta": 1.0, "form": "sde", "s_noise": 1.0, "sigma_lo": 0.0, "sigma_hi": 1.0, "seed_offset": 0}),
    ):
        out = draw(tiny, node(class_id, **inputs)[0], sigmas, latent, noise_mask=mask)
        assert (out - latent)[..., : latent.shape[-1] // 2].abs().max() < 1e-4, class_id
        assert (out - latent)[..., latent.shape[-1] // 2 :].abs().max() > 0.1, class_id


def test_a_real_picture_comes_back_from_its_noise_better_than_with_euler(tiny):
    model, *_, vae = tiny
    picture, _ = node("RectiflowExamplePicture", picture="smiling cat")
    latent, errors = vae.encode(picture), {}
    for solver, back, steps in (("euler", "euler", 20), ("rf_solver", "midpoint", 10), ("fireflow", "fireflow", 20)):
        (sigmas,) = node("RectiflowUniformFlowSigmas", steps=steps, start=1.0, end=0.0)
        rising, falling = node("RectiflowFlowInversionSigmas", sigmas=sigmas, sigma_floor=0.001, sigma_end=1.0)
        (invert,) = node("RectiflowFlowInvertSampler", solver=solver, iterations=3, average=False, floor_noise=False)
        inverted = draw(tiny, invert, rising, latent, cfg=1.0, noise=torch.zeros_like(latent))
        assert torch.isfinite(inverted).all()
        (noise,) = node("RectiflowNoiseFromLatent", model=model, latent={"samples": inverted}, sigma_start=1.0)
        (sampler,) = node("RectiflowFlowODESampler", solver=back, start_from="noise", last_step="euler")
        empty = {"samples": torch.zeros_like(latent)}
        errors[solver] = rmse(draw(tiny, sampler, falling, empty["samples"], cfg=1.0, noise=noise.generate_noise(empty)), latent)
    assert errors["rf_solver"] < errors["euler"] / 2 and errors["fireflow"] < errors["euler"] / 2


def test_schedules_and_shift_of_the_model(tiny):
    model, *_ = tiny
    arguments = {"steps": 8, "value": 3.0, "base_pixels": 64 * 64, "start": 1.0, "end": 0.0, "denoise": 1.0}
    _, alpha = node("RectiflowFlowShiftSigmas", model=model, scheduler="simple", shift_mode="from_model", **arguments)
    assert alpha == 1.0
    latent = {"samples": torch.zeros(1, 16, 32, 32)}  # 4 pixels a cell: 128×128 against 64×64
    _, alpha = node("RectiflowFlowShiftSigmas", model=model, scheduler="uniform", shift_mode="resolution", latent=latent, **arguments)
    assert alpha == 2.0
    patched, alpha = node("RectiflowFlowModelShift", model=model, shift_mode="sd3_alpha", value=2.0, base_pixels=65536)
    assert alpha == 2.0 and model.get_model_object("model_sampling").percent_to_sigma(0.5) == 0.5
    assert patched.get_model_object("model_sampling").percent_to_sigma(0.5) == pytest.approx(2 / 3)
    sigmas, alpha = node("RectiflowFlowShiftSigmas", model=patched, scheduler="simple", shift_mode="from_model", **arguments)
    assert alpha == pytest.approx(2.0) and float(sigmas[4]) == pytest.approx(2 / 3, abs=1e-3)
