"""Weight patches, weight wrappers and compute dtypes: what a layer computes with while a patcher is loaded, and after."""

from __future__ import annotations

import pytest
import torch
from rectiflow.host.embedded.ldm import ops
from rectiflow.host.embedded.lora import LoRAAdapter, WeightAdapterBase, calculate_weight, pad_tensor_to_shape
from rectiflow.host.embedded.model_patcher import ModelPatcher, string_to_seed
from rectiflow.tests.host.networks import CPU, load, patcher


def lora(out: int, rank: int, inner: int, alpha: float | None = None, mid: torch.Tensor | None = None) -> LoRAAdapter:
    return LoRAAdapter(set(), (torch.ones(out, rank), torch.ones(rank, inner), alpha, mid, None, None))


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
