"""MLPs as linear maps: exact where the MLP is linear, what they leave alone, training on them, files, and what is refused."""

from __future__ import annotations

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS
from rectiflow.accel.prune.linear_mlps import LinearMlp, fitted_map, linear_parts, mlp_paths, with_maps
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded import use_host
from rectiflow.tests.quant.conftest import drawn
from torch import nn


def test_a_linear_mlp_is_found_and_noise_is_not():
    """With the smallest ridge, 1e-4 of a channel's square, a linear map leaves 1e-8 of its square; of noise nothing can be said."""
    x, weight = drawn(4000, 48), drawn(64, 48, seed=1)
    found, bias, residual = fitted_map(x, x @ weight.T + 2.0)
    assert residual < 1e-7 and (found - weight).norm() < 1e-3 * weight.norm() and (bias - 2.0).abs().max() < 1e-3
    assert fitted_map(x, drawn(4000, 64, seed=2))[2] > 0.95


def test_few_tokens_take_a_larger_ridge():
    """Half as many tokens as channels: the residual is measured on tokens that did not fit, and no map is much worse than none."""
    assert fitted_map(drawn(64, 96), drawn(64, 16, seed=1))[2] < 1.5


class Shown:
    """What the nodes are given in these tests: one prompt, two pictures, few steps."""

    def __init__(self, runs):
        self.runs = runs
        self.given = {"positive": runs.conditioning("noto cat on white"), "latent": {"samples": torch.zeros(1, 16, 16, 16)}, "seed": 0,
                      "samples": 2, "sample_steps": 4, "points": 8, "tokens": 1024}  # fmt: skip

    def maps(self, model=None, count: int = 2, streams: str = "image"):
        return self.runs.node("RectiflowWidthToLinear", model=model or self.runs.model, count=count, streams=streams, **self.given)


@pytest.fixture
def shown(runs) -> Shown:
    return Shown(runs)


def test_those_with_the_least_residual_are_exchanged_and_nothing_else(shown):
    runs = shown.runs
    whole = runs.latent(runs.model)
    model, report, _ = shown.maps()
    residuals = {line.split(" | ")[0].strip("| "): float(line.split(" | ")[1]) for line in report.splitlines() if "img_mlp" in line}
    assert set(linear_parts(model)) == set(sorted(residuals, key=residuals.get)[:2]) and len(residuals) == 3
    saved = 2 * (2 * 256 * 1024 + 1024 + 256 - 256 * 256 - 256) * 4
    assert runs.model.model_size() - model.model_size() == saved
    moved = (runs.latent(model) - whole).norm() / whole.norm()
    assert 0.0 < moved < 0.5 and torch.equal(runs.latent(runs.model), whole)


def test_a_map_that_is_the_mlp_changes_nothing(runs):
    """MLPs made linear beforehand: the model with maps is the model, to the rounding of one product in place of two."""
    model = runs.model.clone()
    with torch.inference_mode(False):
        first, second = (drawn(*shape, seed=3) * 0.05 for shape in ((1024, 256), (256, 1024)))
        layers = [nn.Linear(256, 1024), nn.Linear(1024, 256)]
        for layer, weight in zip(layers, (first, second)):
            layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(weight[:, 0].clone(), requires_grad=False)
        linear = nn.Sequential(layers[0], nn.Identity(), layers[1])
    model.add_object_patch("diffusion_model.double_blocks.1.img_mlp", linear)
    exact = (second @ first, second @ layers[0].bias + layers[1].bias)
    with use_host(runs.host):
        mapped = with_maps(runs.model, {"double_blocks.1.img_mlp": exact})
    expected, found = runs.latent(model), runs.latent(mapped)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", ["lora", "all"])
def test_what_learns_on_a_map_comes_out_with_the_model(shown, kind):
    runs = shown.runs
    model, *_ = shown.maps(count=3)
    positive = runs.conditioning("noto cat on white")
    data = runs.node("RectiflowLatentDataset", latents={"samples": drawn(2, 16, 16, 16)}, positive=positive)[0]
    params = runs.node("RectiflowTrainParams", kind=kind, rank=8, alpha=0.0, include="map", exclude="", blocks="")[0]
    target = runs.node(
        "RectiflowTrainTarget", kind="teacher_velocity", teacher=runs.model, teacher_cfg=1.0, anneal_steps=1, annealing="linear"
    )[0]
    with use_host(runs.host), torch.inference_mode():
        learnt, lora, *_ = NODE_CLASS_MAPPINGS["RectiflowTrain"]().execute(
            model=model, data=data, params=params, target=target, steps=3, batch=2, name=f"maps {kind}", dtype="fp32", ema=0.0,
            checkpointing=False, save_every=0, validate_every=0,
        )  # fmt: skip
    before, after = linear_parts(model), linear_parts(learnt)
    assert set(after) == set(before)
    for path, part in before.items():
        own = {key.partition(".map.")[2]: value for key, value in lora.items() if f".{path}.map." in key}
        moved = own["lora_up.weight"] @ own["lora_down.weight"] if kind == "lora" else own["diff"]
        assert moved.norm() > 0 and torch.allclose(after[path].map.weight, part.map.weight + moved, atol=1e-7)
    assert not torch.equal(runs.latent(learnt), runs.latent(model))


def test_saved_and_loaded_the_latent_is_the_same_also_quantised(shown):
    runs = shown.runs
    model, *_ = shown.maps()
    quantised = runs.quantized(model, include=r"img_mlp|linear1", lora="bypass")
    for each in (model, quantised):
        path = runs.save(each, prefix="test/maps")
        loaded = runs.load(path)
        assert set(linear_parts(loaded)) == set(linear_parts(model))
        assert torch.equal(runs.latent(loaded), runs.latent(each))
        assert loaded.model_size() == pytest.approx(each.model_size(), rel=0.02)
        assert "2 MLPs are linear maps" in runs.node("RectiflowCompressionInfo", path=path)[0]
        again = runs.save(loaded, prefix="test/again")
        assert runs.file(again).read_bytes() == runs.file(path).read_bytes()
    assert any(name.endswith(".map") for name in runs.node("RectiflowCompressionInfo", path=path)[0].split())


def test_with_blocks_left_out(shown):
    runs = shown.runs
    model, *_ = shown.maps(runs.pruned("double_blocks.1", "single_blocks.2"), count=2)
    assert set(linear_parts(model)) == {"double_blocks.0.img_mlp", "double_blocks.2.img_mlp"}
    loaded = runs.load(runs.save(model, prefix="test/pruned maps"))
    assert torch.equal(runs.latent(loaded), runs.latent(model)) and set(linear_parts(loaded)) == set(linear_parts(model))


def test_off_is_bit_identical_after_twenty_turns(shown):
    runs = shown.runs
    model, *_ = shown.maps()
    runs.twenty_turns(model, LinearMlp)


def test_what_cannot_be_is_refused(shown):
    runs = shown.runs
    with pytest.raises(NodeInputError, match="1 to 3, the MLPs of text"):
        shown.maps(count=4, streams="text")
    with pytest.raises(NodeInputError, match="before Quantize"):
        shown.maps(runs.quantized(include="img_mlp"))
    model, *_ = shown.maps(count=3)
    with pytest.raises(NodeInputError, match="linear maps"):
        from rectiflow.accel.prune.width import groups_of

        groups_of(model, "test")
    with pytest.raises(NodeInputError, match="other loaders look for the MLPs"):
        runs.save(model, form="plain")
    assert set(mlp_paths(model, "test").values()) == {"text"}


@pytest.mark.parametrize("change", ["shape", "gone", "other"])
def test_files_whose_maps_do_not_fit_are_refused(shown, change):
    from rectiflow.accel.compressed.manifest import Manifest
    from safetensors.torch import load_file, save_file

    runs = shown.runs
    path = runs.file(runs.save(shown.maps(count=1)[0], prefix=f"test/broken {change}"))
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith(".map.weight"))
    if change == "shape":
        tensors[key] = tensors[key][:, :-1].contiguous()
    elif change == "gone":
        del tensors[key]
    else:
        manifest = Manifest.read(tensors["compress.manifest"])
        object.__setattr__(manifest, "maps", {"single_blocks.0.linear1": {"weight": (1, 1)}})
        tensors["compress.manifest"] = manifest.tensor()
    save_file(tensors, path)
    with pytest.raises(NodeInputError, match="path"):
        runs.load(str(path))
