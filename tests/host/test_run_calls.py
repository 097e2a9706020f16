"""A whole run on a toy flow: who is called when and with what."""

from __future__ import annotations

import pytest
import torch
from rectiflow.host.embedded.patcher_extension import CallbacksMP, WrappersMP, add_wrapper
from rectiflow.host.embedded.sample import sample_custom
from rectiflow.host.embedded.samplers import CFGGuider, Sampler, calc_cond_batch, cfg_function, sampler_object
from rectiflow.tests.host.toy import EMPTY, KINDS, NOISE, SIGMAS, cond, euler, net, run, toy_model

pytestmark = pytest.mark.usefixtures("host")


def test_a_run_is_euler_on_the_guided_velocity():
    result = run(toy_model())
    torch.testing.assert_close(result, euler(lambda x, s: s * x + (-0.25 + 2 * 0.75)))
    assert result.dtype == torch.float32


def test_samplers_work_in_model_latent_space_and_an_empty_latent_is_not_shifted():
    class Stay(Sampler):
        def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
            self.latent = latent_image
            return latent_image

    model, latent, sampler = toy_model(), torch.full((2, 2, 4, 6), 0.25), Stay()
    result = sample_custom(model, NOISE, 1.0, sampler, SIGMAS, cond(0), cond(0), latent)
    assert torch.all(sampler.latent == -0.5) and torch.equal(result, latent)
    sample_custom(model, NOISE, 1.0, sampler, SIGMAS, cond(0), cond(0), EMPTY)
    assert torch.all(sampler.latent == 0)


def test_an_empty_schedule_returns_the_latent_itself():
    model, latent = toy_model(), torch.ones(2, 2, 4, 6)
    guider = CFGGuider(model)
    assert guider.sample(NOISE, latent, sampler_object("euler"), torch.FloatTensor([])) is latent and net(model).calls == []


# Wrappers, callbacks, options


def recording(trace, name):
    def wrapper(executor, *args, **kwargs):
        trace.append((name, type(executor.class_obj).__name__, args, kwargs))
        return executor(*args, **kwargs)

    return wrapper


def test_every_kind_of_wrapper_is_called_in_order_with_comfyuis_arguments():
    model, trace = toy_model(), []
    for kind in KINDS:
        model.add_wrapper_with_key(kind, "b", recording(trace, f"{kind} 1"))
        model.add_wrapper_with_key(kind, "a", recording(trace, f"{kind} 2"))
        model.add_wrapper_with_key(kind, "b", recording(trace, f"{kind} 1b"))
        add_wrapper(kind, recording(trace, f"{kind} direct"), model.model_options, is_model_options=True)
    run(model, sigmas=torch.tensor([1.0, 0.5]))
    order = [kind for kind in KINDS for _ in range(4)]
    assert [name.split()[0] for name, *_ in trace] == order
    assert [name.split()[1] for name, *_ in trace] == ["1", "1b", "2", "direct"] * 7
    by_kind = {name.split()[0]: (owner, args, kwargs) for name, owner, args, kwargs in trace if name.endswith(" 1")}

    owner, args, kwargs = by_kind["outer_sample"]
    noise, latent, sampler, sigmas, mask, callback, disable_pbar, seed = args
    assert owner == "CFGGuider" and noise is NOISE and latent is EMPTY and sigmas.tolist() == [1.0, 0.5] and seed == 7
    assert (mask, callback, disable_pbar) == (None, None, False) and kwargs == {"latent_shapes": [EMPTY.shape]}

    owner, args, kwargs = by_kind["prepare_sampling"]
    assert owner == "NoneType" and args[0] is model and args[1] == NOISE.shape and set(args[2]) == {"positive", "negative"}
    assert set(kwargs) == {"model_options"} and len(args) == 3

    owner, args, kwargs = by_kind["sampler_sample"]
    guider, sigmas, extra_args, callback, noise, latent, mask, disable_pbar = args
    assert owner == "KSAMPLER" and isinstance(guider, CFGGuider) and extra_args["seed"] == 7 and not kwargs
    assert torch.equal(extra_args["model_options"]["transformer_options"]["sample_sigmas"], sigmas)

    owner, args, kwargs = by_kind["predict_noise"]
    x, timestep, model_options, seed = args
    assert owner == "CFGGuider" and x.shape == NOISE.shape and timestep.tolist() == [1.0, 1.0] and seed == 7 and not kwargs

    owner, args, kwargs = by_kind["calc_cond_batch"]
    base, conds, x, timestep, model_options = args
    assert owner == "NoneType" and base is model.model and len(conds) == 2 and not kwargs

    owner, args, kwargs = by_kind["apply_model"]
    x, t, concat, crossattn, control, options = args
    assert owner == "BaseModel" and x.shape[0] == t.shape[0] == crossattn.shape[0] == 4 and (concat, control) == (None, None)
    assert options["cond_or_uncond"] == [1, 0]

    owner, args, kwargs = by_kind["diffusion_model"]
    assert owner == "ToyNet" and args[0].shape[0] == 4 and args[-1] is options


def test_order_of_a_run():
    """Load, pre_run, steps, cleanup: the order in which a node may prepare and free state."""
    model, trace = toy_model(), []
    for name, kind in vars(CallbacksMP).items():
        if name.isupper():
            model.add_callback(kind, lambda *args, name=name: trace.append(name))
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE):
        model.add_wrapper(kind, recording_span(trace, kind))
    run(model, sigmas=torch.tensor([1.0, 0.5]))
    assert trace == [
        "outer_sample(", "prepare_sampling(", "ON_LOAD", ")prepare_sampling", "ON_PRE_RUN", "sampler_sample(", "predict_noise(",
        "ON_PREPARE_STATE", ")predict_noise", ")sampler_sample", "ON_CLEANUP", ")outer_sample",
    ]  # fmt: skip
    trace.clear()
    run(model, sigmas=torch.tensor([1.0, 0.5]))
    assert trace[:4] == ["outer_sample(", "prepare_sampling(", "ON_DETACH", ")prepare_sampling"]  # taken over, not loaded again


def recording_span(trace, name):
    def wrapper(executor, *args, **kwargs):
        trace.append(f"{name}(")
        try:
            return executor(*args, **kwargs)
        finally:
            trace.append(f"){name}")

    return wrapper


def test_options_of_a_model_call():
    model = toy_model()
    shared = {"list": [1]}
    model.model_options["transformer_options"]["own"] = shared
    model.set_model_patch(print, "post_input")
    model.add_wrapper(WrappersMP.APPLY_MODEL, lambda executor, *args, **kwargs: executor(*args, **kwargs))
    model.add_callback(CallbacksMP.ON_CLEANUP, lambda patcher: None)
    run(model)
    options = [call["options"] for call in net(model).calls]
    assert len(options) == 3
    for step, entry in enumerate(options):
        assert torch.equal(entry["sample_sigmas"], SIGMAS) and entry["sigmas"].tolist() == [SIGMAS[step]] * 2
        assert entry["cond_or_uncond"] == [1, 0] and len(entry["uuids"]) == 2
        assert entry["patches"] == {"post_input": [print]} and entry["own"] == {"list": [1]} and entry["own"] is not shared
        assert set(entry["wrappers"]) == {"apply_model"} and set(entry["callbacks"]) == {"on_cleanup"}
    assert options[0]["uuids"] == options[2]["uuids"] and len(set(options[0]["uuids"])) == 2
    assert options[0] is not options[1] and options[0]["own"] is not options[1]["own"]


def test_what_a_call_writes_into_its_options_is_gone_in_the_next():
    model, seen = toy_model(), []

    def scribble(executor, *args, **kwargs):
        options = args[5]
        seen.append(sorted(key for key in options if key.startswith("scribble")))
        options["scribble"] = True
        options["patches"]["post_input"].append(1)
        assert len(options["patches"]["post_input"]) == 2
        return executor(*args, **kwargs)

    model.set_model_patch(print, "post_input")
    model.add_wrapper(WrappersMP.APPLY_MODEL, scribble)
    run(model)
    run(model)
    assert seen == [[]] * 6 and model.model_options["transformer_options"] == {"patches": {"post_input": [print]}}


# Guidance


def test_the_six_cfg_hooks_in_order():
    model, trace = toy_model(), []

    def calc(args):
        trace.append(("calc", sorted(args)))
        return calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], args["model_options"])

    def pre(args):
        trace.append(("pre", sorted(args)))
        return [args["conds_out"][0] + 1, args["conds_out"][1]]

    def cfg(args):
        trace.append(("cfg", sorted(args)))
        torch.testing.assert_close(args["input"] - args["cond"], args["cond_denoised"])
        return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]

    def post(args):
        trace.append(("post", sorted(args)))
        return args["denoised"] - args["cond_scale"]  # undoes what `pre` added, times the scale

    def wrapped(apply_model, args):
        trace.append(("call", sorted(args)))
        return apply_model(args["input"], args["timestep"], **args["c"])

    plain = run(model, sigmas=torch.tensor([1.0, 0.0]))
    model.set_model_sampler_calc_cond_batch_function(calc)
    model.set_model_sampler_pre_cfg_function(pre)
    model.set_model_sampler_cfg_function(cfg)
    model.set_model_sampler_post_cfg_function(post)
    model.set_model_unet_function_wrapper(wrapped)
    torch.testing.assert_close(run(model, sigmas=torch.tensor([1.0, 0.0])), plain)
    assert [name for name, _ in trace] == ["calc", "call", "pre", "cfg", "post"]
    keys = dict(trace)
    assert keys["calc"] == ["conds", "input", "model", "model_options", "sigma"]
    assert keys["call"] == ["c", "cond_or_uncond", "input", "timestep"]
    assert keys["pre"] == ["cond_scale", "conds", "conds_out", "input", "model", "model_options", "sigma", "timestep"]
    assert {"cond", "uncond", "cond_denoised", "uncond_denoised", "cond_scale", "timestep", "sigma", "input", "model", "model_options",
            "input_cond", "input_uncond"} <= set(keys["cfg"])  # fmt: skip
    assert {"denoised", "cond", "uncond", "cond_scale", "model", "uncond_denoised", "cond_denoised", "sigma", "model_options",
            "input"} <= set(keys["post"])  # fmt: skip


def test_scale_one_asks_for_the_positive_side_only():
    model, conds = toy_model(), []
    model.set_model_sampler_pre_cfg_function(lambda args: conds.append(args["conds"]) or args["conds_out"])
    result = run(model, cfg=1.0)
    assert all(call["options"]["cond_or_uncond"] == [0] and call["x"].shape[0] == 2 for call in net(model).calls)
    assert all(entry[1] is None for entry in conds)
    torch.testing.assert_close(result, euler(lambda x, s: s * x + 0.5))
    net(model).calls.clear()
    model.model_options["disable_cfg1_optimization"] = True
    torch.testing.assert_close(run(model, cfg=1.0), result)
    assert all(call["options"]["cond_or_uncond"] == [1, 0] for call in net(model).calls)


def test_predictions_of_none_are_zero():
    model, seen = toy_model(), []
    model.set_model_sampler_pre_cfg_function(lambda args: seen.append(args["conds_out"][1]) or args["conds_out"])
    run(model, cfg=1.0)
    assert all(torch.all(prediction == 0) for prediction in seen)


def test_a_guider_of_its_own():
    class Three(CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            a, b, c = calc_cond_batch(self.inner_model, [self.conds[name] for name in ("a", "b", "c")], x, timestep, model_options)
            return cfg_function(self.inner_model, (a + b) / 2, c, 3.0, x, timestep, model_options)

    model = toy_model()
    guider = Three(model)
    guider.inner_set_conds({"a": cond(0.2), "b": cond(0.6), "c": cond(0.1)})
    result = guider.sample(NOISE, EMPTY, sampler_object("euler"), SIGMAS, seed=1)
    torch.testing.assert_close(result, euler(lambda x, s: s * x + (0.1 + 3 * (0.4 - 0.1))))
    assert net(model).calls[0]["options"]["cond_or_uncond"] == [2, 1, 0]
