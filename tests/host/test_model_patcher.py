"""ModelPatcher: what a clone shares, what a load exchanges and gives back."""

from __future__ import annotations

import gc

import pytest
import torch
from rectiflow.host.embedded.ldm import ops
from rectiflow.host.embedded.lora import LoRAAdapter, WeightAdapterBase, calculate_weight, pad_tensor_to_shape
from rectiflow.host.embedded.model_patcher import ModelPatcher, string_to_seed
from rectiflow.host.embedded.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = ops.Linear(3, 2)
        self.other = ops.Linear(3, 2)
        for parameter in self.parameters():
            parameter.data.fill_(1.0)
        self.model_sampling = "original"
        self.manual_cast_dtype = None
        self.current_patcher = None

    def get_dtype(self):
        return torch.float32


def patcher(**kwargs) -> ModelPatcher:
    return ModelPatcher(Net(), CPU, CPU, **kwargs)


def lora(out: int, rank: int, inner: int, alpha: float | None = None, mid: torch.Tensor | None = None) -> LoRAAdapter:
    return LoRAAdapter(set(), (torch.ones(out, rank), torch.ones(rank, inner), alpha, mid, None, None))


def load(model: ModelPatcher) -> ModelPatcher:
    model.partially_load(CPU, 1e32)
    return model


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


# Weight patches


def test_unknown_keys_are_not_taken():
    model = patcher()
    key = ("layer.weight", (0, 0, 1))
    assert model.add_patches({"nothing": (torch.ones(1),), key: (torch.ones(1, 3),)}) == [key]


@pytest.mark.parametrize(
    ("key", "patch", "strengths", "expected"),
    [
        ("layer.weight", (torch.full((2, 3), 2.0),), (0.5, 1.0), torch.full((2, 3), 2.0)),
        ("layer.weight", ("diff", (torch.full((2, 3), 2.0),)), (1.0, 0.5), torch.full((2, 3), 2.5)),
        ("layer.weight", ("set", (torch.full((2, 3), 7.0),)), (1.0, 1.0), torch.full((2, 3), 7.0)),
        (("layer.weight", (0, 1, 1)), (torch.full((1, 3), 4.0),), (1.0, 1.0), torch.tensor([[1.0] * 3, [5.0] * 3])),
        (("layer.weight", (1, 0, 2), lambda d: -d), (torch.full((2, 2), 4.0),), (1.0, 1.0), torch.tensor([[-3.0, -3, 1]] * 2)),
        (("layer.weight", (0, 0, 1)), ("set", (torch.zeros(1, 3),)), (1.0, 1.0), torch.tensor([[0.0] * 3, [1.0] * 3])),
        ("layer.weight", lora(2, 4, 3, alpha=2.0), (0.5, 1.0), torch.full((2, 3), 2.0)),
        ("layer.weight", lora(2, 4, 3), (1.0, 1.0), torch.full((2, 3), 5.0)),
        ("layer.weight", ("model_as_lora", (torch.full((2, 3), 4.0),)), (0.5, 1.0), torch.full((2, 3), 2.5)),
    ],
    ids=["diff", "diff-model", "set", "offset", "offset-function", "offset-set", "lora-alpha", "lora", "model-as-lora"],
)  # fmt: skip
def test_forms_of_weight_patches(key, patch, strengths, expected):
    originals = {"layer.weight": [(torch.ones(2, 3), None)]}
    offset, function = (key[1], key[2] if len(key) > 2 else None) if isinstance(key, tuple) else (None, None)
    patches = [(strengths[0], patch, strengths[1], offset, function)]
    weight = calculate_weight(patches, torch.ones(2, 3), "layer.weight", original_weights=originals)
    torch.testing.assert_close(weight, expected)


def test_a_patch_of_another_models_weights_is_its_difference():
    inner = [(torch.full((2, 3), 3.0), lambda weight, inplace: weight), (1.0, (torch.ones(2, 3),), 1.0, None, None)]
    weight = calculate_weight([(0.5, inner, 0.0, None, None)], torch.ones(2, 3), "k")
    torch.testing.assert_close(weight, torch.full((2, 3), 2.0))  # 0·1 + 0.5·(3 + 1)


def test_patches_that_do_not_fit_leave_the_weight_and_say_so(caplog):
    patches = [(1.0, patch, 1.0, None, None) for patch in ((torch.ones(5),), lora(7, 1, 7))]
    assert torch.equal(calculate_weight(patches, torch.ones(2, 3), "the.key"), torch.ones(2, 3))
    assert [record.getMessage().count("the.key") for record in caplog.records] == [1, 1]


@pytest.mark.parametrize("patch", [("unknown", (torch.ones(2, 3),)), lora(2, 1, 3, mid=torch.ones(1))])
def test_unknown_forms_are_refused(patch):
    with pytest.raises(ValueError, match="the.key"):
        calculate_weight([(1.0, patch, 1.0, None, None)], torch.ones(2, 3), "the.key")


def test_a_larger_difference_pads_the_weight_when_told_to():
    weight = calculate_weight([(1.0, ("diff", (torch.ones(3, 3), {"pad_weight": True})), 1.0, None, None)], torch.ones(2, 3), "k")
    assert weight.tolist() == [[2, 2, 2], [2, 2, 2], [1, 1, 1]]
    with pytest.raises(ValueError, match="cannot be padded"):
        pad_tensor_to_shape(torch.ones(2, 3), [1, 3])


def test_own_adapters_are_called_with_comfyuis_arguments():
    seen = []

    class Adapter(WeightAdapterBase):
        name = "own"

        def calculate_weight(self, weight, key, strength, strength_model, offset, function, intermediate_dtype=None, original_weight=None):
            seen.append((tuple(weight.shape), key, strength, strength_model, offset, intermediate_dtype))
            return weight + function(strength * torch.ones_like(weight))

    model = patcher()
    model.add_patches({"layer.weight": Adapter()}, strength_patch=2.0)
    load(model)
    assert seen == [((2, 3), "layer.weight", 2.0, 1.0, None, torch.float32)] and torch.all(model.model.layer.weight == 3)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_and_go_with_the_patcher(inplace, dtype):
    original = patcher(weight_inplace_update=inplace)
    original.model.to(dtype)
    before = original.model.layer.weight.detach().clone()
    one, two = original.clone(), original.clone()
    one.add_patches({"layer.weight": (torch.full((2, 3), 2.0),), "other.bias": ("set", (torch.zeros(2),))})
    two.add_patches({"layer.weight": (torch.full((2, 3), 4.0),)})
    load(one)
    assert torch.all(one.model.layer.weight == 3) and torch.all(one.model.other.bias == 0) and one.model.layer.weight.dtype == dtype
    load(two)
    assert torch.all(two.model.layer.weight == 5) and torch.all(two.model.other.bias == 1)
    assert load(two).partially_load(CPU, 0) == 0 and torch.all(two.model.layer.weight == 5)  # loading again patches nothing twice
    two.patch_model(CPU)
    assert torch.all(two.model.layer.weight == 5)
    load(original)
    assert torch.equal(original.model.layer.weight, before) and not original.backup
    two.detach()
    assert torch.equal(original.model.layer.weight, before)


def test_get_key_patches_gives_unpatched_weights():
    model = patcher()
    model.add_patches({"layer.weight": (torch.ones(2, 3),)})
    load(model)
    keys = model.get_key_patches("layer.")
    assert set(keys) == {"layer.weight", "layer.bias"} and len(keys["layer.weight"]) == 2
    weight, convert = keys["layer.weight"][0]
    assert torch.all(weight == 1) and convert(weight, inplace=True) is weight
    assert set(model.model_state_dict()) == {"layer.weight", "layer.bias", "other.weight", "other.bias"}


def test_layers_that_store_encoded_weights_are_read_and_written_through_their_functions():
    class Encoded(ops.Linear):
        def convert_weight(self, weight, inplace=False):
            return weight * 10

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False):
            self.seed = seed
            self.weight = torch.nn.Parameter(weight / 10, requires_grad=False)

    model = patcher()
    model.model.layer = Encoded(3, 2)
    model.model.layer.weight.data.fill_(0.5)
    model.add_patches({"layer.weight": (torch.ones(2, 3),)})
    load(model)
    torch.testing.assert_close(model.model.layer.weight.data, torch.full((2, 3), 0.6))  # (0.5·10 + 1)/10
    assert model.model.layer.seed == string_to_seed("layer.weight")
    model.detach()
    assert torch.all(model.model.layer.weight == 0.5)


def test_string_to_seed_is_crc32():
    assert string_to_seed("123456789") == 0xCBF43926


def test_weight_wrappers_act_at_each_call_and_leave_with_the_patcher():
    original = patcher()
    wrapped = original.clone()
    wrapped.add_weight_wrapper("layer.weight", lambda weight: weight * 2)
    wrapped.add_weight_wrapper("layer.weight", lambda weight: weight + 1)
    wrapped.add_weight_wrapper("layer.bias", lambda bias: bias * 0)
    x = torch.ones(1, 3)
    load(wrapped)
    assert torch.all(wrapped.model.layer(x) == 9) and torch.all(wrapped.model.other(x) == 4) and torch.all(wrapped.model.layer.weight == 1)
    load(original)
    assert torch.all(original.model.layer(x) == 4)


def test_a_weight_wrapper_on_a_plain_layer_is_refused():
    model = ModelPatcher(torch.nn.Sequential(torch.nn.Linear(2, 2)), CPU, CPU)
    model.add_weight_wrapper("0.weight", lambda weight: weight)
    with pytest.raises(TypeError, match="0.weight.*Linear"):
        load(model)


def test_compute_dtype_is_an_object_patch_and_makes_layers_cast():
    original = patcher()
    original.model.to(torch.float16)
    cast = original.clone()
    cast.set_model_compute_dtype(torch.float32)
    load(cast)
    assert cast.model.manual_cast_dtype == torch.float32 and cast.force_cast_weights and cast.clone().force_cast_weights
    assert cast.model.layer(torch.ones(1, 3)).dtype == torch.float32 and cast.model.layer.weight.dtype == torch.float16
    load(original)
    assert original.model.manual_cast_dtype is None


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
