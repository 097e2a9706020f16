"""Quantised models on the host: velocity by bits, what a patcher finds out, LoRAs, and that nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from rectiflow.accel.modules import NETWORK, own_weight, seen_modules
from rectiflow.accel.prune.apply import apply_plan, plan_of, without_plan
from rectiflow.accel.prune.identity import model_hash
from rectiflow.accel.quant.attach import quantised_parts
from rectiflow.accel.quant.error import sqnr
from rectiflow.accel.quant.linear import QuantLinear
from rectiflow.errors import NodeInputError
from rectiflow.tests.quant.conftest import rank_two, with_lora
from torch import nn

LAYERS = ("double_blocks.0.img_mlp.0", "single_blocks.0.linear2")


@pytest.fixture(scope="module")
def eight(runs):
    return runs.quantized()


@pytest.fixture(scope="module")
def plain(runs):
    return runs.latent(runs.model)


def test_fewer_bits_are_further_from_the_velocity(runs):
    """One call at sigma 1, the image side of two blocks: W8A8 ≥ 35 dB, then W4A8, W4A4, W3A4 in this order."""
    exact = runs.latent(runs.model, steps=1)
    found = []
    for weight, act in (("8", "8"), ("4", "8"), ("4", "4"), ("3", "4")):
        model = runs.quantized(weight_bits=weight, act_bits=act, include=r"double_blocks\.[02]\.img", protect_down=False)
        found.append(sqnr(exact - runs.start, runs.latent(model, steps=1) - runs.start))
    assert found[0] >= 35
    assert found == sorted(found, reverse=True), found


def test_the_patcher_is_told_size_and_identity(runs, eight):
    parts = quantised_parts(eight)
    saved = sum(p.in_features * p.out_features * 4 - p.nbytes for p in parts.values())
    assert eight.model_size() == eight.clone().model_size() == runs.model.model_size() - saved
    assert eight.patches_uuid not in (runs.model.patches_uuid, runs.quantized().patches_uuid)
    again = copy.deepcopy(eight.clone().object_patches)
    assert all(again[NETWORK + name] is layer for name, layer in parts.items())


def test_graphs_in_turn_leave_nothing(runs, eight, plain):
    """Twenty graphs of three branches of one network: every latent the same each time, the network and its bytes as before."""
    four = with_lora(runs.quantized(weight_bits="4", lora="requant"), runs.model, LAYERS)
    first = {id(m): runs.latent(m) for m in (eight, four)}
    kinds = [type(module) for module in runs.model.model.modules()]
    for _ in range(7):
        for model in (eight, runs.model, four):
            assert torch.equal(runs.latent(model), plain if model is runs.model else first[id(model)])
    for model in (eight, four, runs.model):
        model.detach()
    assert not any(isinstance(module, QuantLinear) for module in runs.model.model.modules())
    assert len(kinds) == len(list(runs.model.model.modules()))
    assert torch.equal(runs.latent(runs.model), plain)


class TestLoRA:
    @pytest.mark.parametrize(
        ("policy", "bits", "least"),
        [
            ("before", "8", 0.98), ("bypass", "8", 0.98), ("requant", "8", 0.98),
            ("before", "4", 0.9), ("bypass", "4", 0.98), ("requant", "4", 0.9),
        ],
    )
    def test_it_moves_the_latent_as_it_moves_the_whole_models(self, runs, policy, bits, least):
        """Cosine of the two differences of the latent after one call, for a LoRA of a quarter of the weights' size: in front of Quantize
        for "before", behind it for the others."""
        exact = runs.latent(with_lora(runs.model, runs.model, LAYERS, 0.01), steps=1) - runs.latent(runs.model, steps=1)
        chosen = {"weight_bits": bits, "lora": policy, "include": r"\.0\.(img_mlp\.0|linear2)"}
        quantized = runs.quantized(**chosen)
        front, behind = (with_lora(model, runs.model, LAYERS, 0.01) for model in (runs.model, quantized))
        patched = runs.quantized(front, **chosen) if policy == "before" else behind
        moved = runs.latent(patched, steps=1) - runs.latent(quantized, steps=1)
        assert torch.nn.functional.cosine_similarity(moved.flatten(), exact.flatten(), dim=0) >= least

    def test_before_takes_them_in_and_leaves_none_behind(self, runs):
        front = with_lora(runs.model, runs.model, LAYERS)
        inside = runs.quantized(front, lora="before")
        assert not inside.patches and len(front.patches) == 2
        diff = rank_two(runs.model, LAYERS)[f"{NETWORK}{LAYERS[0]}.weight"][1][0]
        whole = own_weight(runs.model, LAYERS[0], dict(seen_modules(runs.model))[LAYERS[0]]).float() + diff
        assert sqnr(whole, quantised_parts(inside)[LAYERS[0]].numbers()) > 38

    def test_bypass_is_exact_to_the_factors_rounding(self, runs):
        base = runs.quantized(weight_bits="4", act_bits="16", lora="bypass")
        part = quantised_parts(base)[LAYERS[0]]
        x = torch.randn(16, part.in_features, generator=torch.Generator().manual_seed(2))
        diff = rank_two(runs.model, LAYERS)[f"{NETWORK}{LAYERS[0]}.weight"][1][0]
        model, before = with_lora(base, runs.model, LAYERS), part(x)
        model.patch_model()
        try:
            assert (part(x) - before - x @ diff.t()).norm() < 2e-3 * (x @ diff.t()).norm()
        finally:
            model.unpatch_model()
        assert torch.equal(part(x), before)


class TestWithOthers:
    def test_prune_then_quantise_equals_quantise_then_prune(self, runs):
        gone = ("double_blocks.1", "single_blocks.3")
        pruned = runs.pruned(*gone)
        first = runs.quantized(pruned, include="img_mlp")
        second = apply_plan(runs.quantized(include="img_mlp"), plan_of(pruned), "test")
        assert not any(name.startswith(gone) for name in quantised_parts(first))
        assert quantised_parts(first).keys() == quantised_parts(second).keys()
        assert torch.equal(runs.latent(first), runs.latent(second))
        assert first.model_size() == second.model_size()
        assert model_hash(first) == model_hash(runs.model)
        assert without_plan(first, plan_of(first), "test").model_size() > first.model_size()

    def test_bits_may_be_mixed_by_two_nodes(self, runs):
        mixed = runs.quantized(runs.quantized(include="double_blocks.0"), include="s.0.lin|s.0.img", weight_bits="4")
        bits = {name.split(".")[0]: {part.bits} for name, part in quantised_parts(mixed).items()}
        assert bits == {"double_blocks": {8}, "single_blocks": {4}}
        with pytest.raises(NodeInputError, match="'include'.*quantised already"):
            runs.quantized(mixed, include="s.0.lin")

    def test_a_mask_on_a_weight_goes_into_its_codes(self, runs):
        masked = runs.model.clone()
        keep = torch.ones(1, 1024)
        keep[:, ::4] = 0
        masked.add_weight_wrapper(f"{NETWORK}double_blocks.0.img_mlp.2.weight", lambda weight: weight * keep)
        quantized = runs.quantized(masked, rotation="none")
        part = quantised_parts(quantized)["double_blocks.0.img_mlp.2"]
        assert not quantized.weight_wrapper_patches and float(part.numbers()[:, ::4].abs().max()) == 0

    def test_caches_and_regions_run_on_it(self, runs, eight):
        """A cache at interval 1 and regions at ratio 1 are off, bit for bit; at 2 and a half they run and stay near."""
        steps = {"steps": 6, "cfg": 3.0}
        exact = runs.latent(eight, **steps)
        cache = {"interval": 1, "granularity": "output"}
        off = runs.node("RectiflowIntervalCache", model=eight, **self._defaults("RectiflowIntervalCache", cache))[0]
        assert torch.equal(runs.latent(off, **steps), exact)
        regions = self._defaults("RectiflowRegionAdaptiveSampling", {"sample_ratio": 0.5})
        both = runs.node("RectiflowRegionAdaptiveSampling", model=off, **regions)[0]
        assert bool(torch.isfinite(runs.latent(both, **steps)).all())

    @staticmethod
    def _defaults(name: str, changed: dict) -> dict:
        from rectiflow import NODE_CLASS_MAPPINGS

        given = {}
        for key, spec in NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"].items():
            if key != "model":
                given[key] = spec[1].get("default", spec[0][0] if isinstance(spec[0], list) else None)
        return {**given, **{key: value for key, value in changed.items() if key in given}}


class TestNodes:
    def test_calibrate_quantise_report(self, runs):
        sigmas = torch.linspace(1, 0, 3)
        latent, prompt = {"samples": torch.zeros(1, 16, 8, 8)}, runs.conditioning("noto cat on white")
        shown = {"positive": prompt, "latent_image": latent, "sigmas": sigmas, "seed": 0}
        stats, report = runs.node("RectiflowQuantCalibrate", model=runs.model, num_runs=1, layers=r"blocks\.0\.", **shown)
        assert report.count("\n") == 1 + len(stats.layers) and all(".0." in name for name in stats.layers)
        chosen = {"rotation": "auto", "weight_bits": "8", "stats": stats, "include": r"blocks\.0\."}
        calibrated = runs.quantized(**chosen)
        text, plot, mean = runs.node(
            "RectiflowQuantReport", reference=runs.model, model=calibrated, negative=runs.conditioning(""), cfg=1.0, **shown
        )
        assert mean > 35 and text.count("\n") == 7 and plot.shape[-1] == 3
        rotations = {part.rotation.kind for part in quantised_parts(calibrated).values()}
        assert rotations <= {"none", "hadamard", "convrot", "hadamard_block"}
        same = runs.node("RectiflowQuantReport", reference=runs.model, model=runs.model, negative=prompt, cfg=1.0, **shown)
        assert same[2] == float("inf")

    def test_bad_input_says_what_to_do(self, runs):
        with pytest.raises(NodeInputError, match="'include'.*regular expression"):
            runs.quantized(include="(")
        with pytest.raises(NodeInputError, match="'include' got 'nothing'"):
            runs.quantized(include="nothing")
        latent = {"samples": torch.zeros(1, 16, 8, 8)}
        shown = {"positive": runs.conditioning(""), "latent_image": latent, "seed": 0, "num_runs": 1, "layers": ""}
        with pytest.raises(NodeInputError, match="'sigmas' got '1 values'"):
            runs.node("RectiflowQuantCalibrate", model=runs.model, sigmas=torch.ones(1), **shown)
        broken = runs.model.clone()
        broken.add_object_patch(f"{NETWORK}img_in", _NotANumber(64, 256))
        with pytest.raises((NodeInputError, ValueError), match="NaN|nan"):
            runs.node("RectiflowQuantCalibrate", model=broken, sigmas=torch.linspace(1, 0, 3), **shown)


class _NotANumber(nn.Linear):
    def forward(self, x):
        return x.new_full((*x.shape[:-1], 256), float("nan"))
