"""Context Drop: what pooled keys compute in closed form, which layers drop them when, and whole runs on toys of each family."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rectiflow.accel.attention.context_drop import (
    LAYER_RULES,
    ContextDrop,
    DropHandler,
    DropLog,
    Turns,
    attach_context_drop,
    break_even,
    dropped_layers,
    pooled,
    pooled_attention,
    pooled_before_rotation,
    pooled_mask,
    square_counts,
)
from rectiflow.accel.attention.dispatch import RUN, AttentionCall
from rectiflow.accel.attention.rope import RopePlan
from rectiflow.accel.attention.rope import attach as scaled
from rectiflow.accel.attention.rope_spectrum import RopeScaling
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.ldm.common import EmbedND, apply_rope
from rectiflow.tests.accel.region_toys import FAMILIES, noise, sample, toy

WHERE = "Context Drop"
SIZE = (14, 20)  # 7 × 10 tokens; SD3's toy has positions for 10


def plain(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_of(sides: tuple[int, ...], text: int, extra: int = 0, constant: int = 0, mask=None, width: int = 16) -> AttentionCall:
    """Random q, k, v; with `constant`, keys and values are equal inside squares of that side."""
    image = math.prod(sides)
    q, k, v = (random(2, 3, text + image + extra, width, seed=seed) for seed in (1, 2, 3))
    if constant:
        rows, columns = sides[-2:]
        down, across = torch.arange(rows) // constant, torch.arange(columns) // constant
        first = (down[:, None] * constant * columns + across * constant).flatten()
        frames = torch.arange(math.prod(sides[:-2]))[:, None] * rows * columns
        source = text + (frames + first).flatten()
        for x in (k, v):
            x[:, :, text : text + image] = x[:, :, source]
    return AttentionCall(q, k, v, mask, text, sides, extra, ("double_block", 0), 0, 1.0, (), plain)


def drop(model, **options):
    log = DropLog()
    return attach_context_drop(model, ContextDrop(log, WHERE, **{"min_tokens": 1, "layers": "all", **options})), log


@pytest.mark.parametrize("sides, side", [((6, 8), 2), ((7, 10), 3), ((2, 5, 7), 2), ((3, 4), 8)])
def test_pooling_is_the_mean_of_each_square(sides, side):
    tokens = random(2, 3, math.prod(sides), 5)
    grid = tokens.unflatten(2, (math.prod(sides[:-2]), *sides[-2:]))
    squares = [
        grid[:, :, frame, y : y + side, x : x + side].mean(dim=(2, 3))
        for frame in range(grid.shape[2]) for y in range(0, sides[-2], side) for x in range(0, sides[-1], side)
    ]  # fmt: skip
    torch.testing.assert_close(pooled(tokens, sides, side), torch.stack(squares, dim=2), rtol=0, atol=1e-6)
    counts = square_counts(sides, side, torch.device("cpu"))
    assert len(counts) == len(squares) and int(counts.sum()) == math.prod(sides)


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("sides, side, text, extra", [((6, 8), 2, 5, 0), ((7, 10), 3, 5, 4), ((2, 5, 7), 2, 0, 3), ((6, 8), 2, 0, 0)])
def test_weighted_is_dense_where_squares_are_constant(sides, side, text, extra, by_channel):
    call = call_of(sides, text, extra, constant=side)
    torch.testing.assert_close(pooled_attention(call, side, True, by_channel), plain(call.q, call.k, call.v), rtol=0, atol=1e-5)


def test_plain_pooling_is_dense_only_without_other_keys():
    alone, joint = call_of((6, 8), 0, constant=2), call_of((6, 8), 5, constant=2)
    torch.testing.assert_close(pooled_attention(alone, 2, False), plain(alone.q, alone.k, alone.v), rtol=0, atol=1e-5)
    assert (pooled_attention(joint, 2, False) - plain(joint.q, joint.k, joint.v)).abs().max() > 0.01


def test_text_keys_are_never_pooled():
    """Only the text's values are not zero: the output moves with each of them alone."""
    call = call_of((6, 8), 5, extra=4)
    seen = []
    call.default = lambda q, k, v, mask=None: seen.append((k, v)) or plain(q, k, v, mask)
    pooled_attention(call, 2, False)
    k, v = seen[0]
    assert k.shape[2] == 5 + 12 + 4
    for ours, given in ((k, call.k), (v, call.v)):
        assert torch.equal(ours[:, :, :5], given[:, :, :5]) and torch.equal(ours[:, :, -4:], given[:, :, -4:])


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks_are_merged(kind, by_channel):
    """Text padding, and image keys that carry one weight a square, give what dense attention gives under the same mask."""
    sides, side, text = (6, 8), 2, 5
    mask = torch.zeros(2, 1, 1, text + 48)
    mask[:, ..., 3:5] = -torch.inf
    image = random(2, 1, 1, 12).repeat_interleave(2, dim=-1)  # (2, 1, 1, 24), a row of squares after the other
    rows = image.unflatten(-1, (3, 1, 8)).expand(-1, -1, -1, 3, 2, 8).flatten(-3)
    mask[..., text:] = torch.where(rows > 1.0, -torch.inf, 0.0) if kind == "bool" else rows
    given = mask == 0 if kind == "bool" else mask
    call = call_of(sides, text, constant=side, mask=given)
    torch.testing.assert_close(pooled_attention(call, side, True, by_channel), plain(call.q, call.k, call.v, given), rtol=0, atol=1e-5)
    assert pooled_mask(given, text, sides, side).shape == (2, 1, 1, text + 12)


def test_layers_by_time():
    assert list(dropped_layers("time_linear", 10, 1.0)) == list(range(10)) and not list(dropped_layers("time_linear", 10, 0.0))
    assert list(dropped_layers("time_linear", 10, 0.3)) == [0, 1, 2] and list(dropped_layers("last_first", 10, 0.3)) == [7, 8, 9]
    assert all(len(dropped_layers("all", 10, sigma)) == 10 for sigma in (0.0, 0.5, 1.0))
    for rule in LAYER_RULES:
        counts = [len(dropped_layers(rule, 7, sigma / 50)) for sigma in range(51)]
        assert counts == sorted(counts) and counts[-1] == 7


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"side": 1}, {"min_tokens": 1000}, {"side": 0, "base_tokens": 70}])
def test_off_is_bit_identical(family, options):
    model = toy(family)
    patched, log = drop(model, **options)
    z = noise(2, SIZE)
    assert torch.equal(sample(patched, z, steps=2), sample(model, z, steps=2))
    assert log.calls[0] == 0 and log.calls[1] > 0 and "dense" in log.text()


@pytest.mark.parametrize("family, attentions, text", [("flux", 4, 5), ("sd3", 4, 5), ("lumina2", 4, 5)])
def test_pairs_are_those_of_the_kept_keys(family, attentions, text):
    """7 × 10 tokens in squares of 2: 4 · 5 keys beside the text's. SD3's first block attends over the image alone too."""
    patched, log = drop(toy(family))
    out = sample(patched, noise(2, SIZE), steps=2)
    joint, alone = (70 + text) * (20 + text), 70 * 20
    dense, extra = (70 + text) ** 2, 2 * 2 * 2 if family == "sd3" else 0  # steps, conditions, pictures
    assert log.calls == (2 * (attentions + (family == "sd3")), 0)
    assert log.pairs == 2 * 2 * 2 * attentions * joint + extra * alone and log.dense == 2 * 2 * 2 * attentions * dense + extra * 4900
    assert out.isfinite().all()


def test_cost_falls_by_the_square_of_the_factor():
    """An attention over 8 × 8 image tokens alone: a fourth and a sixteenth of the pairs."""
    call = call_of((8, 8), 0)
    keys = []
    call.default = lambda q, k, v, mask=None: keys.append(k.shape[2]) or plain(q, k, v, mask)
    for side in (2, 4):
        pooled_attention(call, side, True)
    assert keys == [64 // 4, 64 // 16]


@pytest.mark.parametrize("family", FAMILIES)
def test_conditions_joined_or_apart_and_batches_agree(family):
    """Texts of unequal length cannot be joined; a batch is its pictures one by one. Bound: fp32 sums in another order over 2 steps."""
    patched, _ = drop(toy(family))
    z = noise(2, SIZE)
    both = sample(patched, z, steps=2, tokens=(5, 8))
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], sample(patched, z[i : i + 1], steps=2, tokens=(5, 8)), atol=1e-4, rtol=1e-4)


def test_weighting_is_nearer_to_the_dense_run():
    """A square's weight is right to first order: on every seed the run without weights is further from the plain one."""
    model = toy("flux")
    for seed in range(4):
        z = noise(1, (16, 16), seed)
        errors = [float((sample(drop(model, weighted=weighted)[0], z, steps=2) - sample(model, z, steps=2)).norm()) for weighted in (1, 0)]
        assert errors[0] < errors[1]


def test_time_rules_choose_layers_and_steps():
    model = toy("flux")
    first, log = drop(model, layers="time_linear")
    sample(first, noise(1, SIZE), steps=4)  # sigmas 1, 3/4, 1/2, 1/4 of 4 layers
    assert log.calls[0] == 4 + 3 + 2 + 1 and log.layers == {1.0: (0, 4), 0.75: (0, 3), 0.5: (0, 2), 0.25: (0, 1)}
    last, log = drop(model, layers="last_first", start=0.5)
    sample(last, noise(1, SIZE), steps=4)
    assert log.layers == {0.5: (2, 4), 0.25: (3, 4)} and "layers 3-3" in log.text()


class Failing(Exception):
    pass


def test_interrupt_then_another_size():
    model = toy("flux")
    patched, log = drop(model)

    def stop(step, *rest):
        if step == 1:
            raise Failing

    with pytest.raises(Failing):
        sample(patched, noise(1, SIZE), steps=4, callback=stop)
    assert RUN not in patched.model_options["transformer_options"] and log.runs == 1
    other = noise(1, (10, 6))
    assert torch.equal(sample(patched, other, steps=2), sample(drop(model)[0], other, steps=2))


@pytest.mark.parametrize("options, name", [
    ({"side": 9}, "factor"), ({"side": -1}, "factor"), ({"layers": "odd"}, "layers"), ({"start": 0.6, "end": 0.5}, "start_percent"),
    ({"min_tokens": -1}, "min_tokens"), ({"base_tokens": 0}, "base_tokens"), ({"pool": "max"}, "pool"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(options, name):
    with pytest.raises(NodeInputError, match=name):
        drop(toy("flux"), **options)


def test_break_even_is_measured_or_said_to_be_out_of_reach():
    assert break_even(1, True, 1, 16, torch.device("cpu"), torch.float32, budget=0.0) is None
    patched, log = drop(toy("flux"), min_tokens=0)
    sample(patched, noise(1, (6, 8)), steps=1)
    assert "break-even on this machine" in log.text()


def test_the_node_fills_its_report(tiny):
    from rectiflow.nodes.attention import RectiflowAttentionReport
    from rectiflow.nodes.context_drop import RectiflowContextDrop

    given = {"factor": 2, "weighted": True, "layers": "all", "start_percent": 0.0, "end_percent": 1.0, "base_tokens": 64}
    model, report = RectiflowContextDrop().execute(model=tiny.model, **given, min_tokens=16)
    with pytest.raises(NodeInputError, match="report"):
        RectiflowAttentionReport().execute(report=report, after={})
    latent = tiny.sample("noto cat", tiny.noise([1]), model=model, steps=1)
    text = RectiflowAttentionReport().execute(report=report, after={"samples": latent})[0]
    assert "with pooled keys" in text and "sigma 1.000: layers 0-8" in text


@pytest.mark.parametrize("size", [1.0, 1.25])
@pytest.mark.parametrize("sides, side", [((6, 8), 2), ((7, 10), 3), ((2, 5, 7), 4), ((9, 9), 8)])
def test_keys_pooled_before_rotation_stand_at_the_mean_place(sides, side, size):
    """Of keys known unrotated: their means, turned by the embedder itself at the means of their ids. Bound: fp32 angles up to 10."""
    embedder = EmbedND(dim=32, theta=10000, axes_dim=[4, 14, 14])
    frames, rows, columns = math.prod(sides[:-2]), *sides[-2:]
    axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.stack([axis.flatten().float() for axis in axes], dim=-1)[None]  # (1, n, 3)
    keys = random(2, 3, math.prod(sides), 32)
    table = size * embedder(ids)
    turns = Turns.of(table, sides, side)
    found = pooled_before_rotation(apply_rope(keys, table), turns, sides, side)
    expected = apply_rope(pooled(keys, sides, side), size * embedder(pooled(ids[None], sides, side)[0]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    half = pooled_before_rotation(apply_rope(keys, table).bfloat16(), turns, sides, side)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.03)  # keys of up to 5 in bf16


def test_without_rotation_both_ways_of_pooling_are_one():
    """A table of no turns, and one of the model's own: only the second parts the two."""
    call = call_of((6, 8), 5, 4, width=32)
    still = Turns.of(torch.eye(2).expand(1, 1, 48, 16, 2, 2), (6, 8), 2)
    for weighted in (True, False):
        found = pooled_attention(call, 2, weighted, turns=still)
        torch.testing.assert_close(found, pooled_attention(call, 2, weighted), rtol=0, atol=1e-6)
    ids = torch.arange(48.0)[None, :, None].expand(1, 48, 3)
    turned = Turns.of(EmbedND(dim=32, theta=10000, axes_dim=[4, 14, 14])(ids), (6, 8), 2)
    assert float((pooled_attention(call, 2, True, turns=turned) - pooled_attention(call, 2, True)).abs().max()) > 1e-3


def test_a_run_of_flux_pools_before_rotation_and_others_are_refused():
    model, z = toy("flux"), noise(2, SIZE)
    (free, log), (mean, _) = drop(model, pool="rope_free"), drop(model)
    found = sample(free, z, steps=2, tokens=(5, 8))
    assert log.calls[0] > 0 and log.calls[1] == 0 and found.isfinite().all()
    assert float((found - sample(mean, z, steps=2, tokens=(5, 8))).abs().max()) > 1e-4
    one = sample(free, z[:1], steps=2, tokens=(5, 8))
    torch.testing.assert_close(found[:1], one, atol=1e-4, rtol=1e-4)  # fp32 sums in another order over 2 steps
    for family, name in (("sd3", "SD3"), ("lumina2", "NextDiT")):
        with pytest.raises(NodeInputError, match=f"'pool'.*{name}"):
            drop(toy(family), pool="rope_free")


def test_tables_that_change_within_a_run_are_read_anew(monkeypatch):
    """Positions that follow the time of the flow: the run is the one in which nothing is held from one call to the next."""
    model = scaled(toy("flux"), RopePlan(RopeScaling("time_aware", (7, 7))), "test")
    patched, z = drop(model, pool="rope_free")[0], noise(1, (18, 20))
    found = sample(patched, z, steps=3)

    def fresh(handler, call, side):
        return Turns.of(call.rotations[:, :, call.text : call.text + math.prod(call.sides)], call.sides, side)

    monkeypatch.setattr(DropHandler, "_turns", fresh)
    assert torch.equal(sample(patched, z, steps=3), found)
