"""Inpainting, noise, interruption, failure, parts of a schedule, dtypes: what a run keeps and what it leaves."""

from __future__ import annotations

import pytest
import torch
from rectiflow.host.embedded import model_management as mm
from rectiflow.host.embedded.latent_preview import prepare_callback
from rectiflow.host.embedded.patcher_extension import CallbacksMP, WrappersMP
from rectiflow.host.embedded.sample import fix_empty_latent_channels, prepare_noise, sample
from rectiflow.host.embedded.samplers import CFGGuider, KSampler, sampler_object
from rectiflow.tests.host.toy import EMPTY, KINDS, NOISE, SIGMAS, cond, net, run, toy_model

pytestmark = pytest.mark.usefixtures("host")


# Inpainting


def test_a_mask_of_zeros_keeps_the_latent_and_of_ones_changes_nothing():
    latent = torch.rand(2, 2, 4, 6, generator=torch.Generator().manual_seed(2))
    kept = run(toy_model(), latent=latent, mask=torch.zeros(1, 1, 4, 6))
    torch.testing.assert_close(kept, latent)
    free = run(toy_model(), latent=latent, mask=torch.ones(1, 8, 8))
    assert torch.equal(free, run(toy_model(), latent=latent))


def test_outside_the_mask_the_model_sees_the_latents_own_path():
    latent, model, mask = torch.rand(2, 2, 4, 6, generator=torch.Generator().manual_seed(2)), toy_model(), torch.zeros(1, 1, 4, 6)
    mask[..., 3:] = 1
    result = run(model, latent=latent, mask=mask, cfg=1.0)
    for call, sigma in zip(net(model).calls, SIGMAS):
        path = sigma * NOISE + (1 - sigma) * (latent - 0.5) * 2
        torch.testing.assert_close(call["x"][..., :3], path[..., :3])
    torch.testing.assert_close(result[..., :3], latent[..., :3])
    assert not torch.allclose(result[..., 3:], latent[..., 3:])


def test_denoise_mask_function():
    model, seen = toy_model(), []

    def grow(sigma, denoise_mask, extra_options):
        seen.append((sigma.tolist(), sorted(extra_options), torch.equal(extra_options["sigmas"], SIGMAS)))
        return torch.ones_like(denoise_mask)

    model.set_model_denoise_mask_function(grow)
    assert torch.equal(run(model, mask=torch.zeros(1, 4, 6)), run(toy_model()))
    assert seen == [([float(sigma)] * 2, ["model", "sigmas"], True) for sigma in SIGMAS[:-1]]


def test_ddim_noises_around_the_mask_with_seed_plus_one():
    latent, model = torch.ones(2, 2, 4, 6), toy_model()
    run(model, latent=latent, mask=torch.zeros(1, 1, 4, 6), name="ddim", cfg=1.0)
    other = torch.randn(NOISE.shape, generator=torch.manual_seed(8))
    torch.testing.assert_close(net(model).calls[0]["x"], other)


# Noise


def test_noise_is_the_global_generators():
    latent = torch.zeros(3, 4, 5, 6)
    expected = torch.randn(latent.shape, generator=torch.manual_seed(123), device="cpu")
    assert torch.equal(prepare_noise(latent, 123), expected)
    after = torch.randn(1)
    prepare_noise(latent, 123)
    assert torch.equal(torch.randn(1), after)  # the global generator stands where ComfyUI leaves it
    assert prepare_noise(latent, 0xFFFFFFFFFFFFFFFF).shape == latent.shape and prepare_noise(latent.half(), 1).dtype == torch.float16


def test_batch_index_makes_one_picture_of_a_batch_again():
    latent = torch.zeros(4, 2, 3, 3)
    four = prepare_noise(latent, 5, [0, 1, 2, 3])
    assert torch.equal(prepare_noise(latent[:2], 5, [2, 2]), four[[2, 2]])
    generator = torch.manual_seed(5)
    singles = [torch.randn(1, 2, 3, 3, generator=generator) for _ in range(4)]
    assert torch.equal(four, torch.cat(singles))


def test_an_empty_latent_takes_the_models_channels():
    model = toy_model()
    assert fix_empty_latent_channels(model, torch.zeros(1, 16, 4, 4)).shape == (1, 2, 4, 4)
    assert fix_empty_latent_channels(model, torch.zeros(1, 1, 4, 4)).shape == (1, 2, 4, 4)
    full = torch.ones(1, 16, 4, 4)
    assert fix_empty_latent_channels(model, full) is full


# Interruption, failure, progress


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("where", ["callback", "model"])
def test_stopping_at_any_step_leaves_nothing(host, step, where):
    model, cleaned = toy_model(), []
    model.add_callback(CallbacksMP.ON_CLEANUP, lambda patcher: cleaned.append(patcher.model.current_patcher))
    guider = CFGGuider(model)
    guider.set_conds(cond(0.5), cond(-0.25))
    guider.set_cfg(2.0)
    options = guider.model_options
    calls = []

    def stop(i):
        calls.append(i)
        if len(calls) - 1 == step:
            host.interrupt.set()

    report = prepare_callback(model, 3)

    def callback(i, x0, x, total):
        if where == "callback":
            stop(i)
            report(i, x0, x, total)

    if where == "model":
        model.add_wrapper(WrappersMP.APPLY_MODEL, lambda executor, *args, **kwargs: stop(0) or executor(*args, **kwargs))
    try:
        guider.sample(NOISE, EMPTY, sampler_object("euler"), SIGMAS, callback=callback if where == "callback" else None, seed=7)
        stopped = False
    except mm.InterruptProcessingException:
        stopped = True
    assert stopped or (where == "model" and step == 2)  # the last evaluation was already under way
    assert cleaned == [None] and model.model.current_patcher is None and guider.model_options is options
    assert not {"inner_model", "conds", "loaded_models"} & vars(guider).keys()
    host.interrupt.clear()
    fresh = toy_model()
    assert torch.equal(guider.sample(NOISE, EMPTY, sampler_object("euler"), SIGMAS, seed=7), run(fresh))


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_anywhere_cleans_up_and_the_next_run_is_clean(kind):
    model, cleaned, fail = toy_model(), [], [True]

    def failing(executor, *args, **kwargs):
        if fail:
            raise RuntimeError("from a node")
        return executor(*args, **kwargs)

    model.add_wrapper(kind, failing)
    model.add_callback(CallbacksMP.ON_CLEANUP, lambda patcher: cleaned.append(1))
    with pytest.raises(RuntimeError, match="from a node"):
        run(model)
    assert model.model.current_patcher is None
    assert cleaned == ([] if kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING) else [1])  # not yet begun, nothing to end
    fail.clear()
    assert torch.equal(run(model), run(toy_model()))


def test_the_callback_reports_each_step_and_keeps_the_last_prediction(host):
    updates, kept = [], {}
    host.progress_hook = lambda value, total, preview, node_id=None: updates.append((value, total, preview[0], preview[1].size))
    model, seen = toy_model(), []
    report = prepare_callback(model, 3, kept)

    def callback(step, x0, x, total):
        seen.append((step, total, x0.clone(), x.clone()))
        report(step, x0, x, total)

    result = run(model, callback=callback)
    assert [(step, total) for step, total, *_ in seen] == [(0, 3), (1, 3), (2, 3)] and torch.equal(seen[0][3], NOISE)
    assert updates == [(1, 3, "JPEG", (6, 4)), (2, 3, "JPEG", (6, 4)), (3, 3, "JPEG", (6, 4))]
    torch.testing.assert_close(model.model.process_latent_out(kept["x0"]), result)


# KSampler


def ksample(model, steps=4, denoise=1.0, name="euler", scheduler="simple", **options):
    return sample(model, NOISE, steps, 2.0, name, scheduler, cond(0.5), cond(-0.25), EMPTY, denoise=denoise, seed=7, **options)


def test_ksampler_schedules():
    model = toy_model()

    def sigmas(steps, name="euler", denoise=None):
        return KSampler(model, steps, torch.device("cpu"), sampler=name, scheduler="simple", denoise=denoise).sigmas.tolist()

    assert sigmas(4) == pytest.approx([1, 0.75, 0.5, 0.25, 0]) and sigmas(4, denoise=1.0) == sigmas(4)
    assert sigmas(2, denoise=0.5) == pytest.approx([0.5, 0.25, 0]) and sigmas(4, denoise=0.0) == []
    assert sigmas(3, denoise=0.4) == pytest.approx([0.429, 0.286, 0.143, 0], abs=1e-3)  # int(3 / 0.4) = 7 steps, the last 3
    assert sigmas(3, "dpm_2") == pytest.approx([1, 0.75, 0.5, 0])  # 4 steps without the last sigma above 0
    assert KSampler(model, 2, "cpu").sampler == "euler" and KSampler(model, 2, "cpu").scheduler == "simple"
    with pytest.raises(ValueError, match="simpel"):
        KSampler(model, 2, "cpu", scheduler="simpel")


def test_ksampler_runs_parts_of_a_schedule():
    whole = ksample(toy_model())
    model = toy_model()
    first = ksample(model, last_step=2)
    assert [float(call["options"]["sigmas"][0]) for call in net(model).calls] == [1.0, 0.75]
    model = toy_model()
    guided = sample(model, 0 * NOISE, 4, 2.0, "euler", "simple", cond(0.5), cond(-0.25), first, start_step=2, seed=7)
    assert [float(call["options"]["sigmas"][0]) for call in net(model).calls] == [0.5, 0.25]
    torch.testing.assert_close(guided, whole)  # (1 − sigma) divided out at the end of one stage, multiplied in at the next
    model = toy_model()
    ksample(model, last_step=2, force_full_denoise=True)
    assert net(model).calls[0]["options"]["sample_sigmas"].tolist() == [1.0, 0.75, 0.0]
    assert ksample(toy_model(), start_step=4) is EMPTY


def test_forcing_the_end_to_zero_leaves_the_samplers_schedule_alone():
    sampler = KSampler(toy_model(), 4, torch.device("cpu"), sampler="euler", scheduler="simple")
    sampler.sample(NOISE, cond(0), cond(0), 1.0, latent_image=EMPTY, last_step=2, force_full_denoise=True, seed=1)
    assert sampler.sigmas.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


# Dtypes

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}  # 8 and 11 significant bits, three steps of values up to 4


@pytest.mark.parametrize("manual_cast", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_matrix(dtype, manual_cast):
    model = toy_model(dtype=dtype, manual_cast=manual_cast)
    result = run(model)
    compute = manual_cast or dtype
    assert result.dtype == torch.float32 and all(call["dtype"] == compute for call in net(model).calls)
    torch.testing.assert_close(result, run(toy_model()), atol=TOLERANCE[compute], rtol=0)
