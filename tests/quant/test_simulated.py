"""Simulated layers: the integers' numbers in floating point, gradients past the rounding, and what trains on them."""

from __future__ import annotations

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS
from rectiflow.accel.quant.attach import quantised_parts
from rectiflow.host.embedded import use_host
from rectiflow.tests.quant.test_linear import drawn, linear, observed, quantised
from torch import nn

CASES = [(*bits, rotation) for bits in ((8, 8), (4, 8), (4, 4), (3, 6), (8, 16)) for rotation in ("none", "hadamard", "convrot")]


@pytest.mark.parametrize("weight_bits, act_bits, rotation", [*CASES, (4, 4, "dual")])
def test_it_is_the_packed_layer_in_floating_point(weight_bits, act_bits, rotation):
    """Both multiply the same integers by the same scales; sums are rounded otherwise, and a token's largest value may be by its last bit,
    which moves a code now and then: 1e-4, where one code of 4 bits in every token would be 1e-2."""
    layer = linear()
    scheme = {"weight_bits": weight_bits, "act_bits": act_bits, "rotation": rotation}
    stats = observed(layer, 20.0)
    packed, simulated = (quantised(layer, stats, simulate=simulate, **scheme) for simulate in (False, True))
    x = drawn(48, layer.in_features, seed=3)
    assert (simulated(x) - packed(x)).norm() < 1e-4 * packed(x).norm()


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_the_gradient_passes_the_rounding(rotation):
    """dL/dx is that of the linear layer whose weight the integers stand for, also where the layer was not told to simulate; without a
    gradient it is the integers' product again."""
    layer = linear()
    for simulate in (True, False):
        made = quantised(layer, observed(layer, 20.0), weight_bits=8, act_bits=4, rotation=rotation, simulate=simulate)
        x, g = drawn(8, layer.in_features, seed=3).requires_grad_(), drawn(8, layer.out_features, seed=4)
        out = made(x)
        (out * g).sum().backward()
        expected = g @ made.numbers()
        assert (x.grad - expected).norm() < 1e-5 * expected.norm()
        with torch.no_grad():
            assert (made(x) - out).norm() < 1e-4 * out.norm() and torch.equal(made(x), made(x.detach()))


def test_functions_on_the_weight_see_rounded_activations():
    """A function that changes nothing changes nothing; so where it learns, in a layer that was not told to simulate. Where memory is short
    and nothing learns, activations stay as they are."""
    layer = linear()
    made = quantised(layer, observed(layer, 20.0), weight_bits=8, act_bits=4, rotation="hadamard", simulate=True)
    x = drawn(8, layer.in_features, seed=3)
    alone = made(x)
    made.weight_function.append(lambda weight: weight)
    assert (made(x) - alone).norm() < 1e-5 * alone.norm()
    assert (made(x) - layer(x)).norm() > 0.02 * alone.norm()
    made.simulate = False
    plain, learning = made(x), nn.Parameter(torch.zeros(()))
    made.weight_function = [lambda weight: weight + learning]
    assert (made(x) - alone).norm() < 1e-5 * alone.norm() and (plain - alone).norm() > 0.02 * alone.norm()


def test_a_model_that_simulates_is_the_packed_one(runs):
    """Latents to half of what the rounding moves them (a quarter measured), as a value between two codes falls by its last bits. The same
    bytes in a file, and layers whose activations are left alone go on simulating."""
    from rectiflow.accel.quant.attach import with_activations

    given = {"weight_bits": "8", "act_bits": "8", "lora": "bypass"}
    packed, simulated = (runs.quantized(mode=mode, **given) for mode in ("packed", "simulate"))
    assert [part.simulate for part in quantised_parts(simulated).values()] == [True] * len(quantised_parts(packed))
    expected, found = runs.latent(packed), runs.latent(simulated)
    assert 2.0 * (found - expected).norm() < (runs.latent(runs.model) - expected).norm() < 0.01 * expected.norm()
    files = [runs.file(runs.save(model, prefix=f"test/{name}")) for name, model in (("packed", packed), ("simulated", simulated))]
    assert files[0].read_bytes() == files[1].read_bytes()
    name = next(iter(quantised_parts(simulated)))
    with use_host(runs.host):
        assert quantised_parts(with_activations(simulated, [name], 16))[name].simulate


def test_a_lora_learns_beside_the_rounding(runs):
    """A few steps towards the whole model, whose network it shares, bring the packed one nearer to it as well. Rounded activations alone
    give a LoRA nothing to learn, so it is the weights that have few bits."""
    given = {"weight_bits": "2", "act_bits": "8", "lora": "bypass", "include": ""}
    packed = runs.quantized(**given)
    exact = runs.latent(runs.model)
    prompts = ("noto cat on white", "twemoji bus on yellow")
    clean = runs.sample(list(prompts), runs.noise([11, 12]), steps=8)
    positive = [entry for text in prompts for entry in runs.conditioning(text)]
    data = runs.node("RectiflowLatentDataset", latents={"samples": clean}, positive=positive)[0]
    target = runs.node(
        "RectiflowTrainTarget", kind="teacher_velocity", teacher=runs.model, teacher_cfg=1.0, anneal_steps=1, annealing="linear"
    )[0]
    runs.latent(packed)  # its codes lie on the network: what learns has the whole weights' shapes all the same
    with use_host(runs.host), torch.inference_mode():
        from rectiflow.host import load_lora_for_models

        _, lora, *_ = NODE_CLASS_MAPPINGS["RectiflowTrain"]().execute(
            model=packed, data=data, target=target, steps=16, batch=2, name="beside the rounding", dtype="fp32", checkpointing=False,
            ema=0.0, save_every=0, validate_every=0,
        )  # fmt: skip
        learnt = load_lora_for_models(packed, None, lora, 1.0, 0.0)[0]
    errors = [runs.velocity_error(model) for model in (packed, learnt)]
    assert errors[1] < 0.9 * errors[0], errors
    assert torch.equal(runs.latent(runs.model), exact)
