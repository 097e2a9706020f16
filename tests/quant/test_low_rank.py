"""Modulation as one matrix for all blocks and a low-rank difference each: exact at full rank, best at every other, LoRAs, files."""

from __future__ import annotations

import copy

import pytest
import torch
from rectiflow.accel.modules import NETWORK, seen_modules
from rectiflow.accel.prune.low_rank import LowRankLinear, factor_modulation, factored, low_rank_parts
from rectiflow.errors import NodeInputError
from rectiflow.families.modulation import modulation_groups
from rectiflow.tests.accel.region_toys import toy
from rectiflow.tests.quant.conftest import with_lora

WIDTH = 256  # of the tiny model: layers of 6 and 3 widths from one
MODS = ("double_blocks.0.img_mod.lin", "single_blocks.1.modulation.lin", "single_blocks.2.modulation.lin")


def low(runs, rank: int, model=None, shared: bool = True):
    return runs.node("RectiflowLowRankModulation", model=model or runs.model, rank=rank, shared=shared)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_no_factors_of_a_rank_are_nearer():
    """The error is the root of the singular values left out (Eckart and Young), falls with the rank and ends at rounding."""
    weights = [torch.randn(24, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    errors = []
    for rank in (1, 2, 4, 7, 8, 20):
        mean, pairs = factored(weights, rank)
        torch.testing.assert_close(mean, sum(weights) / 3)
        for weight, (up, down) in zip(weights, pairs, strict=True):
            assert up.shape == (24, min(rank, 8)) and down.shape == (min(rank, 8), 8)
            left = torch.linalg.svdvals(weight - mean)[rank:].square().sum().sqrt()
            torch.testing.assert_close((mean + up @ down - weight).norm(), left, atol=1e-5, rtol=1e-5)
        errors.append(float((mean + pairs[0][0] @ pairs[0][1] - weights[0]).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 and errors[0] > 1.0


@pytest.mark.parametrize("shared", [True, False])
def test_at_full_rank_the_model_draws_the_same_and_below_it_less_so(runs, shared):
    """Asked: the error falls with the rank and is 0 at full rank; the drawn latent follows it."""
    plain, found = runs.latent(runs.model), {}
    for rank in (16, 64, WIDTH):
        model, report, error = low(runs, rank, shared=shared)
        found[rank] = (error, far(runs.latent(model), plain), model.model_size())
        assert report.startswith("12 layers") and f"largest error {error:.4f}" in report
    assert found[16][0] > found[64][0] > 1e-3 and found[WIDTH][0] < 2e-6
    assert found[16][1] > found[64][1] > 1e-4 and found[WIDTH][1] < 2e-5  # two steps in fp32, sums in another order
    assert found[16][2] < found[64][2] < runs.model.model_size() < found[WIDTH][2]


def test_bytes_are_those_of_the_factors(runs):
    """Three groups: picture and text of double blocks, single blocks. A quarter of the width where nothing is asked."""
    model, layers = factor_modulation(runs.model, 0, "test")
    assert {layer.rank for layer in layers} == {WIDTH // 4}
    whole = {name: module for name, module in seen_modules(runs.model) if name in {layer.name for layer in layers}}
    for layer in layers:
        rows = whole[layer.name].out_features
        shared = rows * WIDTH if layer.name in {names[0] for names in modulation_groups(dict(seen_modules(runs.model)), "test")} else 0
        assert layer.before == 4 * rows * WIDTH and layer.after == 4 * (64 * (rows + WIDTH) + shared)
    saved = sum(layer.before - layer.after for layer in layers)
    assert model.model_size() == runs.model.model_size() - saved and saved > 0
    assert copy.deepcopy(model.object_patches)  # hosts copy options deeply; layers stay the ones they are
    assert not low_rank_parts(runs.model)


def test_loras_fit_before_and_behind_and_go_again(runs):
    whole = factor_modulation(runs.model, WIDTH, "test")[0]
    expected = runs.latent(with_lora(runs.model, runs.model, MODS, 0.05))
    before = factor_modulation(with_lora(runs.model, runs.model, MODS, 0.05), WIDTH, "test")[0]
    behind = with_lora(whole, runs.model, MODS, 0.05)
    assert far(runs.latent(whole), expected) > 1e-2
    assert far(runs.latent(behind), expected) < 1e-4  # a LoRA is kept to a thousandth of itself
    assert torch.equal(runs.latent(before), runs.latent(behind))
    apart = factor_modulation(runs.model, WIDTH, "test", shared=False)[0]
    assert far(runs.latent(with_lora(apart, runs.model, MODS, 0.05)), expected) < 1e-4
    clean = runs.latent(whole)
    behind.detach()
    assert torch.equal(runs.latent(whole), clean)


@pytest.mark.parametrize("kind", ["plain", "apart", "pruned", "LoRA", "quantised beside"])
def test_saved_loaded_and_saved_again(runs, kind):
    model = {
        "plain": lambda: low(runs, 32)[0],
        "apart": lambda: low(runs, 32, shared=False)[0],
        "pruned": lambda: low(runs, 32, runs.pruned("double_blocks.0", "single_blocks.3"))[0],
        "LoRA": lambda: with_lora(low(runs, 32)[0], runs.model, MODS),
        "quantised beside": lambda: runs.quantized(low(runs, 32)[0], weight_bits="4"),
    }[kind]()
    expected, path = runs.latent(model), runs.save(model)
    loaded = runs.load(path)
    found = runs.latent(loaded)
    assert torch.equal(found, expected) if kind != "LoRA" else far(found, expected) < 1e-5  # one product of wider factors in place of two
    assert runs.file(runs.save(loaded)).read_bytes() == runs.file(path).read_bytes()
    assert runs.file(path).stat().st_size == pytest.approx(loaded.model_size(), rel=0.02)
    text = runs.node("RectiflowCompressionInfo", path=path)[0]
    assert "factored layers of rank 32" in text and f"{0 if kind == 'apart' else 3} shared matrices" in text


def test_other_forms_of_file_hold_the_numbers(runs):
    model = low(runs, 32)[0]
    from safetensors.torch import load_file

    tensors = load_file(runs.file(runs.save(model, form="plain")))
    part = low_rank_parts(model)["double_blocks.1.txt_mod.lin"]
    assert torch.equal(tensors["model.diffusion_model.double_blocks.1.txt_mod.lin.weight"], part.numbers())
    assert not any(name.endswith((".down", ".shared")) for name in tensors)


def test_functions_on_weights_see_the_whole_matrix(runs):
    layer = low_rank_parts(low(runs, 32)[0])["single_blocks.0.modulation.lin"]
    x = runs.noise([4]).flatten()[: 2 * WIDTH].view(2, WIDTH)
    assert isinstance(layer, LowRankLinear)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.numbers(), layer.bias), atol=1e-4, rtol=1e-4)
    layer.weight_function.append(lambda weight: weight * 2.0)
    doubled = layer(x)
    layer.weight_function.clear()
    torch.testing.assert_close(doubled, torch.nn.functional.linear(x, 2.0 * layer.numbers(), layer.bias))


@pytest.mark.parametrize(("family", "groups"), [("flux", 3), ("sd3", 2), ("lumina2", 1)])
def test_families_have_their_groups(family, groups):
    model = toy(family)
    found = modulation_groups(dict(seen_modules(model)), "test")
    assert len(found) == groups and all(len(names) > 1 for names in found)
    assert factor_modulation(model, 4, "test")[1]


def test_what_does_not_fit_is_refused(runs):
    with pytest.raises(NodeInputError, match="'rank'"):
        factor_modulation(runs.model, -1, "test")
    with pytest.raises(NodeInputError, match="factored"):
        low(runs, 8, low(runs, 8)[0])
    bytes_each = runs.model.clone()  # as an 8-bit checkpoint has it
    bytes_each.add_object_patch(f"{NETWORK}{MODS[0]}", torch.nn.Linear(WIDTH, 6 * WIDTH).to(torch.float8_e4m3fn))
    with pytest.raises(NodeInputError, match=f"{MODS[0]}.*16 or 32 bits"):
        low(runs, 8, bytes_each)
    with pytest.raises(NodeInputError, match="Flux, SD3"):
        modulation_groups({"": torch.nn.Linear(1, 1), "blocks.0.ffn.0": torch.nn.Linear(1, 1)}, "test")
