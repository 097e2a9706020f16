"""Directions beside the codes: what lies along them is exact, what is left errs by its own length, and all ways through the layer agree."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.quant.attach import quantised_parts
from rectiflow.accel.quant.calibration import watching
from rectiflow.accel.quant.directions import principal_directions
from rectiflow.accel.quant.error import sqnr
from rectiflow.accel.quant.recipe import QuantScheme, quantised_layer
from rectiflow.accel.quant.rotation import convrot, no_rotation
from rectiflow.errors import NodeInputError
from rectiflow.tests.quant.conftest import with_lora
from rectiflow.tests.quant.test_linear import drawn, linear
from torch import nn

LAYER = r"single_blocks\.0\.linear1"
BITS = ((8, 8), (4, 8), (4, 4), (3, 16))
CASES = [*((*bits, rotation) for bits in BITS for rotation in ("none", "hadamard", "convrot")), (4, 4, "dual")]


def along_few(tokens: int, columns: int = 256, count: int = 8, rest: float = 0.1, seed: int = 9) -> torch.Tensor:
    """Tokens along `count` directions, and noise of `rest` of their size."""
    few = torch.linalg.qr(drawn(columns, count, seed=77)).Q.T
    return drawn(tokens, count, seed=seed) @ few * (columns / count) ** 0.5 + rest * drawn(tokens, columns, seed=seed + 1)


def made_by(layer: nn.Linear, rows: torch.Tensor, **scheme):
    with watching({"layer": layer}, 1024) as stats:
        layer(rows)
    bias = None if layer.bias is None else layer.bias.data.clone()
    return quantised_layer(layer.weight.data, bias, QuantScheme(**scheme), stats.layers["layer"])


def test_principal_directions_are_those_of_the_rows_and_orthonormal_in_the_codes_basis():
    smooth = drawn(256, seed=5).abs() + 0.2
    for rotation, m, tokens in ((no_rotation(), None, 300), (convrot(256), smooth, 300), (convrot(256), smooth, 100)):
        rows = along_few(tokens, rest=0.05)
        turned = rotation.apply(rows if m is None else rows * m)
        down = principal_directions(turned, 8, rotation, m).float()
        across = rotation.apply(down if m is None else down * m)
        assert (across @ across.T - torch.eye(8)).abs().max() < 1e-2  # bfloat16
        exact = torch.linalg.svd(turned, full_matrices=False).Vh[:8]
        assert (across @ exact.T).norm() == pytest.approx(8**0.5, rel=1e-2)  # one subspace
    assert principal_directions(torch.zeros(4, 256), 8, no_rotation(), None) is None


@pytest.mark.parametrize("weight_bits, act_bits, rotation", CASES)
def test_what_lies_along_them_is_not_rounded(weight_bits, act_bits, rotation):
    """Inputs along the directions alone: the product to what bfloat16 leaves of B, with weights and activations of few bits. 16 bits of
    activations leave nothing but the residual's own rounding."""
    layer = linear(256, 64)
    made = made_by(layer, along_few(600), weight_bits=weight_bits, act_bits=act_bits, rotation=rotation, directions=16, protect_down=False)
    x = along_few(48, rest=0.0, seed=3)
    error = {16: 45.0, 8: 40.0, 4: 30.0}[act_bits]
    bare = made_by(layer, along_few(600), weight_bits=weight_bits, act_bits=act_bits, rotation=rotation, protect_down=False)
    assert sqnr(layer(x), made(x)) > max(error, sqnr(layer(x), bare(x)) + (0.0 if weight_bits == act_bits == 8 else 6.0))


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize(("weight_bits", "act_bits"), BITS)
def test_errors_are_those_of_what_is_left(weight_bits, act_bits, rounding):
    """A tenth of the inputs' size is left: 20 dB where the largest of a token falls as its length does; 12 are asked on other tokens. Codes
    that make up for each other's errors along these directions already gain less: 4 are asked, 7 measured."""
    layer, x = linear(256, 64), along_few(64, seed=30)
    found = [
        sqnr(layer(x), made_by(
            layer, along_few(600), weight_bits=weight_bits, act_bits=act_bits, rotation="hadamard", rounding=rounding, directions=count
        )(x)) for count in (0, 8)
    ]  # fmt: skip
    assert found[1] > found[0] + (4.0 if rounding == "compensated" and weight_bits < 8 else 12.0), found


def test_none_is_bit_identical():
    layer, x = linear(256, 64), along_few(32, seed=30)
    plain, none = (made_by(layer, along_few(600), weight_bits=4, act_bits=8, **more) for more in ({}, {"directions": 0}))
    assert none.directions is None and torch.equal(plain(x), none(x)) and plain.nbytes == none.nbytes


@pytest.mark.parametrize("weight_bits, act_bits, rotation", CASES)
def test_simulated_and_packed_agree_and_gradients_pass(weight_bits, act_bits, rotation):
    """As in test_simulated, with the weight that the layer says it stands for as the gradient; groups' scales are rounded to 8 bits for the
    integer product, 42 dB below."""
    layer = linear(256, 64)
    scheme = {"weight_bits": weight_bits, "act_bits": act_bits, "rotation": rotation, "directions": 8}
    packed, simulated = (made_by(layer, along_few(600), simulate=simulate, **scheme) for simulate in (False, True))
    x = along_few(48, seed=30)
    assert (simulated(x) - packed(x)).norm() < 1e-4 * packed(x).norm()
    with torch.inference_mode():  # as nodes run; what is kept of it must serve the gradient
        packed(x)
    x, g = x.requires_grad_(), drawn(48, 64, seed=4)
    (packed(x) * g).sum().backward()
    expected = g @ packed.numbers()
    assert (x.grad - expected).norm() < (1e-2 if packed.layout == "groups" else 1e-4) * expected.norm()


@pytest.mark.parametrize("policy", ["bypass", "requant"])
def test_a_lora_moves_them_too_and_goes_without_a_trace(policy):
    """Set, asked, put back by the host: the output moves by the LoRA's product and is the old one, bit for bit, afterwards. Beside codes
    it is exact; in codes of 8 bits a LoRA of a tenth has a noise of a tenth (measured .09), also where they are written in place."""
    layer, x = linear(256, 128), along_few(64, seed=5)
    made = made_by(layer, along_few(600), weight_bits=8, act_bits=8, rotation="hadamard", lora=policy, directions=8)
    added = drawn(128, 4, seed=6) @ drawn(4, 256, seed=7)
    added *= 0.1 * layer.weight.norm() / added.norm()
    plain, codes = made(x), made.weight.data.clone()
    made.set_weight(made.convert_weight(codes.float()) + added, seed=11)
    assert (made(x) - plain - x @ added.T).norm() < (1e-3 if policy == "bypass" else 0.12) * (x @ added.T).norm()
    made.weight = nn.Parameter(codes, requires_grad=False)
    assert torch.equal(made(x), plain)
    kept = made.weight
    made.set_weight(made.convert_weight(codes.float()) + added, inplace_update=True)
    assert made.weight is kept and (made(x) - plain - x @ added.T).norm() < 0.12 * (x @ added.T).norm()


def test_functions_on_the_weight_see_what_a_run_sees():
    layer, x = linear(256, 64), along_few(32, seed=30)
    made = made_by(layer, along_few(600), weight_bits=8, act_bits=4, rotation="hadamard", simulate=True, directions=8)
    alone = made(x)
    made.to(torch.bfloat16)  # as a host moves models: nothing of the codes changes
    assert torch.equal(made(x), alone)
    half = made(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - alone).norm() < 0.02 * alone.norm()
    made.weight_function.append(lambda weight: weight)
    assert (made(x) - alone).norm() < 1e-4 * alone.norm()
    assert (made(x.bfloat16()) - half).norm() < 0.02 * alone.norm()


def test_the_model_is_nearer_saved_and_loaded_with_them(runs):
    """One layer at W8A4: in the velocity, to 0 ulp through a file, with a LoRA behind, and by the bytes that are told."""
    stats = runs.node(
        "RectiflowQuantCalibrate", model=runs.model, positive=runs.conditioning("noto cat on white"), sigmas=torch.linspace(1, 0, 5),
        latent_image={"samples": torch.zeros(1, 16, 16, 16)}, seed=0, num_runs=1, layers=LAYER,
    )[0]  # fmt: skip
    given = {"stats": stats, "include": LAYER, "act_bits": "4", "protect_down": False}
    bare, beside = (runs.quantized(directions=count, **given) for count in (0, 16))
    assert runs.velocity_error(beside) < 0.87 * runs.velocity_error(bare)  # .81 measured
    layer, plain = (next(iter(quantised_parts(model).values())) for model in (beside, bare))
    assert layer.nbytes - plain.nbytes == 2 * 16 * (layer.in_features + layer.out_features) == beside.model_size() - bare.model_size()
    for model in (beside, with_lora(beside, runs.model, ("single_blocks.0.linear1",))):
        path = runs.save(model)
        assert torch.equal(runs.latent(runs.load(path)), runs.latent(model))
        assert "16 directions beside" in runs.node("RectiflowCompressionInfo", path=path)[0]
    with pytest.raises(NodeInputError, match="directions 0"):
        runs.save(beside, form="core_int8")


def test_more_than_a_layer_can_have_is_refused(runs):
    with pytest.raises(NodeInputError, match="directions"):
        QuantScheme(directions=300).check("test")
