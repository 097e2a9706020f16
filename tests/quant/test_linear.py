"""A quantised layer alone: what its transforms leave unchanged, what a patcher may do to it, and LoRAs on it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from rectiflow.accel.quant.calibration import watching
from rectiflow.accel.quant.error import sqnr
from rectiflow.accel.quant.linear import QuantLinear, factors, product
from rectiflow.accel.quant.recipe import QuantScheme, _smoothing, quantised_layer, quantised_layers, reason_to_keep
from rectiflow.accel.quant.rotation import convrot, hadamard, no_rotation
from rectiflow.accel.quant.stored import expected_tensors, store
from rectiflow.errors import NodeInputError
from rectiflow.tests.quant.conftest import drawn
from torch import nn


def linear(columns: int = 256, rows: int = 96, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    layer.weight.data, layer.bias.data = drawn(rows, columns, seed=seed) * 0.05, drawn(rows, seed=seed + 1)
    return layer.requires_grad_(False)


def observed(layer: nn.Linear, outlier: float = 0.0):
    """What entered the layer: 64 tokens, one channel moved by `outlier`."""
    x = drawn(64, layer.in_features, seed=9)
    x[:, 5] += outlier
    with watching({"layer": layer}) as stats:
        layer(x)
    return stats


def quantised(layer: nn.Linear, stats=None, **scheme) -> QuantLinear:
    inputs = None if stats is None else stats.layers["layer"]
    return quantised_layer(layer.weight, layer.bias, QuantScheme(**scheme), inputs, "test")


@pytest.mark.parametrize(
    ("rotation", "width"),
    [(kind, width) for kind in ("none", "hadamard", "hadamard_block", "convrot") for width in (384, 768, 1152, 3072, 385)]
    + [("dual", 384)],
)
def test_without_rounding_every_transform_leaves_the_output(rotation, width):
    """Smoothing and rotation of both sides, float32, to 1e-5: the exact weight takes the place of the codes. (Searching a dual rotation of
    3072 channels takes seconds: test_quantisers has it once.)"""
    layer = linear(width, 24)
    stats = observed(layer, 30.0)
    made = quantised(layer, stats, weight_bits=8, act_bits=16, rotation=rotation, smooth_alpha=0.5)
    smooth = made.smooth
    turned = made.rotation.apply(layer.weight if smooth is None else layer.weight / smooth)
    x = drawn(32, width, seed=4)
    out = made.rotation.apply(x if smooth is None else x * smooth) @ turned.t()
    expected = x @ layer.weight.t()
    assert (out - expected).norm() < 1e-5 * expected.norm()
    assert (made.into_basis(layer.weight) - turned).norm() == 0
    assert (made.numbers() - layer.weight).norm() < 0.02 * layer.weight.norm()


def test_convrot_is_its_own_inverse_and_blocks_must_divide():
    x = drawn(4, 512)
    assert (convrot(512).undo(convrot(512).apply(x)) - x).abs().max() < 1e-5
    with pytest.raises(ValueError, match="blocks of 256 do not divide rows of 384"):
        convrot(384)


def test_rotation_gains_six_decibels_where_channels_stick_out():
    layer = linear(512, 128)
    stats = observed(layer, 60.0)
    x = drawn(128, 512, seed=3)
    x[:, 5] += 60.0
    exact = layer(x)
    found = {r: sqnr(exact, quantised(layer, stats, weight_bits=8, rotation=r, smooth_alpha=0.0)(x)) for r in ("none", "hadamard", "auto")}
    assert found["hadamard"] >= found["none"] + 6
    assert found["auto"] >= found["hadamard"] - 0.5


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (6, 32), (4, 16), (4, 32), (3, 32), (2, 64), (4, 0), (3, 0)])
@pytest.mark.parametrize("method", ["tlq", "uniform"])
def test_bytes_are_as_told_and_codes_stay_on_their_own_numbers(bits, group, method):
    weight = drawn(48, 256) * 0.05
    stored = store(weight, bits, group, method)
    layout = "int8" if bits == 8 else "groups" if group else "rows"
    expected = expected_tensors(layout, bits, 48, 256, group)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.tensors().items()} == expected
    assert torch.equal(stored.requantised(stored.numbers()), stored.codes)


@pytest.mark.parametrize(("bits", "group", "method"), [(8, 32, "tlq"), (4, 32, "tlq"), (4, 32, "uniform"), (4, 0, "tlq"), (3, 16, "tlq")])
def test_codes_move_as_far_along_a_change_as_it_is_long(bits, group, method):
    """Every row, for changes of a fiftieth to a third of the weight's size, to what its last moved code adds."""
    weight = drawn(48, 512) * 0.05
    stored = store(weight, bits, group, method)
    base = stored.numbers()
    for size in (0.02, 0.1, 0.3):
        added = drawn(48, 3, seed=2) @ drawn(3, 512, seed=3)
        added *= size * weight.norm() / added.norm()
        moved = stored.with_codes(stored.requantised(base + added)).numbers() - base
        along = (moved * added).sum(1) / added.square().sum(1)
        step = moved.abs().amax(1) * added.abs().amax(1) / added.square().sum(1)
        assert bool(((along - 1).abs() <= step + 1e-3).all()), (size, along)
        assert abs(float((moved * added).sum() / added.square().sum()) - 1) < 0.05
    still = stored.requantised(base)
    assert torch.equal(still, stored.codes)


class TestPatcher:
    def test_a_copy_is_the_layer_and_dtypes_stay(self):
        made = quantised(linear(), weight_bits=4)
        before = made(drawn(8, 256))
        assert copy.deepcopy({"a": [made]})["a"][0] is made
        kinds = {name: tensor.dtype for name, tensor in made.state_dict().items()}
        made.to(torch.bfloat16).half()
        assert {name: tensor.dtype for name, tensor in made.state_dict().items()} == kinds
        assert torch.equal(made(drawn(8, 256)), before)

    @pytest.mark.parametrize(
        ("policy", "bits", "least"), [("requant", 8, 0.98), ("bypass", 8, 0.98), ("bypass", 4, 0.98), ("requant", 4, 0.77)]
    )
    def test_a_lora_moves_the_output_as_it_moves_the_whole_layer(self, policy, bits, least):
        """Cosine of the two differences of the output; a LoRA of a tenth of the weight's size. Beside the codes it is exact; in those of
        4 bits it has the noise of the next test."""
        layer, x = linear(256, 128), drawn(64, 256, seed=5)
        made = quantised(layer, weight_bits=bits, act_bits=16, lora=policy)
        added = drawn(128, 4, seed=6) @ drawn(4, 256, seed=7)
        added *= 0.1 * layer.weight.norm() / added.norm()
        plain, codes = made(x), made.weight.data.clone()
        patched = made.convert_weight(codes.float(), inplace=True) + added
        made.set_weight(patched, seed=11)
        moved, expected = made(x) - plain, x @ added.t()
        assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) >= least
        along = float((moved * expected).sum() / expected.square().sum())  # how much of the LoRA's own change is in it
        assert along == pytest.approx(1.0, abs=0.02)
        made.weight = nn.Parameter(codes, requires_grad=False)  # what a host does with its backup
        assert torch.equal(made(x), plain)

    @pytest.mark.parametrize("size", [0.05, 0.1])
    def test_a_small_loras_cosine_in_codes_is_its_closed_form(self, size):
        """Normal entries of σ, levels d apart. Those above t·σ move by d, and as far along as all are long: 2·d·φ(t) = σ, so that the
        cosine is (σ/d)/√(2Q(t)). No other codes of that length have fewer moves, which are the noise. By chance, as hosts round, it is
        √(√(π/2)·σ/d)."""
        weight = drawn(64, 4096) * 0.05
        stored = store(weight, 4, 4096, "uniform")
        base = stored.numbers()
        step = (stored.book[9] - stored.book[8]).float() * (stored.group_scale.float() * stored.scale).abs()  # (n, 1)
        added = drawn(64, 4096, seed=7) * size * 0.05
        moved = stored.with_codes(stored.requantised(base + added)).numbers() - base
        found = torch.nn.functional.cosine_similarity(moved, added, dim=1)
        share = size * 0.05 / step.flatten().double()
        t = (-2 * (share * math.sqrt(math.pi / 2)).log()).sqrt()
        expected = share / torch.erfc(t / math.sqrt(2)).sqrt()
        assert (found - expected).abs().max() < 0.03
        assert (found > (share * math.sqrt(math.pi / 2)).sqrt() + 0.05).all()

    def test_functions_that_short_memory_leaves_on_the_layer_are_exact(self):
        """LowVramPatch converts, adds and sets again: inside, the numbers pass through and the product is in floating point."""
        made, x = quantised(linear(256, 64), weight_bits=4, act_bits=16, lora="requant"), drawn(8, 256)
        added = drawn(64, 256, seed=8) * 0.01

        def low_memory(weight: torch.Tensor) -> torch.Tensor:
            patched = made.convert_weight(weight.float(), inplace=True) + added
            return made.set_weight(patched, seed=1, return_weight=True).to(weight.dtype)

        made.weight_function.append(low_memory)
        expected = torch.nn.functional.linear(x, made.numbers() + added, made.bias)
        assert (made(x) - expected).norm() < 1e-6 * expected.norm()


def test_factors_of_a_low_rank_are_exact_and_of_a_full_one_are_itself():
    low = drawn(96, 4) @ drawn(4, 128, seed=1)
    a, b = factors(low, 1.0)
    assert a.shape == (8, 128) and (product(a, b) - low).norm() < 1e-3 * low.norm()
    full = drawn(96, 128)
    a, b = factors(full, 1.0)
    assert len(a) == 0 and torch.equal(product(a, b), full)


def test_smoothing_in_front_of_a_rotation_leaves_the_least_noise():
    """Σ(x·m)²·Σ(‖W‖/m)² over channels is at its least, (Σ x·‖W‖)² (Cauchy and Schwarz); the published form is above it. Silent channels
    keep 1, and outputs are nearer by as much as the products differ: both noises, of tokens and of weights, follow them."""
    layer = linear(256, 64)
    layer.weight.data *= torch.rand(256, generator=torch.Generator().manual_seed(3)) * 4 + 0.05
    x = drawn(256, 256, seed=9) * (torch.rand(256, generator=torch.Generator().manual_seed(4)) * 4 + 0.05)
    x[::5, 7] *= 40  # a channel that is large in a few tokens only: its peak is no measure of its size
    with watching({"layer": layer}) as stats:
        layer(x)
    inputs, columns = stats.layers["layer"], layer.weight.norm(dim=0)
    rms = x.square().mean(0).sqrt()

    def product(m: torch.Tensor) -> float:
        return float((rms * m).square().sum() * (columns / m).square().sum())

    ours, theirs = (_smoothing(layer.weight, inputs, 0.5, rotated) for rotated in (True, False))
    least = float((rms * columns).sum() ** 2)
    assert product(ours) == pytest.approx(least, rel=1e-5)
    assert product(theirs) > 1.05 * least and product(torch.ones(256)) > 1.5 * least
    exact, turned = layer(x), hadamard(256)
    found = []
    for m in (ours, theirs):
        stored = store(turned.apply(layer.weight / m), 8, 0, "tlq")
        found.append(sqnr(exact, QuantLinear(stored, layer.bias.clone(), 8, turned, m, "bypass")(x)))
    assert found[0] > found[1]


class TestRecipe:
    def test_sensitive_layers_stay_by_default(self):
        layer = linear(256, 64)
        scheme = QuantScheme()
        kept = (
            "double_blocks.0.img_mod.lin", "blocks.0.adaLN_modulation.1", "joint_blocks.1.x_block.adaLN_modulation.1",
            "layers.0.time_embed.1",
        )  # fmt: skip
        assert all(reason_to_keep(name, layer, scheme) for name in kept)
        taken = ("double_blocks.0.img_attn.qkv", "blocks.0.self_attn.q", "double_blocks.0.img_mlp.2", "layers.0.feed_forward.w2")
        assert not any(reason_to_keep(name, layer, scheme) for name in taken)
        four = QuantScheme(act_bits=4)
        assert all("down-projection" in reason_to_keep(name, layer, four) for name in taken[2:])
        assert not reason_to_keep(taken[2], layer, QuantScheme(act_bits=4, protect_down=False))

    def test_groups_that_do_not_divide_keep_the_layer_and_say_so(self):
        layer = linear(80, 64)
        assert reason_to_keep("blocks.0.fc", layer, QuantScheme(group=32)) == "groups of 32 do not divide 80 channels"
        with pytest.raises(NodeInputError, match="all kept"):
            quantised_layers({"blocks.0.fc": layer}, lambda _: layer.weight, QuantScheme(group=32), None, "test")

    def test_a_layer_that_errs_too_much_stays(self):
        layers = {"blocks.0.a": linear(256, 64), "blocks.0.b": linear(256, 64, seed=3)}
        layers["blocks.0.b"].weight.data[:, 0] *= 1000
        scheme = QuantScheme(rotation="none", keep_below=15.0, group=128)
        made, reports = quantised_layers(layers, lambda name: layers[name].weight, scheme, None, "test")
        found = {report.name: report.kept for report in reports}
        assert set(made) == {name for name, kept in found.items() if not kept}
        assert all("dB, below 15" in kept for kept in found.values() if kept)

    def test_bad_numbers_are_refused(self):
        layer = linear()
        layer.weight.data[0, 0] = float("nan")
        with pytest.raises(NodeInputError, match="NaN or infinity"):
            quantised(layer)
        with pytest.raises(NodeInputError, match="'group_size' got 48"):
            QuantScheme(group=48).check("test")

    def test_the_threshold_is_of_the_root_mean_square(self):
        layer = linear(256, 32)
        stats = observed(layer)
        spread = stats.layers["layer"].spread
        assert spread == pytest.approx(float(drawn(64, 256, seed=9).square().mean().sqrt()), rel=1e-6)
        below = quantised(layer, stats, rotation="threshold", j_threshold=spread * 1.01, smooth_alpha=0.0)
        above = quantised(layer, stats, rotation="threshold", j_threshold=spread * 0.99, smooth_alpha=0.0)
        assert (below.rotation.kind, above.rotation.kind) == ("hadamard", "dual")


class TestCalibration:
    def test_what_entered_is_noted_and_no_hook_stays(self):
        layer = linear()
        with pytest.raises(RuntimeError, match="stop"), watching({"layer": layer}) as stats:
            layer(drawn(3, 10, 256))
            raise RuntimeError("stop")
        x = drawn(3, 10, 256).flatten(0, 1)
        inputs = stats.layers["layer"]
        assert inputs.count == 30 and torch.equal(inputs.peaks, x.abs().amax(0))
        assert torch.allclose(inputs.squares, x.double().square().sum(0))
        assert not layer._forward_pre_hooks

    def test_empty_and_broken_ones_are_refused(self):
        layer = linear()
        with watching({"layer": layer}) as stats:
            pass
        with pytest.raises(NodeInputError, match="without a single token"):
            stats.check("test")
        with watching({"layer": layer}) as stats:
            layer(torch.full((2, 256), float("nan")))
        with pytest.raises(NodeInputError, match="NaN or infinity entering layer"):
            stats.check("test")

    def test_another_models_are_refused(self):
        stats = observed(linear())
        with pytest.raises(NodeInputError, match="256 channels for layer, which has 128"):
            stats.of("layer", 128, "test")


def test_a_layer_without_rotation_says_what_it_is():
    stored = store(drawn(8, 64), 4, 32, "tlq")
    made = QuantLinear(stored, None, 8, no_rotation(), None, "requant")
    assert "64 → 8, W4A8 groups, none" in repr(made)
    assert made.bits_per_weight == pytest.approx(8 * (8 * 32 + 8 * 4 + 16 + 8 * 2) / 512)  # codes, row scales, one grid, group scales
