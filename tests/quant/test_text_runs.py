"""The text of runs of blocks as linear maps: exact where it is linear, what it leaves alone, files, and what is refused."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.prune.linear_mlps import linear_parts
from rectiflow.accel.prune.text_runs import RunModulation, text_runs_of
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded import use_host
from rectiflow.nodes.pruning import host_services
from rectiflow.tests.quant.conftest import drawn
from rectiflow.train.pool import Calibration
from rectiflow.train.recovery import RecoverSettings, recover
from torch import nn

WIDTH = 256


class Shown:
    """What the node is given in these tests: four prompts, few steps."""

    def __init__(self, runs):
        self.runs = runs
        prompts = ("noto cat on white", "twemoji tree on blue", "noto rocket on black", "noto dog on red")
        positive = [entry for prompt in prompts for entry in runs.conditioning(prompt)]
        self.given = {"positive": positive, "latent": {"samples": torch.zeros(1, 16, 16, 16)}, "seed": 0, "samples": 4, "sample_steps": 4,
                      "points": 16, "tokens": 1024}  # fmt: skip

    def linear(self, model=None, runs: str = "1-2", **changed):
        given = {"count": 1, "max_run": 6, "runs": runs, "judge": "velocity", **self.given, **changed}
        return self.runs.node("RectiflowTextToLinear", model=model or self.runs.model, **given)


@pytest.fixture
def shown(runs) -> Shown:
    return Shown(runs)


def planted(runs):
    """The tiny model whose blocks 1 and 2 leave the text as it is, with modulations that do not know the time: z_2 is affine in z_1."""
    model = runs.model.clone()
    with torch.inference_mode(False):
        for number in (1, 2):
            for path, size in (("txt_attn.proj", (WIDTH, WIDTH)), ("txt_mlp.2", (WIDTH, 4 * WIDTH))):
                layer = nn.Linear(size[1], size[0])
                layer.weight, layer.bias = (nn.Parameter(torch.zeros(shape), requires_grad=False) for shape in (size, size[:1]))
                model.add_object_patch(f"diffusion_model.double_blocks.{number}.{path}", layer)
            still = nn.Linear(WIDTH, 6 * WIDTH)
            still.weight = nn.Parameter(torch.zeros(6 * WIDTH, WIDTH), requires_grad=False)
            still.bias = nn.Parameter(0.1 * drawn(6 * WIDTH, seed=number), requires_grad=False)
            model.add_object_patch(f"diffusion_model.double_blocks.{number}.txt_mod.lin", still)
    return model


def test_text_that_is_linear_changes_nothing(shown):
    """With the smallest ridge, 1e-4 of a channel's square, a map from z_1 leaves about 1e-8 of the square of what it says."""
    model = planted(shown.runs)
    mapped, report, _ = shown.linear(model)
    expected, found = shown.runs.latent(model), shown.runs.latent(mapped)
    assert (found - expected).norm() < 1e-3 * expected.norm(), report
    assert (shown.runs.latent(shown.runs.model) - expected).norm() > 1e-2 * expected.norm()
    assert float(report.split("velocity error ")[1].split(";")[0]) < 1e-4


def test_the_run_that_loses_least_and_its_bytes(shown):
    """Gone of a run of two: two projections, two MLPs, one modulation; E comes."""
    runs = shown.runs
    whole = runs.latent(runs.model)
    model, report, _ = shown.linear(runs="")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in report.splitlines() if line[2:5] in ("0-1", "0-2", "1-2")}
    least = min(("0-1", "1-2"), key=lambda name: float(rows[name][1]))
    assert [name for name, row in rows.items() if row[2].strip(" |") == "linear"] == [least]
    square = WIDTH * WIDTH
    gone = 2 * (square + WIDTH) + 2 * (8 * square + 5 * WIDTH) + 6 * square + 6 * WIDTH - square - WIDTH
    assert runs.model.model_size() - model.model_size() == 4 * gone
    moved = (runs.latent(model) - whole).norm() / whole.norm()
    assert 0.0 < moved < 0.3 and torch.equal(runs.latent(runs.model), whole)
    quick, *_ = shown.linear(runs="", judge="maps")
    assert len(text_runs_of(quick)) == 1


def test_batch_equals_singles(shown):
    """To rounding: matrix products of other sizes add in another order."""
    model, *_ = shown.linear(runs="0-2")
    noise = shown.runs.noise([1, 2])
    both = shown.runs.sample("noto cat on white", noise, model=model, steps=2, cfg=3.0)
    for number in range(2):
        alone = shown.runs.sample("noto cat on white", noise[number : number + 1], model=model, steps=2, cfg=3.0)
        assert torch.allclose(both[number : number + 1], alone, atol=1e-4)


def test_blocks_of_a_run_are_not_offered_again(shown):
    first, *_ = shown.linear(runs="0-1")
    with pytest.raises(NodeInputError, match="within none"):
        shown.linear(first, runs="1-2")
    assert text_runs_of(first) == {"double_blocks.0": "double_blocks.1"}


def test_saved_and_loaded_the_latent_is_the_same_also_quantised(shown):
    runs = shown.runs
    model, *_ = shown.linear()
    quantised = runs.quantized(model, include=r"txt|linear1", lora="bypass")
    assert any(name.endswith("txt_mlp.map") for name, _ in _quantised(quantised))
    for each in (model, quantised):
        path = runs.save(each, prefix="test/text")
        loaded = runs.load(path)
        assert text_runs_of(loaded) == {"double_blocks.1": "double_blocks.2"} and set(linear_parts(loaded)) == set(linear_parts(model))
        assert torch.equal(runs.latent(loaded), runs.latent(each))
        assert loaded.model_size() == pytest.approx(each.model_size(), rel=0.02)
        about = runs.node("RectiflowCompressionInfo", path=path)[0]
        assert "text is linear over 1 runs of blocks: double_blocks.1 to double_blocks.2" in about
        again = runs.save(loaded, prefix="test/again")
        assert runs.file(again).read_bytes() == runs.file(path).read_bytes()
    with pytest.raises(NodeInputError, match="other loaders look for the MLPs"):
        runs.save(model, form="plain")


def _quantised(model):
    from rectiflow.accel.modules import seen_modules
    from rectiflow.accel.quant.linear import QuantLinear

    return [(name, module) for name, module in seen_modules(model) if isinstance(module, QuantLinear)]


def test_with_blocks_left_out_and_a_map_in_the_run(shown):
    runs = shown.runs
    pruned = runs.pruned("double_blocks.0", "single_blocks.2")
    mapped = runs.node("RectiflowWidthToLinear", model=pruned, count=2, streams="text", **shown.given)[0]
    model, *_ = shown.linear(mapped)
    assert set(linear_parts(model)) == {"double_blocks.2.txt_mlp"}
    for compact in (False, True):
        loaded = runs.load(runs.save(model, prefix="test/pruned text"), compact_numbering=compact)
        assert torch.equal(runs.latent(loaded), runs.latent(model))
    assert text_runs_of(loaded) == {"double_blocks.0": "double_blocks.1"}
    path = runs.save(runs.load(runs.save(mapped, prefix="test/mapped")), prefix="test/mapped again")
    again, *_ = shown.linear(runs.load(path))
    assert torch.equal(runs.latent(runs.load(runs.save(again, prefix="test/text again"))), runs.latent(again))


def test_a_lora_of_the_first_block_is_in_the_whole_run(shown):
    """The modulation of the first block is asked by the others; what was for a block's own modulation finds nothing to change."""
    runs = shown.runs
    model, *_ = shown.linear()
    before = runs.latent(model)

    def patched(block: int):
        changed = model.clone()
        changed.add_patches({f"diffusion_model.double_blocks.{block}.txt_mod.lin.weight": ("diff", (0.02 * drawn(6 * WIDTH, WIDTH),))})
        return changed

    assert (runs.latent(patched(1)) - before).norm() > 1e-3 * before.norm()
    assert torch.equal(runs.latent(patched(2)), before) and torch.equal(runs.latent(model), before)


def test_off_is_bit_identical_after_twenty_turns(shown):
    runs = shown.runs
    model, *_ = shown.linear()
    runs.twenty_turns(model, RunModulation)


@pytest.mark.parametrize("asked", ["1", "2-1", "0-3", "1-2, 0-1", "a-b", "-1-2"])
def test_lists_of_runs_that_cannot_be_are_refused(shown, asked):
    with pytest.raises(NodeInputError, match="'runs'.*0 to 2"):
        shown.linear(runs=asked)


def test_what_cannot_be_is_refused(shown):
    runs = shown.runs
    with pytest.raises(NodeInputError, match="'count'"):
        shown.linear(runs="", count=3)
    with pytest.raises(NodeInputError, match="before Quantize"):
        shown.linear(runs.quantized(include="txt_attn.qkv"))
    in_eight_bits = runs.model.clone()
    for part, width in (("txt_attn.qkv", 3 * WIDTH), ("txt_mlp.0", 4 * WIDTH)):
        with torch.inference_mode(False):
            layer = nn.Linear(WIDTH, width)
            layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        in_eight_bits.add_object_patch(f"diffusion_model.double_blocks.1.{part}", layer)
    with pytest.raises(NodeInputError, match="before Quantize"):
        shown.linear(in_eight_bits)
    with pytest.raises(NodeInputError, match="before Quantize"):
        runs.node("RectiflowWidthToLinear", model=in_eight_bits, count=1, streams="text", **shown.given)
    model, *_ = shown.linear()
    with pytest.raises(NodeInputError, match="Link Text to Linear behind this node"):
        with use_host(runs.host):
            runs.pruned("single_blocks.1", model=model)
    with pytest.raises(NodeInputError, match="linear maps"):
        from rectiflow.accel.prune.width import groups_of

        groups_of(model, "test")


@pytest.mark.parametrize("change", ["backwards", "nowhere", "other blocks", "no map", "a number"])
def test_files_whose_runs_do_not_fit_are_refused(shown, change):
    from rectiflow.accel.compressed.manifest import Manifest
    from safetensors.torch import load_file, save_file

    runs = shown.runs
    path = runs.file(runs.save(shown.linear()[0], prefix=f"test/broken {change}"))
    tensors = load_file(path)
    manifest = Manifest.read(tensors["compress.manifest"])
    wrong = {
        "backwards": {"double_blocks.2": "double_blocks.1"}, "nowhere": {"double_blocks.1": "double_blocks.9"},
        "other blocks": {"single_blocks.1": "single_blocks.2"}, "no map": {"double_blocks.0": "double_blocks.1"},
        "a number": {"double_blocks.1": 2},
    }  # fmt: skip
    object.__setattr__(manifest, "text_runs", wrong[change])
    tensors["compress.manifest"] = manifest.tensor()
    save_file(tensors, path)
    with pytest.raises(NodeInputError, match="path"):
        runs.load(str(path))


@pytest.mark.parametrize("change", ["text", "maps", "codes", "factors"])
def test_recovery_towards_a_network_with_the_same_changes_is_refused(shown, change):
    """On one network the teacher's answers would be made with them."""
    runs = shown.runs
    pruned = runs.pruned("single_blocks.1")
    changed = {
        "text": lambda: shown.linear(pruned)[0], "codes": lambda: runs.quantized(pruned),
        "maps": lambda: runs.node("RectiflowWidthToLinear", model=pruned, count=1, streams="image", **shown.given)[0],
        "factors": lambda: runs.node("RectiflowLowRankModulation", model=pruned, rank=64, shared=False)[0],
    }[change]()  # fmt: skip
    with use_host(runs.host), pytest.raises(NodeInputError, match="that the teacher has otherwise"):
        pool = Calibration(runs.conditioning("noto cat on white"), None, (16, 8, 8), count=2, steps=2)
        recover(changed, runs.model, RecoverSettings(steps=1), pool, None, host_services())
