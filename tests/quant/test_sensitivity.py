"""Layers that stay without rounded activations: the worst first, as few as needed; nothing stays changed on the model that was measured."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.quant.attach import quantised_parts
from rectiflow.accel.quant.sensitivity import Sensitivity, _expected, sensitivity_table
from rectiflow.errors import NodeInputError
from rectiflow.tests.quant.conftest import with_lora

COARSE = "double_blocks.0.img_mlp.0"
LAYERS = r"double_blocks\.0\.img_(mlp|attn)|single_blocks\.0\.lin"


@pytest.fixture(scope="module")
def shown(runs) -> dict:
    return {
        "positive": runs.conditioning("noto cat on white"), "negative": runs.conditioning(""), "cfg": 1.0, "seed": 4,
        "latent_image": {"samples": torch.zeros(1, 16, 8, 8)}, "sigmas": torch.linspace(1, 0, 4),
    }  # fmt: skip


@pytest.fixture(scope="module")
def mixed(runs):
    """Six layers of which one rounds its activations to 4 bits, the others to 8."""
    one = runs.quantized(include=COARSE.replace(".", r"\."), act_bits="4", protect_down=False)
    return runs.quantized(one, include=LAYERS)


def kept(runs, model, shown, target: float, reference=None):
    return runs.node("RectiflowKeepSensitiveLayers", reference=reference or runs.model, model=model, target_db=target, **shown)


def decibels(runs, model, shown, reference=None) -> float:
    return runs.node("RectiflowQuantReport", reference=reference or runs.model, model=model, **shown)[2]


def bits(model) -> dict[str, int]:
    return {name: part.act_bits for name, part in quantised_parts(model).items()}


def test_the_coarsest_layer_is_kept_and_no_other(runs, mixed, shown):
    """What Quant Report says of the result is what this node says, since both measure the same states; codes, bytes and the given model
    stay."""
    before = bits(mixed)
    given = decibels(runs, mixed, shown)
    found, report, told = kept(runs, mixed, shown, given + 1)
    assert bits(mixed) == before and bits(found) == {**before, COARSE: 16}
    assert found.model_size() == mixed.model_size() and found.patches_uuid != mixed.patches_uuid
    first, second = (quantised_parts(model)[COARSE] for model in (mixed, found))
    assert second is not first and second.weight.data_ptr() == first.weight.data_ptr()
    now = decibels(runs, found, shown)
    assert now >= given + 1 and told == pytest.approx(now, abs=1e-3)
    assert f"{given:.1f} dB as given, {now:.1f} dB now" in report and f"1 of {len(before)} layers kept" in report
    assert report.splitlines()[5].startswith(f"| {COARSE} |")  # the largest share


def test_what_is_near_enough_is_given_back_as_it_is(runs, mixed, shown):
    found, report, _ = kept(runs, mixed, shown, 5.0)
    assert bits(found) == bits(mixed) and report.count("\n") == 0


def test_a_target_above_what_the_weights_have_is_refused_and_nothing_stays_changed(runs, mixed, shown):
    before, latent = bits(mixed), runs.latent(mixed)
    with pytest.raises(NodeInputError, match=r"Keep Sensitive Layers: input 'target_db' got 90.0; allowed: up to \d\d\.\d dB"):
        kept(runs, mixed, shown, 90.0)
    assert bits(mixed) == before and torch.equal(runs.latent(mixed), latent)


def test_models_without_rounded_activations_are_refused(runs, shown):
    for model in (runs.model, runs.quantized(act_bits="16")):
        with pytest.raises(NodeInputError, match="'model' got 'no layer that rounds activations'"):
            kept(runs, model, shown, 35.0)
    with pytest.raises(NodeInputError, match="'sigmas' got '1 values'"):
        kept(runs, runs.model, {**shown, "sigmas": torch.ones(1)}, 35.0)


def test_a_lora_stays_and_the_file_comes_back(runs, mixed, shown):
    """The LoRA lies on the layers while they are measured; what is handed out has the codes without it, and its patch."""
    whole, patched = (with_lora(model, runs.model, (COARSE,), 0.01) for model in (runs.model, mixed))
    found, _, _ = kept(runs, patched, shown, decibels(runs, patched, shown, whole) + 1, whole)
    assert bits(found)[COARSE] == 16
    assert torch.equal(quantised_parts(found)[COARSE].numbers(), quantised_parts(mixed)[COARSE].numbers())
    expected = runs.latent(found)
    loaded = runs.load(runs.save(found))
    assert bits(loaded) == bits(found) and torch.equal(runs.latent(loaded), expected)


def test_as_few_as_the_sum_asks_for():
    assert [_expected([8.0, 4.0, 2.0, 1.0], left) for left in (20.0, 7.0, 3.5, 1.0, 0.5)] == [1, 1, 2, 3, 4]


def test_the_table_counts_codes():
    weight = torch.zeros(4, 8, dtype=torch.int8)
    part = type("Part", (), {"weight": weight, "act_bits": 8})
    text = sensitivity_table(Sensitivity(30.0, 36.0, 44.0, {"b": 1e-3, "a": 1e-4}, 1), {"a": part, "b": part})
    assert "1 of 2 layers kept at 16-bit activations, 50% of the codes" in text
    assert text.splitlines()[-2:] == ["| b | -30.0 | 16 bits |", "| a | -40.0 | 8 bits |"]
