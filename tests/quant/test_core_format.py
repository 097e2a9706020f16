"""W8A8 in the core's int8_tensorwise: what newer cores ask of a file, by their parser's rules; ComfyUI 0.3.64 does not know the format.

The rules, as newer cores read a layer with a `comfy_quant` tensor: its bytes are JSON with "format"; for int8_tensorwise `weight` is int8
(n, k) and `weight_scale` float32, one number or one a row; with "convrot" the input is turned in blocks of "convrot_groupsize" by a
Kronecker power of the regular 4 × 4 Hadamard matrix before it is quantised a token at its own range.
"""

from __future__ import annotations

import json

import pytest
import torch
from rectiflow.accel.quant.attach import quantised_parts
from rectiflow.accel.quant.error import sqnr
from rectiflow.errors import NodeInputError
from safetensors.torch import load_file, save_file

PREFIX = "model.diffusion_model."
KNOWN = {"float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8", "awq_w4a16"}


def core_layer(tensors: dict, name: str):
    """(codes, scale (n, 1), size of the turned blocks) of a layer, by the rules above; an AssertionError where they are broken."""
    marker = tensors[f"{name}.comfy_quant"]
    assert marker.dtype == torch.uint8 and marker.ndim == 1
    found = json.loads(marker.numpy().tobytes())
    assert found["format"] in KNOWN and found["format"] == "int8_tensorwise"
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    assert weight.dtype == torch.int8 and weight.ndim == 2
    assert scale.dtype == torch.float32 and scale.numel() in (1, len(weight))
    turned = found.get("convrot", False)
    assert isinstance(turned, bool)
    size = found["convrot_groupsize"] if turned else 1
    assert weight.shape[1] % size == 0
    return weight, scale.view(-1, 1), size


def core_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """What a core computes: turn, round each token to ±127 of its largest, multiply integers, scale."""
    matrix, regular = torch.ones(1, 1), torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    while len(matrix) < size:
        matrix = torch.kron(matrix, regular)
    x = (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    token = x.abs().amax(-1, keepdim=True) / 127
    return ((x / token).round().clamp(-127, 127).double() @ codes.double().t()).float() * token * scale.t()


@pytest.fixture(scope="module", params=["none", "convrot"])
def case(request, runs):
    model = runs.quantized(rotation=request.param, smooth_alpha=0.0, include=r"double_blocks\.0\.img")
    return model, runs.save(model, form="core_int8")


def test_a_core_reads_every_layer(runs, case):
    """Codes are ours, bit for bit, and its product is ours to the rounding of ties."""
    model, path = case
    tensors = load_file(runs.file(path))
    names = {key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")}
    parts = quantised_parts(model)
    assert names == {PREFIX + name for name in parts}
    assert not any("compress" in key or "codebook" in key for key in tensors)
    for name, part in parts.items():
        codes, scale, size = core_layer(tensors, PREFIX + name)
        assert torch.equal(codes, part.weight) and torch.equal(scale, part.weight_scale)
        assert size == (256 if part.rotation.kind == "convrot" else 1)
        x = torch.randn(32, part.in_features, generator=torch.Generator().manual_seed(1))
        assert sqnr(core_product(x, codes, scale, size) + part.bias, part(x)) > 60


def test_it_loads_here_with_the_same_codes_and_latent(runs, case):
    model, path = case
    loaded, ours = quantised_parts(runs.load(path, **{})), quantised_parts(model)
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[name].weight, part.weight) for name, part in ours.items())
    assert all(loaded[name].rotation.kind == part.rotation.kind for name, part in ours.items())


def test_one_scale_a_tensor_is_read_too(runs, case):
    """What comfy-kitchen's tensor-wise form writes: a single number."""
    _, path = case
    tensors = load_file(runs.file(path))
    name = next(key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale"))
    tensors[f"{name}.weight_scale"] = torch.tensor(0.01)
    save_file(tensors, runs.file("one_scale.safetensors"))
    part = quantised_parts(runs.load("one_scale.safetensors"))[name.removeprefix(PREFIX)]
    assert torch.equal(part.weight_scale, torch.full((part.out_features, 1), 0.01))


@pytest.mark.parametrize("marker", [
    {"format": "nvfp4"}, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}, ["int8_tensorwise"], {"convrot": True},
])  # fmt: skip
def test_other_formats_of_the_core_are_refused_by_name(runs, case, marker):
    tensors = load_file(runs.file(case[1]))
    name = next(key for key in tensors if key.endswith(".comfy_quant"))
    tensors[name] = torch.frombuffer(bytearray(json.dumps(marker).encode()), dtype=torch.uint8)
    save_file(tensors, runs.file("foreign.safetensors"))
    with pytest.raises(NodeInputError, match="foreign.safetensors: layer .*readable (is|are)"):
        runs.load("foreign.safetensors")
