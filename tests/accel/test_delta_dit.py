"""Δ-DiT: which blocks run at which step, exact where its premise holds, and what its settings refuse."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.cache.binding import attach
from rectiflow.accel.cache.delta_dit import DeltaDiT, place_blocks
from rectiflow.accel.cache.policy import Limits, Visit
from rectiflow.accel.cache.report import CacheLog
from rectiflow.accel.cache.visits import CachePlan
from rectiflow.errors import NodeInputError
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES

PROMPT = "noto cat on blue"
STEPS = 8
BLOCKS = tuple(("single_block", i) for i in range(28))
SETTINGS = {
    "interval": 2, "boundary": 0.6, "boundary_steps": -1, "block_count": 0, "blocks_ratio": 0.75, "early_range": "rear",
    "late_range": "front", "order": 0, "warmup_steps": 1, "tail_steps": 0, "keep_both": True, "start_percent": 0.0, "end_percent": 1.0,
}  # fmt: skip


def run(tiny, policy, *, model=None, limits=None, **kind):
    log = CacheLog()
    plan = CachePlan(policy, "block_delta", limits or Limits(1))
    latent = tiny.sample(PROMPT, tiny.noise([1]), model=attach(model or tiny.model, plan, log, "test"), **{"steps": STEPS, **kind})
    return latent, log.last


def constant_blocks(tiny):
    """The tiny model with blocks that add a number to the image tokens, each its own: the offset of any range never changes."""
    model = tiny.model.clone()
    arch = tiny.model.model.diffusion_model

    def adding(kind, i):
        def patch(args, extra):
            added = 0.01 * (i + 1) if kind == "double_block" else -0.02 * (i + 1)
            return {"img": args["img"] + added, "txt": args["txt"]} if kind == "double_block" else {"img": args["img"] + added}

        return patch

    for kind, blocks in (("double_block", arch.double_blocks), ("single_block", arch.single_blocks)):
        for i in range(len(blocks)):
            model.set_model_patch_replace(adding(kind, i), "dit", kind, i)
    return model


@pytest.mark.parametrize("policy", [DeltaDiT(interval=1), DeltaDiT(ratio=0.0), DeltaDiT(early="none", late="none")], ids=["1", "0", "none"])
def test_off_is_bit_identical_and_keeps_nothing(tiny, policy):
    latent, record = run(tiny, policy)
    assert torch.equal(latent, tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS)) and record.peak_bytes == 0


@pytest.mark.parametrize("place", ["rear", "front", "middle", "all"])
@pytest.mark.parametrize("interval", [2, 4])
def test_blocks_that_add_constants_are_left_out_without_error(tiny, place, interval):
    model = constant_blocks(tiny)
    plain = tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    latent, record = run(tiny, DeltaDiT(interval=interval, ratio=0.5, early=place, late=place), model=model)
    # A difference is taken and added again, at float32, over eight guided steps.
    torch.testing.assert_close(latent, plain, atol=1e-4, rtol=0)
    assert record.hit_ratio == 1 - 1 / interval


def test_the_published_count_of_blocks():
    """20 steps, every second whole, 21 of 28 blocks left out of the others: 350 of 560 blocks run, 1.60 times fewer."""
    policy = DeltaDiT(blocks=21)
    executed, skipped = 0, 0
    for step in range(20):
        choice = policy.decide(Visit(step, 1 - step / 20, float(step), 20, skipped))
        skipped = skipped + 1 if choice.action.name == "SKIP" and step else 0
        executed += 28 - (len(place_blocks(choice.part, 21, BLOCKS)) if skipped else 0)
    assert executed == 20 * 28 - 10 * 21 == 350 and 560 / executed == pytest.approx(1.6)


def test_rear_blocks_early_and_front_blocks_late():
    policy = DeltaDiT(boundary_steps=12)
    places = [policy.place(Visit(step, 0.5, float(step), 20, 0)) for step in range(20)]
    assert places == ["rear"] * 8 + ["front"] * 12
    assert [DeltaDiT(boundary=0.6).place(Visit(0, 0.5, float(step), 20, 0)) for step in range(20)] == places
    assert place_blocks("rear", 3, BLOCKS) == BLOCKS[25:] and place_blocks("front", 3, BLOCKS) == BLOCKS[:3]
    assert place_blocks("middle", 4, BLOCKS) == BLOCKS[12:16] and place_blocks("all", 3, BLOCKS) == BLOCKS
    assert place_blocks("none", 3, BLOCKS) == ()


def test_blocks_that_run_are_those_that_should(tiny):
    network = tiny.model.model.diffusion_model
    stack = [*network.double_blocks, *network.single_blocks]
    seen: list[int] = []
    handles = [block.register_forward_hook(lambda *a, i=i: seen.append(i)) for i, block in enumerate(stack)]
    try:
        _, record = run(tiny, DeltaDiT(boundary=0.5, blocks=4))
    finally:
        for handle in handles:
            handle.remove()
    total = len(stack)
    early, late = list(range(total - 4)), list(range(4, total))
    assert seen == [*range(total), *early] * 2 + [*range(total), *late] * 2
    assert [visit.decision for visit in record.visits] == ["full", "forecast"] * 4


def test_the_change_of_stage_is_free_only_with_both_offsets(tiny):
    """Every fourth step and four late steps of eight: step 5 is the second late one, and has an offset only where both were kept."""
    decisions = []
    for keep_both in (True, False):
        _, record = run(tiny, DeltaDiT(interval=4, boundary_steps=5, blocks=3, keep_both=keep_both))
        decisions.append([visit.decision == "full" for visit in record.visits])
    assert decisions[0] == [True, False, False, False, True, False, False, False]
    assert decisions[1][3] and "no history" in record.visits[3].reason


@pytest.mark.parametrize("place", ["rear", "front", "middle", "all"])
def test_offsets_forced_to_their_true_value_give_the_computed_picture(tiny, place):
    """A schedule that stands still: what is put back is what was captured, in ranges within and across both kinds of blocks."""
    sigmas = torch.tensor([0.7] * 4)
    latent, record = run(tiny, DeltaDiT(early=place, late=place, ratio=0.5), limits=Limits(0), sigmas=sigmas)
    torch.testing.assert_close(latent, tiny.sample(PROMPT, tiny.noise([1]), sigmas=sigmas), atol=2e-5, rtol=0)
    assert record.hit_ratio > 0


def test_other_patches_stay_on_the_blocks_outside_the_range(tiny):
    calls: list[str] = []
    patched = tiny.model.clone()
    for kind, i in (("double_block", 0), ("single_block", 5)):

        def patch(args, extra, kind=kind):
            calls.append(kind)
            return extra["original_block"](args)

        patched.set_model_patch_replace(patch, "dit", kind, i)
    _, record = run(tiny, DeltaDiT(early="rear", late="rear", blocks=4), model=patched)
    assert (calls.count("double_block"), calls.count("single_block")) == (8, 4) and record.bypassed_patches == 4


@pytest.mark.parametrize("inputs, says", [
    ({"block_count": 10}, "input 'block_count' got 10; allowed: 0 to 9"), ({"boundary": 1.5}, "boundary"),
    ({"blocks_ratio": -0.1}, "blocks_ratio"), ({"early_range": "top"}, "early_range"), ({"interval": 0}, "interval"),
])  # fmt: skip
def test_settings_out_of_bounds_are_named(tiny, inputs, says):
    with pytest.raises(NodeInputError, match=says):
        NODES["RectiflowDeltaBlockCache"]().execute(model=tiny.model, **{**SETTINGS, **inputs})


def test_the_node_samples_and_reports(tiny):
    model, log = NODES["RectiflowDeltaBlockCache"]().execute(model=tiny.model, **SETTINGS)
    latent = tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS, model=model)
    plain = tiny.sample(PROMPT, tiny.noise([1]), steps=STEPS)
    assert 0 < float((latent - plain).norm() / plain.norm()) < 0.5
    assert "Δ-DiT order 0, every 2, 75% of the blocks: rear, in the last 60% front" in log.last.text() and log.last.hit_ratio == 0.5


def watched(model, seen: list, block=None):
    """A clone of `model` whose blocks note the image tokens that enter them, a list a step; block(i, img, sigma) stands for block i."""
    clone, network = model.clone(), model.model.diffusion_model
    keys = [(kind, i) for kind in ("double_block", "single_block") for i in range(len(getattr(network, kind + "s")))]

    def noting(number, kind):
        def patch(args, extra):
            sigma = float(args["transformer_options"]["sigmas"][0])
            text = 0 if kind == "double_block" else args["img"].shape[1] - 64
            if number == 0:
                seen.append([])
            seen[-1].append(args["img"][:, text:].clone())
            if block is None:
                return extra["original_block"](args)
            return {**{name: args[name] for name in ("txt",) if name in args}, "img": block(number, args["img"], sigma)}

        return patch

    for number, (kind, i) in enumerate(keys):
        clone.set_model_patch_replace(noting(number, kind), "dit", kind, i)
    return clone


def test_the_error_on_linear_blocks_is_the_closed_form(tiny):
    """Blocks h ← h + a·h + u_i(σ), all left out at the second step: ((1 + a)^L − 1)·(h₀ − h₀') + Σ (1 + a)^(L−1−i)·(u_i − u_i')."""
    a, last = 0.1, []
    network = tiny.model.model.diffusion_model
    count = len(network.double_blocks) + len(network.single_blocks)

    def block(i, img, sigma):
        return img + a * img + (i + 1) * sigma**2

    handle = network.final_layer.register_forward_pre_hook(lambda module, args: last.append(args[0].clone()))
    try:
        seen: list = []
        model = watched(tiny.model, seen, block)
        tiny.sample(PROMPT, tiny.noise([1]), model=model, steps=3, cfg=1.0)
        plain, last[:] = list(last), []
        entered = [step[0] for step in seen]
        run(tiny, DeltaDiT(interval=2, early="all", late="all"), model=model, steps=3, cfg=1.0)
    finally:
        handle.remove()
    from rectiflow.host import calculate_sigmas

    sigmas = calculate_sigmas(tiny.model.get_model_object("model_sampling"), "simple", 3)
    grown = ((1 + a) ** count - 1) * (entered[1] - entered[0])
    added = sum((1 + a) ** (count - 1 - i) * (i + 1) * float(sigmas[1] ** 2 - sigmas[0] ** 2) for i in range(count))
    torch.testing.assert_close(plain[1] - last[1], grown + added, atol=1e-4, rtol=1e-5)  # tokens up to 20: a few roundings of float32
    assert float((plain[1] - last[1]).abs().max()) > 0.1


def test_an_offset_is_nearer_than_the_raw_tokens_for_front_and_middle_ranges(tiny):
    """What is put back one step later, over eight seeds: what entered now plus the offset, or the tokens that left then. The first quarter
    of the blocks and the middle half; the first half gains nothing on this model (0.99 to 1.01 of the raw error)."""
    seen: list = []
    tiny.sample([PROMPT] * 8, tiny.noise(range(8)), model=watched(tiny.model, seen), steps=6, cfg=1.0)
    count = len(seen[0])
    for start, end in ((0, count // 4), (count // 4, count - count // 4)):
        raw = delta = 0.0
        for before, now in zip(seen, seen[1:]):
            left = (before[end], now[end])
            raw = raw + (left[1] - left[0]).flatten(1).norm(dim=1)
            delta = delta + (left[1] - now[start] - (left[0] - before[start])).flatten(1).norm(dim=1)
        assert bool((delta < raw).all()), (start, end)
