"""The probe of block ranges: what it measures of blocks whose change is known, what it leaves of the picture, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.policy import Limits
from rectiflow.accel.cache.range_probe import RangeProbe, change_chart, probed
from rectiflow.accel.cache.report import CacheLog, RunRecord
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.errors import NodeInputError
from rectiflow.families.arch import arch_spec
from rectiflow.families.blocks import block_text, parse_blocks
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES

PROMPT = "noto cat on blue"
STEPS = 8


def sampled(tiny, policy, model=None, **kind):
    log = CacheLog()
    probing = attach(model or tiny.model, CachePlan(policy, "block_delta", Limits(0, 0)), log, "test")
    return tiny.sample(PROMPT, tiny.noise([1]), model=probing, steps=STEPS, **kind), log.last


def growing_blocks(tiny):
    """The tiny model whose front blocks add the same at every step, and whose last block adds 1 + the step it is in."""
    model, network = tiny.model.clone(), tiny.model.model.diffusion_model
    singles = len(network.single_blocks)

    def adding(kind, i):
        def patch(args, extra):
            options = args["transformer_options"]
            step = round((1 - float(options["sigmas"][0])) * STEPS)
            added = 1.0 + step if (kind, i) == ("single_block", singles - 1) else 0.5
            return {"img": args["img"] + added} | ({"txt": args["txt"]} if kind == "double_block" else {})

        return patch

    for kind, count in (("double_block", len(network.double_blocks)), ("single_block", singles)):
        for i in range(count):
            model.set_model_patch_replace(adding(kind, i), "dit", kind, i)
    return model


def test_changes_of_blocks_that_add_known_numbers(tiny):
    """Rear ranges add 0.5·(n − 1) + 1 + t at step t of a uniform schedule: they change by 1 over that sum; front ones not at all."""
    sigmas = torch.linspace(1, 0, STEPS + 1)
    _, record = sampled(tiny, RangeProbe(sizes=(1 / 3, 2 / 3)), growing_blocks(tiny), sigmas=sigmas)
    found = {one["range"]: one["change"] for one in probed(record, "test")}
    assert list(found) == ["front 3 of 9", "middle 3 of 9", "rear 3 of 9", "front 6 of 9", "middle 6 of 9", "rear 6 of 9"]
    for name, change in found.items():
        count = int(name.split()[1])
        expected = [1 / (0.5 * (count - 1) + 1 + t) if name.startswith("rear") else 0.0 for t in range(1, STEPS)]
        # Tokens of size 20 less themselves, in float32: offsets are exact to about 1e-5.
        assert change[0] is None and change[1:] == pytest.approx(expected, abs=2e-5)
    # Front and middle ones tie at 0, to float32; rear ones never win.
    early, late = record.findings["least change early"], record.findings["least change late"]
    assert all("3 of 9" in least and "6 of 9" in least and "rear" not in least for least in (early, late))


def test_the_picture_is_bit_identical_and_nothing_is_left(tiny):
    latent, record = sampled(tiny, RangeProbe())
    assert torch.equal(latent, tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS))
    assert record.hit_ratio == 0 and record.finished
    json.dumps(record.as_dict())  # numbers and words, no tensor


def test_ranges_of_the_whole_stack_are_measured_once(tiny):
    arch = arch_spec(tiny.model.model.diffusion_model)
    assert RangeProbe(sizes=(1.0, 0.999)).ranges(arch) == {"all 9 of 9": arch.blocks}
    assert list(RangeProbe(sizes=(0.001,)).ranges(arch)) == ["front 1 of 9", "middle 1 of 9", "rear 1 of 9"]


def test_the_text_of_blocks_is_read_back(tiny):
    arch = arch_spec(tiny.model.model.diffusion_model)
    for blocks in RangeProbe(sizes=(0.1, 0.4, 0.8, 1.0)).ranges(arch).values():
        assert parse_blocks(block_text(blocks), arch.layout, "test") == blocks


def test_the_nodes(tiny):
    from rectiflow.host.embedded import use_host

    with use_host(tiny.host):
        model, report = NODES["RectiflowBlockRangeProbe"]().execute(model=tiny.model, sizes="0.3 0.6")
    latent = tiny.sample(PROMPT, tiny.noise([1]), model=model, steps=4)
    chart, text = NODES["RectiflowBlockRangeChart"]().execute(report=report, after={"samples": latent})
    assert chart.ndim == 4 and chart.shape[-1] == 3 and 0 <= chart.min() and chart.max() <= 1
    assert "rear 5 of 9 (single:1-5): changes a step by" in text and "least change late" in text


@pytest.mark.parametrize("sizes", ["", "0", "0.5, 1.2", "-0.1", "half"])
def test_sizes_that_are_no_shares_are_refused(tiny, sizes):
    with pytest.raises(NodeInputError, match="Block Range Probe.*'sizes'"):
        NODES["RectiflowBlockRangeProbe"]().execute(model=tiny.model, sizes=sizes)


@pytest.mark.parametrize("record", [None, RunRecord("interval reuse", "output", 4)], ids=["not run", "another node's"])
def test_a_report_of_something_else_is_refused(record):
    log = CacheLog()
    if record is not None:
        log.add(record)
    with pytest.raises(NodeInputError, match="Block Range Chart.*'report'.*Block Range Probe"):
        NODES["RectiflowBlockRangeChart"]().execute(report=log, after={})


def test_the_chart_takes_a_run_of_one_step():
    assert change_chart([{"range": "front 1 of 2", "blocks": "double:0", "change": [None]}]).shape[0] == 1
