"""Pairs of noise and picture: what regenerates, what a file keeps, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rectiflow import NODE_CLASS_MAPPINGS as NODES
from rectiflow.errors import NodeInputError
from rectiflow.host import get_output_directory, sample_custom, sampler_object
from rectiflow.samplers.pairs import FlowPairs, conditioning_hash, facts_of, load_pairs, save_pairs
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("host")  # an output folder of the test's own

SIGMAS = torch.linspace(1, 0, 5)


@pytest.fixture(scope="module")
def tiny():
    model, clip, _ = NODES["RectiflowLoadTiny"]().execute()
    cat, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("noto cat on white", ""))
    return {"model": model, "positive": cat, "negative": empty}


def generate(tiny, **changes):
    inputs = {
        **tiny, "cfg": 1.5, "sampler": sampler_object("euler"), "sigmas": SIGMAS, "latent": {"samples": torch.zeros(1, 16, 8, 8)},
        "count": 5, "seed": 7, "path": "rectiflow/pairs", "batch": 2, **changes,
    }  # fmt: skip
    return NODES["RectiflowFlowPairGenerator"]().execute(**inputs)


def test_a_pair_is_made_again_from_its_seed(tiny):
    """Noise to the last bit; the picture to the last bit too where it is sampled alone, as here."""
    pairs, report = generate(tiny)
    loaded, line = NODES["RectiflowFlowPairsLoad"]().execute(path=report.splitlines()[1], count=0)
    assert torch.equal(loaded.clean, pairs.clean) and loaded.seeds.tolist() == [7, 8, 9, 10, 11] and loaded.facts == pairs.facts
    assert line == report.splitlines()[0] == "5 pairs of 16×8×8, euler in 4 steps, cfg 1.5"
    noise = loaded.noise()
    assert torch.equal(noise[3:4], torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(10))[None])
    assert torch.equal(loaded.noise(slice(3, 5)), noise[3:5])
    alone = generate(tiny, seed=10, count=1)[0]
    drawn = sample_custom(
        tiny["model"], noise[3:4], 1.5, sampler_object("euler"), SIGMAS, tiny["positive"], tiny["negative"], torch.zeros(1, 16, 8, 8),
        disable_pbar=True, seed=0,
    )  # fmt: skip
    assert torch.equal(alone.clean, drawn)
    assert torch.allclose(loaded.clean[3:4], drawn, atol=1e-4)  # a batch of two adds up in another order


def test_the_batch_and_the_count_do_not_change_a_pair(tiny):
    one, many = generate(tiny, batch=1, count=3)[0], generate(tiny, batch=3, count=3)[0]
    assert torch.equal(one.noise(), many.noise()) and torch.allclose(one.clean, many.clean, atol=1e-4)
    assert len(NODES["RectiflowFlowPairsLoad"]().execute(path=generate(tiny)[1].splitlines()[1], count=2)[0]) == 2


def test_the_header_tells_couplings_apart(tiny):
    first = facts_of(tiny["positive"], tiny["negative"], 1.5, sampler_object("euler"), SIGMAS)
    others = [
        facts_of(tiny["negative"], tiny["negative"], 1.5, sampler_object("euler"), SIGMAS),
        facts_of(tiny["positive"], tiny["positive"], 1.5, sampler_object("euler"), SIGMAS),
        facts_of(tiny["positive"], tiny["negative"], 2.0, sampler_object("euler"), SIGMAS),
        facts_of(tiny["positive"], tiny["negative"], 1.5, sampler_object("heun"), SIGMAS),
        facts_of(tiny["positive"], tiny["negative"], 1.5, sampler_object("euler"), SIGMAS[1:]),
    ]
    assert all(other != first for other in others)
    without = [facts_of(tiny["positive"], tiny[side], 1.0, sampler_object("euler"), SIGMAS) for side in ("positive", "negative")]
    assert without[0] == without[1] and conditioning_hash(tiny["positive"]) == without[0]["conditioning"]


def stopping_at(model, call: int):
    """A clone whose model is called that often before it raises, and the calls."""
    model, calls = model.clone(), []

    def interrupt(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "interrupt", interrupt)
    return model, calls


def files() -> list[str]:
    return sorted(path.name for path in Path(get_output_directory()).rglob("*") if path.is_file())


def test_an_interrupted_run_goes_on_without_losing_or_repeating_a_seed(tiny):
    """One call is the probe, four are a batch of two: the seventh is in the second batch, and leaves the first."""
    whole = generate(tiny)[0]
    for path in Path(get_output_directory()).rglob("*.safetensors"):
        path.unlink()
    model, calls = stopping_at(tiny["model"], 7)
    with pytest.raises(KeyboardInterrupt):
        generate({**tiny, "model": model})
    assert files() == ["000000000.safetensors", "probe.safetensors"]
    pairs, report = generate({**tiny, "model": model})
    assert torch.equal(pairs.clean, whole.clean) and torch.equal(pairs.seeds, whole.seeds)
    assert "2 of them were there" in report and len(calls) == 7 + 1 + 2 * 4
    assert files() == ["pairs_00001_.safetensors"]


@pytest.mark.parametrize("changed", [{"cfg": 1.0}, {"seed": 8}, {"sigmas": torch.linspace(1, 0, 4)}])
def test_another_description_takes_nothing_of_an_interrupted_run(changed, tiny):
    with pytest.raises(KeyboardInterrupt):
        generate({**tiny, "model": stopping_at(tiny["model"], 7)[0]})
    assert "were there" not in generate(tiny, **changed)[1]


def test_another_model_or_a_damaged_shard_takes_nothing_either(tiny):
    with pytest.raises(KeyboardInterrupt):
        generate({**tiny, "model": stopping_at(tiny["model"], 11)[0]})
    first, second = sorted(Path(get_output_directory()).rglob("0*.safetensors"))
    second.write_bytes(second.read_bytes()[:-8])
    again = stopping_at(tiny["model"], 7)[0]
    with pytest.raises(KeyboardInterrupt):
        generate({**tiny, "model": again})
    assert first.exists(), "the whole shard before the damaged one counts"
    other = tiny["model"].clone()
    key = "diffusion_model.final_layer.linear.weight"
    other.add_patches({key: ("diff", (torch.full_like(other.get_model_object(key), 0.01),))})
    assert "were there" not in generate({**tiny, "model": other})[1]


PAIRS = FlowPairs(torch.zeros(2, 4, 2, 2), torch.arange(2), {"conditioning": "c", "cfg": "1", "sampler": "euler", "sigmas": "[1.0, 0.0]"})


@pytest.mark.parametrize("spoil", ["absent", "other", "nan", "seeds", "cut"])
def test_other_files_are_refused(tmp_path, spoil):
    path = tmp_path / "pairs.safetensors"
    if spoil == "other":
        save_file({"clean": PAIRS.clean}, str(path))
    elif spoil == "nan":
        save_pairs(FlowPairs(PAIRS.clean / 0, PAIRS.seeds, PAIRS.facts), path)
    elif spoil == "seeds":
        save_pairs(FlowPairs(PAIRS.clean, torch.arange(3), PAIRS.facts), path)
    elif spoil == "cut":
        save_pairs(PAIRS, path)
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(NodeInputError, match="node: input 'path'"):
        load_pairs(path, "node")


@pytest.mark.parametrize("path", ["", "../secrets.safetensors", "/etc/hostname", "no/such/file.safetensors", "a\0b"])
def test_only_files_below_the_output_folder_are_read(path):
    assert get_output_directory()
    with pytest.raises(NodeInputError, match="Load Flow Pairs: input 'path'"):
        NODES["RectiflowFlowPairsLoad"]().execute(path=path, count=0)
