"""Grouped attention on toy transformers: geometry, what runs where, what stays untouched, and what is left behind."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from rectiflow.accel.attention.dispatch import RUN, detach
from rectiflow.accel.attention.grouped import AttentionLog, GroupedAttention, GroupRule, attach_grouped, break_even, group_layout, key_map
from rectiflow.errors import NodeInputError
from rectiflow.kernels.block_sparse_attention import block_sparse_attention
from rectiflow.tests.accel.region_toys import FAMILIES, noise, sample, toy, with_ras

WHERE = "Grouped Attention"
SIZE = (14, 20)  # 7 × 10 tokens; SD3's toy has positions for 10


def grouped(model, pattern="block", group=(1, 2, 3), radius=0, log=None, **options):
    log = AttentionLog() if log is None else log
    plan = GroupedAttention(GroupRule(pattern, group, radius), log, WHERE, **{"min_tokens": 1, **options})
    return attach_grouped(model, plan), log


def groups_of(counts: tuple[int, ...], pattern: str) -> list[int]:
    """Groups that each group keeps, with groups of one token."""
    return [len(row) for row in group_layout(counts, GroupRule(pattern, (1, 1, 1), 1)).kept]


def test_key_counts_of_the_paper():
    block, cross = groups_of((32, 32), "block"), groups_of((32, 32), "cross")
    assert max(block) == 9 and sum(block) / len(block) == pytest.approx(8.629, abs=1e-3)
    assert set(cross) == {63}
    assert set(groups_of((8, 6, 10), "cross")) == {165}
    clip = groups_of((8, 6, 10), "block")
    assert sum(clip) / len(clip) == pytest.approx(20.5, abs=0.05)


@pytest.mark.parametrize("sides, pattern", [((7, 10), "block"), ((3, 7, 10), "cross"), ((8, 8), "block_and_cross")])
def test_key_counts_are_the_row_sums_of_the_mask(sides, pattern):
    layout = group_layout(sides, GroupRule(pattern, (2, 2, 3), 1), 5, 4)
    sums = layout.mask().sum(dim=1)
    for block, keys in zip(layout.blocks, layout.keys):
        assert set(sums[block].tolist()) == {keys}
    assert layout.pairs == int(sums.sum())


@pytest.mark.parametrize("sides", [(7, 10), (3, 7, 10)])
def test_grouping_holds_every_token_once(sides):
    layout = group_layout(sides, GroupRule("block", (2, 4, 3)), 5, 4)
    order = torch.cat(layout.blocks)
    tokens = torch.randn(len(order), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens[order][order.argsort()], tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern, options", [("block", {"radius": 10}), ("block", {"min_tokens": 1000}), ("cross", {"group": (1, 64, 2)})])
def test_all_keys_seen_is_bit_identical(family, pattern, options):
    model = toy(family)
    patched, log = grouped(model, pattern, **options)
    z = noise(2, SIZE)
    assert torch.equal(sample(patched, z, steps=2), sample(model, z, steps=2))
    assert log.sparse == 0 and log.dense > 0


@pytest.mark.parametrize("family, attentions", [("flux", 4), ("sd3", 5), ("lumina2", 4)])
def test_every_image_attention_is_grouped_and_no_other(family, attentions):
    """Refiners of NextDiT see one kind of token; SD3's first block attends twice. Conditions of equal length come in one call."""
    model = toy(family)
    patched, log = grouped(model)
    z = noise(2, SIZE)
    out = sample(patched, z, steps=2)
    assert log.sparse == 2 * attentions and log.dense == 0 and "grouped" in log.text()
    assert out.isfinite().all() and not torch.equal(out, sample(model, z, steps=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_joined_or_apart_and_batches_agree(family):
    """Texts of unequal length cannot be joined; a batch is its pictures one by one. Bound: fp32 sums in another order over 2 steps."""
    patched, _ = grouped(toy(family))
    z = noise(2, SIZE)
    both = sample(patched, z, steps=2, tokens=(5, 8))
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], sample(patched, z[i : i + 1], steps=2, tokens=(5, 8)), atol=1e-4, rtol=1e-4)


def test_text_queries_are_dense_exactly():
    """Done 4: text sees every token, so its rows are those of dense attention; fp32 sums in another order."""
    layout = group_layout((7, 10), GroupRule("block", (1, 2, 3), 0), 5)
    q, k, v = (torch.randn(2, 3, 75, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out, dense = block_sparse_attention(q, k, v, layout), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[:, :, :5], dense[:, :, :5], atol=1e-6, rtol=0)
    assert float((out - dense)[:, :, 5:].abs().max()) > 1e-2


def test_grouped_time_is_a_third_of_dense():
    """Done 6: 128 × 128 tokens in groups of 16, two heads of 64: at most 0.35 of the dense time, in seconds of this process."""
    layout = group_layout((128, 128), GroupRule("block"))
    q, k, v = (torch.randn(1, 2, 128 * 128, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert layout.share < 0.14

    def seconds(work, *given) -> float:
        start = time.process_time()
        work(*given)
        return time.process_time() - start

    with torch.inference_mode():
        ours = min(seconds(block_sparse_attention, q, k, v, layout) for _ in range(2))
        assert ours <= 0.35 * seconds(F.scaled_dot_product_attention, q, k, v)


def test_error_falls_with_the_radius():
    model = toy("flux")
    errors = []
    for radius in (0, 1, 2):
        patched, _ = grouped(model, radius=radius, group=(1, 2, 2))
        errors.append(sum(
            float((sample(patched, noise(1, (16, 16), seed), steps=2) - sample(model, noise(1, (16, 16), seed), steps=2)).norm())
            for seed in range(8)
        ))  # fmt: skip
    assert errors[0] > errors[1] > errors[2] > 0


def test_steps_and_blocks_are_chosen():
    model = toy("flux")
    _, log = patched = grouped(model, start=0.5, blocks="double:1, single")
    sample(patched[0], noise(1, SIZE), steps=4)
    assert log.sparse == 2 * 3


class Failing(Exception):
    pass


def test_interrupt_then_another_size():
    """A fault in mid-run leaves nothing in the options, and the next run has its own grid."""
    model = toy("flux")
    patched, log = grouped(model)

    def stop(step, *rest):
        if step == 1:
            raise Failing

    with pytest.raises(Failing):
        sample(patched, noise(1, SIZE), steps=4, callback=stop)
    assert RUN not in patched.model_options["transformer_options"] and log.runs == 1
    other = noise(1, (10, 6))
    fresh, _ = grouped(model)
    assert torch.equal(sample(patched, other, steps=2), sample(fresh, other, steps=2))


@pytest.mark.parametrize("passes_on", [True, False])
def test_an_earlier_override_is_kept(passes_on):
    """As a fallback it gets what no handler takes; one that passes on sees every attention."""
    model = toy("flux").clone()
    seen = []

    def override(func, *args, **kwargs):
        seen.append(args[0].shape)
        return func(*args, **kwargs)

    override.rectiflow_passes_on = passes_on
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    patched, log = grouped(model, blocks="double")
    sample(patched, noise(1, SIZE), steps=1)
    assert log.sparse == 2 and len(seen) == (4 if passes_on else 2)


@pytest.mark.parametrize("family, attentions", [("flux", 4), ("sd3", 5), ("lumina2", 4)])
@pytest.mark.parametrize("kv", ["full", "none"])
def test_ras_beside_groups(family, attentions, kv):
    """RAS's dense steps are grouped and its partial ones are RAS's alone: 4 of 8 steps each; groups that see all change no bit of RAS."""
    model, ras = with_ras(toy(family), kv=kv, start=2, resets=(4, 6))
    z = noise(2, SIZE)
    plain = sample(model, z)
    partial = sum(visit.phase == "active" for visit in ras.last.visits)
    assert 0 < partial < 8
    patched, log = grouped(model)
    out = sample(patched, z)
    assert log.sparse == (8 - partial) * attentions and log.dense == 0
    assert out.isfinite().all() and not torch.equal(out, plain)
    off, _ = grouped(model, radius=10)
    assert torch.equal(sample(off, z), plain)


def test_detached_is_untouched():
    model = toy("flux")
    bare = detach(grouped(model)[0])
    assert torch.equal(sample(bare, noise(1, SIZE), steps=2), sample(model, noise(1, SIZE), steps=2))


@pytest.mark.parametrize("options, name", [
    ({"pattern": "star"}, "pattern"), ({"group": (1, 1, 4)}, "group_height"), ({"group": (17, 2, 4)}, "group_frames"),
    ({"radius": -1}, "radius"), ({"start": 0.6, "end": 0.5}, "start_percent"), ({"blocks": "double:9"}, "blocks"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(options, name):
    with pytest.raises(NodeInputError, match=name):
        grouped(toy("flux"), **options)


def test_blocks_of_a_family_without_names_are_refused():
    with pytest.raises(NodeInputError, match="blocks"):
        grouped(toy("lumina2"), blocks="double:0")


def test_break_even_is_measured_or_said_to_be_out_of_reach():
    """Groups that see nearly all gain nowhere within a budget of nothing; the text says what was found."""
    assert break_even(GroupRule("block", (1, 16, 16), 64), 1, 16, torch.device("cpu"), torch.float32, budget=0.0) is None
    patched, log = grouped(toy("flux"), min_tokens=0, group=(1, 64, 64), radius=0)
    state = torch.get_rng_state()
    sample(patched, noise(1, (6, 8)), steps=1)
    assert "dense" in log.text() and torch.equal(torch.get_rng_state(), state)


def test_the_map_shows_what_a_token_sees():
    shown = key_map((8, 12), GroupRule("cross", (1, 4, 4)), 5, (0.0, 1.0))
    assert shown.shape == (1, 8, 12, 3) and int(shown[..., 0].sum()) == 4 * 12 + 4 * 4
    assert shown[0, 0, 0, 0] == 1 and shown[0, 7, 0, 0] == 0
