"""ModelPatcher: what a clone shares, what a load exchanges and gives back."""

from __future__ import annotations

import gc

import pytest
import torch
from rectiflow.host.embedded.model_patcher import ModelPatcher
from rectiflow.host.embedded.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from rectiflow.tests.host.networks import CPU, load, patcher

# Options and clones


def test_clone_deep_copies_options_and_shares_functions():
    class Heavy:
        pass

    def function(args):
        return args

    original = patcher()
    tensor, heavy = torch.zeros(2), Heavy()
    original.model_options["transformer_options"]["own"] = tensor
    original.model_options["sampler_post_cfg_function"] = [function, heavy]
    clone = original.clone()
    assert clone.model is original.model and clone.parent is original
    assert clone.model_options["transformer_options"]["own"] is not tensor
    assert clone.model_options["sampler_post_cfg_function"][0] is function
    assert clone.model_options["sampler_post_cfg_function"][1] is not heavy


def test_clone_lists_are_its_own_and_its_functions_shared():
    original = patcher()
    wrapper, callback, injection = (lambda executor: None), (lambda model: None), PatcherInjection(print, print)
    original.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "k", wrapper)
    original.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "k", callback)
    original.set_injections("k", [injection])
    original.add_patches({"layer.weight": (torch.ones(2, 3),)})
    original.add_object_patch("model_sampling", "patched")
    clone = original.clone()
    assert clone.get_wrappers(WrappersMP.APPLY_MODEL, "k") == [wrapper] and clone.get_callbacks(CallbacksMP.ON_PRE_RUN, "k") == [callback]
    assert clone.get_injections("k") == [injection] and clone.patches_uuid == original.patches_uuid
    assert clone.backup is original.backup and clone.object_patches_backup is original.object_patches_backup
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "k", wrapper)
    clone.add_callback(CallbacksMP.ON_PRE_RUN, callback)
    clone.set_injections("k2", [])
    clone.add_patches({"layer.weight": (torch.ones(2, 3),)})
    clone.add_object_patch("model_sampling", "again")
    assert len(original.get_all_wrappers(WrappersMP.APPLY_MODEL)) == 1 and len(original.get_all_callbacks(CallbacksMP.ON_PRE_RUN)) == 1
    assert original.get_injections("k2") is None and len(original.patches["layer.weight"]) == 1
    assert original.get_model_object("model_sampling") == "patched" and clone.patches_uuid != original.patches_uuid


def test_clone_callback_gets_old_and_new_after_the_copy():
    original, seen = patcher(), []
    original.add_callback(CallbacksMP.ON_CLONE, lambda old, new: seen.append((old, new, new.wrappers)))
    original.add_wrapper(WrappersMP.APPLY_MODEL, print)
    clone = original.clone()
    assert seen == [(original, clone, clone.wrappers)] and clone.get_all_wrappers(WrappersMP.APPLY_MODEL) == [print]


def test_attachments_decide_how_they_are_cloned_and_additional_models_are_cloned():
    class Attachment:
        def on_model_patcher_clone(self):
            return "copied"

    original, further = patcher(), patcher()
    original.set_attachments("a", Attachment())
    original.set_attachments("b", plain := object())
    original.set_additional_models("m", [further])
    clone = original.clone()
    assert clone.get_attachment("a") == "copied" and clone.get_attachment("b") is plain and clone.get_attachment("c") is None
    (copied,) = clone.get_additional_models_with_key("m")
    assert copied is not further and copied.is_clone(further)
    clone.remove_attachments("a")
    clone.remove_additional_models("m")
    assert original.get_attachment("a") is not None and original.get_additional_models() == [further]


def test_nested_additional_models_end_in_a_circle():
    a, b, c = patcher(), patcher(), patcher()
    a.set_additional_models("x", [b])
    b.set_additional_models("x", [c])
    c.set_additional_models("x", [b])
    assert a.get_nested_additional_models() == [b, c]


def test_cfg_function_with_three_arguments_is_adapted():
    model = patcher()
    model.set_model_sampler_cfg_function(lambda cond, uncond, scale: (cond, uncond, scale), disable_cfg1_optimization=True)
    assert model.model_options["sampler_cfg_function"]({"cond": 1, "uncond": 2, "cond_scale": 3}) == (1, 2, 3)
    assert model.model_options["disable_cfg1_optimization"] is True
    model.set_model_sampler_cfg_function(lambda args: args["cond"])
    assert model.model_options["sampler_cfg_function"]({"cond": 5}) == 5


def test_list_hooks_append_without_touching_the_list_of_a_clone():
    model = patcher()
    model.set_model_sampler_post_cfg_function("a")
    model.set_model_sampler_pre_cfg_function("b")
    earlier = model.model_options["sampler_post_cfg_function"]
    model.set_model_sampler_post_cfg_function("c", disable_cfg1_optimization=True)
    assert earlier == ["a"] and model.model_options["sampler_post_cfg_function"] == ["a", "c"]
    assert model.model_options["sampler_pre_cfg_function"] == ["b"] and model.model_options["disable_cfg1_optimization"]


@pytest.mark.parametrize(
    ("setter", "key"),
    [("set_model_sampler_calc_cond_batch_function", "sampler_calc_cond_batch_function"),
     ("set_model_unet_function_wrapper", "model_function_wrapper"), ("set_model_denoise_mask_function", "denoise_mask_function")],
)  # fmt: skip
def test_single_hooks(setter, key):
    model = patcher()
    getattr(model, setter)(print)
    assert model.model_options[key] is print


PATCH_SETTERS = {
    "attn1_patch": "attn1_patch", "attn2_patch": "attn2_patch", "attn1_output_patch": "attn1_output_patch",
    "attn2_output_patch": "attn2_output_patch", "input_block_patch": "input_block_patch",
    "input_block_patch_after_skip": "input_block_patch_after_skip", "output_block_patch": "output_block_patch", "emb_patch": "emb_patch",
    "forward_timestep_embed_patch": "forward_timestep_embed_patch", "double_block_patch": "double_block", "post_input_patch": "post_input",
}  # fmt: skip


@pytest.mark.parametrize(("setter", "name"), PATCH_SETTERS.items())
def test_block_patches_append(setter, name):
    model = patcher()
    for function in (print, repr):
        getattr(model, f"set_model_{setter}")(function)
    assert model.model_options["transformer_options"]["patches"] == {name: [print, repr]}


def test_replacements_are_keyed_by_block_and_the_last_wins():
    model = patcher()
    model.set_model_patch_replace("a", "dit", "double_block", 3)
    before = model.model_options["transformer_options"]
    model.set_model_patch_replace("b", "dit", "double_block", 3)
    model.set_model_attn1_replace("c", "middle", 0, 1)
    model.set_model_attn2_replace("d", "middle", 0)
    assert before["patches_replace"] == {"dit": {("double_block", 3): "a"}}
    assert model.model_options["transformer_options"]["patches_replace"] == {
        "dit": {("double_block", 3): "b"}, "attn1": {("middle", 0, 1): "c"}, "attn2": {("middle", 0): "d"},
    }  # fmt: skip


def test_wrappers_and_callbacks_by_key():
    model = patcher()
    model.add_wrapper("w", "plain")
    model.add_wrapper_with_key("w", "key", "keyed")
    model.add_callback("c", "plain")
    model.add_callback_with_key("c", "key", "keyed")
    assert model.get_all_wrappers("w") == ["plain", "keyed"] and model.get_all_callbacks("c") == ["plain", "keyed"]
    for _ in range(2):  # removing what is gone is no error
        model.remove_wrappers_with_key("w", "key")
        model.remove_callbacks_with_key("c", "key")
    assert model.get_all_wrappers("w") == ["plain"] and model.get_all_callbacks("c") == ["plain"] and model.get_all_wrappers("other") == []


def test_patches_that_own_tensors_are_moved_and_bring_their_models():
    class Patch:
        def __init__(self):
            self.moved = []

        def to(self, target):
            self.moved.append(target)
            return self

        def models(self):
            return ["model"]

    model, patches = patcher(), [Patch(), Patch(), Patch()]
    model.set_model_patch(patches[0], "post_input")
    model.set_model_patch_replace(patches[1], "dit", "double_block", 0)
    model.set_model_unet_function_wrapper(patches[2])
    model.set_model_patch(print, "post_input")
    model.model_patches_to(CPU)
    assert [patch.moved for patch in patches] == [[CPU]] * 3 and model.model_patches_models() == ["model"] * 3


def test_same_weights():
    original = patcher()
    assert original.clone_has_same_weights(original.clone()) and not original.clone_has_same_weights(patcher())
    patched = original.clone()
    patched.add_patches({"layer.weight": (torch.ones(2, 3),)})
    assert not original.clone_has_same_weights(patched) and patched.clone_has_same_weights(patched.clone())
    wrapped = original.clone()
    wrapped.add_wrapper(WrappersMP.APPLY_MODEL, print)
    assert not wrapped.clone_has_same_weights(original)


# Objects, injections, callbacks


def test_object_patches_are_exchanged_on_load_and_seen_by_every_clone():
    original = patcher()
    one, two = original.clone(), original.clone()
    one.add_object_patch("model_sampling", "one")
    two.add_object_patch("layer.weight_function", ["two"])
    assert one.get_model_object("model_sampling") == "one" and one.model.model_sampling == "original"
    load(one)
    assert one.model.model_sampling == "one" and original.get_model_object("model_sampling") == "original"
    load(two)
    assert two.model.model_sampling == "original" and two.model.layer.weight_function == ["two"]
    load(original)
    assert original.model.layer.weight_function == [] and not original.object_patches_backup


def injection(trace, name):
    return PatcherInjection(lambda model: trace.append(f"inject {name}"), lambda model: trace.append(f"eject {name}"))


def test_injections_surround_every_change_of_the_network():
    trace, model = [], patcher()
    model.set_injections("k", [injection(trace, 1), injection(trace, 2)])
    for kind in (CallbacksMP.ON_LOAD, CallbacksMP.ON_INJECT_MODEL, CallbacksMP.ON_EJECT_MODEL, CallbacksMP.ON_DETACH):
        model.add_callback(kind, lambda patcher, *args, kind=kind: trace.append(kind))
    load(model)
    assert trace == [CallbacksMP.ON_LOAD, "inject 1", "inject 2", CallbacksMP.ON_INJECT_MODEL] and model.is_injected
    trace.clear()
    model.add_patches({"layer.weight": (torch.ones(2, 3),)})
    model.model_state_dict()
    around = ["eject 1", "eject 2", CallbacksMP.ON_EJECT_MODEL, "inject 1", "inject 2", CallbacksMP.ON_INJECT_MODEL]
    assert trace == around * 2
    trace.clear()
    model.detach()
    assert trace == ["eject 1", "eject 2", CallbacksMP.ON_EJECT_MODEL, CallbacksMP.ON_DETACH] and not model.is_injected


def test_a_vanishing_clone_takes_its_injections_along():
    trace, original = [], patcher()
    clone = original.clone()
    clone.set_injections("k", [injection(trace, 1)])
    load(clone)
    del clone
    gc.collect()
    assert trace == ["inject 1", "eject 1"]


def test_load_callback_arguments_and_failure():
    model, seen = patcher(), []
    model.add_callback(CallbacksMP.ON_LOAD, lambda *args: seen.append(args))
    load(model)
    assert seen == [(model, CPU, 1e32, False, True)]
    model.add_patches({"layer.weight": ("unknown", (torch.ones(1),))})
    with pytest.raises(ValueError, match="layer.weight"):
        load(model)
    assert torch.all(model.model.layer.weight == 1) and model.loaded_size() == 0  # detached, not half patched


def test_run_callbacks_and_current_patcher():
    model, seen = patcher(), []
    model.add_callback(CallbacksMP.ON_PRE_RUN, lambda patcher: seen.append(("pre", patcher.model.current_patcher)))
    model.add_callback(CallbacksMP.ON_PREPARE_STATE, lambda patcher, timestep: seen.append(("state", timestep)))
    model.add_callback(CallbacksMP.ON_CLEANUP, lambda patcher: seen.append(("clean", patcher.model.current_patcher)))
    model.pre_run()
    model.prepare_state("t")
    model.cleanup()
    assert seen == [("pre", model), ("state", "t"), ("clean", None)]


def test_sizes():
    model = patcher()
    assert model.model_size() == 2 * (3 * 2 + 2) * 4 and model.loaded_size() == 0 and model.model_dtype() == torch.float32
    load(model)
    assert model.loaded_size() == model.model_size() and model.current_loaded_device() == CPU
    assert ModelPatcher(torch.nn.Linear(1, 1), CPU, CPU, size=5).model_size() == 5
    assert ModelPatcher(torch.nn.Linear(1, 1), CPU, CPU).model_dtype() is None


def test_hooks_are_refused_by_name():
    assert patcher().apply_hooks(hooks=None) == {}
    with pytest.raises(ValueError, match="hooks"):
        patcher().apply_hooks(hooks=object())
