"""Sharper attention of the picture's tokens among themselves: the closed form, what stays bit for bit, and whole runs beside text."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rectiflow.accel.attention.context_drop import ContextDrop, DropLog, attach_context_drop
from rectiflow.accel.attention.dispatch import AttentionCall
from rectiflow.accel.attention.length_scale import scaled_picture_attention
from rectiflow.accel.attention.rope import RopePlan, attach
from rectiflow.accel.attention.rope_spectrum import RopeScaling
from rectiflow.errors import NodeInputError
from rectiflow.tests.accel.region_toys import noise, sample, toy

SIZE = (18, 20)  # 9 × 10 tokens


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_of(text: int, extra: int, mask=None) -> AttentionCall:
    """Two samples, three heads of 16, a picture of 3 × 4 tokens."""
    q, k, v = (random(2, 3, text + 12 + extra, 16, seed=seed) for seed in (1, 2, 3))

    def plain(q, k, v, mask=mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return AttentionCall(q, k, v, mask, text, (3, 4), extra, ("double_block", 0), 0, 1.0, (), plain)


def written_out(call: AttentionCall, factor: float) -> torch.Tensor:
    """softmax of a matrix of logits in fp64, of which picture by picture is multiplied."""
    q, k, v = call.q.double(), call.k.double(), call.v.double()
    picture = slice(call.text, call.text + 12)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits[..., picture, picture] *= factor
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask, -torch.inf) if call.mask.dtype == torch.bool else logits + call.mask
    return (logits.softmax(-1) @ v).float()


@pytest.mark.parametrize(("text", "extra"), [(5, 0), (5, 4), (0, 3), (0, 0)])
@pytest.mark.parametrize("kind", ["none", "keys", "pairs", "bool"])
def test_picture_by_picture_is_multiplied_and_nothing_else(text, extra, kind):
    tokens = text + 12 + extra
    masks = {
        "none": None, "keys": random(2, 1, 1, tokens, seed=4), "pairs": random(1, 1, tokens, tokens, seed=5),
        "bool": random(tokens, tokens, seed=6) > -1.0,
    }  # fmt: skip
    call = call_of(text, extra, masks[kind])
    torch.testing.assert_close(scaled_picture_attention(call, 1.3), written_out(call, 1.3), rtol=0, atol=2e-6)


def scaled(model, apply_to: str = "picture", trained: int = 7, kind: str = "paper_log"):
    return attach(model, RopePlan(RopeScaling("none", (trained, trained)), kind, apply_to), "RoPE Extrapolation")


@pytest.mark.parametrize("family", ["flux", "lumina2"])
def test_at_the_training_size_a_run_is_bit_identical(family):
    """Asked of proportional attention: a base of as many tokens as there are changes nothing; nor does a larger one."""
    model, z = toy(family), noise(2, SIZE)
    for trained in ((9, 10), (64, 64)):
        kept = attach(model, RopePlan(RopeScaling("none", trained), "paper_log", "picture"), "test")
        assert torch.equal(sample(kept, z, steps=2), sample(model, z, steps=2))


@pytest.mark.parametrize("family", ["flux", "lumina2"])
def test_beyond_it_text_keeps_its_own_logits(family):
    """Without text's logits the two ways are not one; each is not the plain run, and a batch is its pictures one by one."""
    model, z = toy(family), noise(2, SIZE)
    plain, both, alone = (sample(found, z, steps=2, tokens=(5, 8)) for found in (model, scaled(model, "all"), scaled(model)))
    for one, other in ((plain, both), (plain, alone), (both, alone)):
        assert float((one - other).abs().max()) > 1e-4
    for place in range(2):
        one = sample(scaled(model), z[place : place + 1], steps=2, tokens=(5, 8))
        torch.testing.assert_close(alone[place : place + 1], one, atol=1e-4, rtol=1e-4)  # fp32 sums in another order over 2 steps


def test_a_run_multiplies_by_the_factor_of_its_size(monkeypatch):
    """What reaches the attention of the host: keys of the picture times log 90 / log 49, those of the text untouched."""
    from rectiflow.accel.attention import length_scale

    seen = []

    def watched(call, factor):
        seen.append((call.text, call.sides, factor))
        return scaled_picture_attention(call, factor)

    monkeypatch.setattr(length_scale, "scaled_picture_attention", watched)
    sample(scaled(toy("flux")), noise(1, SIZE), steps=1, cfg=1.0)
    assert seen == [(5, (9, 10), math.log(90) / math.log(49))] * 4


def test_another_node_on_the_same_attention_is_refused_in_either_order():
    model = toy("flux")
    drop = ContextDrop(DropLog(), "Context Drop", min_tokens=1)
    for made in (attach_context_drop(scaled(model), drop), scaled(attach_context_drop(model, drop))):
        with pytest.raises(NodeInputError, match="apply_to"):
            sample(made, noise(1, SIZE), steps=1)
        assert "rectiflow_attention_run" not in made.model_options["transformer_options"]
    sample(attach_context_drop(scaled(model, "all"), drop), noise(1, SIZE), steps=1)


def test_the_choice_is_checked_and_off_needs_no_known_attention(tiny):
    from rectiflow.nodes.rope import RectiflowRopeExtrapolation

    with pytest.raises(NodeInputError, match="'apply_to'"):
        scaled(tiny.model, "text")
    inputs = {"method": "none", "train_rows": 8, "train_columns": 8, "scale_from": "per_axis", "scale": 0.0}
    node = RectiflowRopeExtrapolation()
    latent = tiny.noise([3], (96, 96))
    off = node.execute(model=tiny.model, attention_scale="off", apply_to="picture", **inputs)[0]
    picture = node.execute(model=tiny.model, attention_scale="lumina_sqrt", apply_to="picture", **inputs)[0]
    assert torch.equal(tiny.sample("noto cat", latent, model=off, steps=2), tiny.sample("noto cat", latent, steps=2))
    moved = tiny.sample("noto cat", latent, model=picture, steps=2)
    assert torch.isfinite(moved).all() and not torch.equal(moved, tiny.sample("noto cat", latent, steps=2))
